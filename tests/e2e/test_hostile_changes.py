"""A task that makes the worst of its own layer, in real sessions: what it did leaves, or is named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import FINISH, Runner, command, engine_leftovers, mounts_beneath

pytestmark = pytest.mark.docker

SECRET = "hunter2-never-leaves"


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    made = Runner(tmp_path)
    for path, text in {
        "src/a.txt": "one\n",
        "src/secrets/key": SECRET,
        ".env": SECRET,
        ".gitignore": "build/\n",
    }.items():
        (made.workspace / path).parent.mkdir(parents=True, exist_ok=True)
        (made.workspace / path).write_text(text)
    (made.workspace / "second-name").hardlink_to(made.workspace / ".env")
    return made


def work(runner: Runner, script: str) -> dict[str, Any]:
    """Run a Python program of the task to its end; return the result."""
    (runner.workspace / "task.py").write_text(script)
    line = "python3 task.py"
    finished = runner.run("--model", runner.script({"calls": [command(line)]}, FINISH))
    assert finished.stdout, finished.stderr
    result = finished.json
    assert result["status"] == "completed", result["reason"]
    assert result["actions"][0]["exit_code"] == 0, result["actions"][0]["excerpt"]
    assert not engine_leftovers(result["session"])
    assert not mounts_beneath(runner.state)
    left = {path.name for path in (runner.state / "sessions" / result["session"]).iterdir()}
    assert left == {"ledger.jsonl", "statement.json", "result.json", "patch.diff", "owner"}
    for path in (runner.state / "sessions" / result["session"]).iterdir():
        assert SECRET.encode() not in path.read_bytes()
    return result


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() else "" for path in root.rglob("*")
    }


def test_nothing_a_task_does_to_its_layer_reaches_a_hidden_file(runner: Runner) -> None:
    script = """
import os
def attempt(what, *arguments):
    try:
        print(what.__name__, repr(what(*arguments)))
    except OSError as error:
        print(what.__name__, error.strerror)
attempt(os.mknod, "whiteout", 0o020000, 0)
attempt(os.mkfifo, "fifo")
attempt(os.rename, "src", "renamed")
attempt(os.link, "second-name", "third-name")
attempt(os.link, ".env", "third-name")
attempt(os.setxattr, "src", "user.overlay.opaque", b"y")
attempt(os.setxattr, "src/a.txt", "user.overlay.redirect", b"/.env")
attempt(os.symlink, ".env", "link")
attempt(open, "link")
attempt(os.listdir, "src")
"""
    before = tree(runner.workspace)
    result = work(runner, script)
    said = result["actions"][0]["excerpt"].splitlines()
    assert said[0] == "mknod Operation not permitted"
    assert said[1] == "mkfifo None"  # the control: a special file of another kind
    assert said[2] == "rename Invalid cross-device link"
    assert said[3:5] == ["link No such file or directory"] * 2
    assert said[7:] == ["symlink None", "open No such file or directory", "listdir ['a.txt']"]
    assert tree(runner.workspace) == before | {"task.py": script}
    assert [line.split(":")[0] for line in result["patch"]["withheld"]] == ["fifo"]
    assert runner("apply", "latest").code == 0
    assert (runner.workspace / "link").is_symlink()


def test_what_a_reviewer_must_not_miss_is_named_before_any_flood(runner: Runner) -> None:
    script = """
import os
for number in range(300):
    os.mkfifo("!%03d" % number)
    os.mkdir("!empty%03d" % number)
os.makedirs(".git/hooks")
open(".git/hooks/pre-commit", "w").write("evil")
open(".env", "w").write("forged")
"""
    withheld = work(runner, script)["patch"]["withheld"]
    assert withheld[0].startswith(".env: the policy hides it")
    assert withheld[1].startswith(".git: ")
    assert "hooks/pre-commit" in withheld[1]
    assert withheld[-1] == "… and 502 more"


def test_odd_trees_come_back_exactly_on_a_pristine_copy(runner: Runner, tmp_path: Path) -> None:
    """Names, kinds and depths that have broken patches before, all in one."""
    pristine = tmp_path / "pristine"
    shutil.copytree(runner.workspace, pristine, symlinks=True)
    script = """
import os
def put(path, content=b""):
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").write(content)
put(b" /empty"); put(b"a /b / c", bytes(range(256))); put(b"new\\nline"); put(b"q\\"\\\\x", b"x")
put(b"\\xff\\xfe", b"1"); put(b"\\x1b[2J"); put("\\u202ertl")
put(b"crlf", b"a\\r\\nb"); put(b"src/b", b"b")
os.remove("src/a.txt"); put(b"src/a.txt/inside", b"was a file")
put(b"build/product", b"p"); os.symlink("nowhere", "~1234567"); os.symlink("src", "link")
put(b"set-id", b"s"); os.chmod("set-id", 0o4755)
top = os.getcwd()
for _ in range(400):
    os.mkdir("a") if os.path.basename(os.getcwd()) == "a" else os.makedirs("pit/a")
    os.chdir("a" if os.path.basename(os.getcwd()) == "a" else "pit/a")
open("deep", "w").write("deep")
os.chdir(top)
for number in range(2000):
    put(b"many/%d" % number, b"%d" % number)
for number in range(3000):
    put(b"build/%s/%d" % (b"long" * 20, number))
"""
    result = work(runner, script)
    assert {line.split(": ")[0] for line in result["patch"]["withheld"]} == {"build", "~1234567", "set-id"}
    applied = runner("apply", "latest", "--workspace", pristine)
    assert applied.code == 0, applied.stderr
    assert (pristine / " " / "empty").read_bytes() == b""
    assert (pristine / "a " / "b " / " c").read_bytes() == bytes(range(256))
    assert (pristine / "src" / "a.txt" / "inside").read_bytes() == b"was a file"
    assert (pristine / "set-id").stat().st_mode & 0o7777 == 0o755
    assert len(list((pristine / "many").iterdir())) == 2000
    found = subprocess.run(["find", pristine, "-name", "deep"], capture_output=True, check=True).stdout
    assert found.count(b"/a") >= 400
    assert not (pristine / "build").exists()
    assert (pristine / ".env").read_text() == SECRET


def test_a_layer_locked_against_its_owner_is_read_and_removed(runner: Runner) -> None:
    script = """
import os
os.makedirs("locked/in")
open("locked/in/file", "w").write("x")
for path in ("locked/in/file", "locked/in", "locked", "."):
    os.chmod(path, 0)
"""
    assert work(runner, script)["patch"]["files"] == 1
    assert runner("apply", "latest").code == 0
    assert (runner.workspace / "locked" / "in" / "file").read_text() == "x"
