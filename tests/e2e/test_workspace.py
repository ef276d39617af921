"""The workspace in real containers: what is hidden is not there, what is written comes back as a patch.

Each test runs for a controller that is root (id-mapped) and for an ordinary user; as an ordinary user
only the latter. Every deny has its control: the same probe in the same container without the mask.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.container.patch.apply import apply_patch
from sandbox.container.patch.export import ExportedPatch, export_patch
from sandbox.container.workspace.mounts import list_mounts_beneath
from sandbox.container.workspace.prepare import PreparedWorkspace, prepare_workspace, release_workspace
from sandbox.errors import WorkspaceError
from sandbox.policy.paths import DenyPatterns

pytestmark = pytest.mark.docker

T = TypeVar("T")
IMAGE = os.environ.get("AGENT_RUNNER_TEST_IMAGE", "agent-runner/base:latest")
ORDINARY_UID = 1000
PATTERNS = DenyPatterns(["**/.env*", "**/secrets/**"])


@dataclass
class Sandbox:
    """One workspace of one controller, in a directory that controller owns."""

    root: Path
    controller: int
    """Uid of the controller."""

    @property
    def workspace(self) -> Path:
        return self.root / "project"

    @property
    def session(self) -> Path:
        return self.root / "state" / "sessions" / self.root.name

    def do(self, function: Callable[[], T]) -> T:
        """Run something as the controller."""
        return _as_user(self.controller, function)

    def prepare(self, patterns: DenyPatterns = PATTERNS) -> PreparedWorkspace:
        return self.do(lambda: prepare(self.workspace, patterns, self.session))

    def export(self, patterns: DenyPatterns = PATTERNS) -> ExportedPatch:
        return self.do(
            lambda: export_patch(self.session, self.workspace, patterns, self.session / "patch.diff")
        )

    def release(self) -> None:
        self.do(lambda: release_workspace(self.session))


def prepare(workspace: Path, patterns: DenyPatterns, session: Path) -> PreparedWorkspace:
    """Prepare to the end; without the thread's future, which cannot cross to another process."""
    prepared = prepare_workspace(workspace, patterns, session)
    prepared.wait_base_tree()
    return replace(prepared, survey=None)  # type: ignore[arg-type]


def _as_user(uid: int, function: Callable[[], T]) -> T:
    """Call in a child with that uid, in no group but its own; exceptions come back."""
    if uid == os.geteuid():
        return function()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            outcome: tuple[bool, object] = (True, function())
        except BaseException as exc:  # handed to the parent, whatever it is
            outcome = (False, exc)
        with open(writer, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        is_fine, value = pickle.load(pipe)  # noqa: S301  # our own child
    os.waitpid(child, 0)
    if not is_fine:
        raise value
    return value  # type: ignore[no-any-return]


def run(prepared: PreparedWorkspace, script: str, *, is_masked: bool = True) -> str:
    """Run a shell script in a fresh container on the workspace, as strictly as a session would."""
    lower = prepared.volume.lower if is_masked else prepared.volume.lower[1:]
    volume = replace(prepared.volume, lower=lower)
    layers = f"lowerdir={':'.join(volume.lower)},upperdir={volume.upper},workdir={volume.work}"
    options = ",".join([layers, *volume.flags])
    create = ["docker", "volume", "create", "--driver", "local", "--opt", "type=overlay"]
    _docker(*create[1:], "--opt", "device=overlay", "--opt", f"o={options}", volume.name)
    name = volume.name
    try:
        identity = f"{prepared.uid}:{prepared.gid}"
        _docker("create", "--name", name, "--network", "none", "--read-only", "--cap-drop", "ALL",
                "--security-opt", "no-new-privileges", "-u", identity, "-v", f"{name}:{volume.target}",
                "-w", volume.target, IMAGE, "sh", "-c", script)  # fmt: skip
        done = subprocess.run(
            ["docker", "start", "-a", name], capture_output=True, text=True, errors="surrogateescape",
            timeout=60, check=False,
        )  # fmt: skip
        # Mounts the volume once more: the kernel then clears what an ordinary user could not remove.
        subprocess.run(["docker", "cp", f"{name}:/workspace/..absent", "-"], capture_output=True, check=False)
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)
        subprocess.run(["docker", "volume", "rm", "-f", name], capture_output=True, check=False)
    return done.stdout + done.stderr


def _docker(*arguments: str) -> None:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["root", "ordinary"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    controller = 0 if request.param == "root" else (os.geteuid() or ORDINARY_UID)
    if controller == 0 and os.geteuid() != 0:
        pytest.skip("needs a controller running as root")
    root = Path(tempfile.mkdtemp(prefix="agent-runner-ws-"))
    if os.geteuid() == 0:
        os.chown(root, controller, controller)
    made = Sandbox(root, controller)
    made.do(lambda: _make_project(made.workspace))
    yield made
    made.release()
    assert not list_mounts_beneath(os.fsencode(root))
    assert sorted(path.name for path in made.session.iterdir()) in ([], ["patch.diff"])
    shutil.rmtree(root)


def _make_project(workspace: Path) -> None:
    (workspace / "src" / "secrets").mkdir(parents=True)
    (workspace / "src" / "secrets" / "key").write_text("TOPSECRET\n")
    (workspace / "src" / "main.py").write_text("print(1)\n")
    (workspace / "src" / "private.txt").write_text("mine\n")
    (workspace / "src" / "private.txt").chmod(0o600)
    (workspace / ".env").write_text("TOPSECRET\n")
    (workspace / "link-to-env").symlink_to(".env")
    (workspace / "link-to-key").symlink_to("src/secrets/key")
    (workspace / "second-name").hardlink_to(workspace / ".env")
    (workspace / "docs").mkdir()
    (workspace / "docs" / "a.md").write_text("a\n")


PROBES = {
    "list": "ls -a . src",
    "stat": "stat .env src/secrets/key",
    "open": "cat .env",
    "open beneath": "cat src/secrets/key",
    "symlink": "cat link-to-env",
    "symlink beneath": "cat link-to-key",
    "hard link": "cat second-name",
    "find": "find / -xdev -name key -o -xdev -name second-name; find . -type f | xargs grep -l TOPSECRET",
    "root of a process": "cat /proc/self/root/workspace/.env /proc/1/cwd/.env",
    "directory descriptor": "exec 3<src; cat /proc/self/fd/3/secrets/key",
    "renamed ancestor": "mv src moved && cat moved/secrets/key",
    "copied ancestor": "cp -r src copied; cat copied/secrets/key",
    "removed ancestor": "rm -rf src; mkdir src; cat src/secrets/key",
    "recreated": "mkdir -p src/secrets; cat src/secrets/key; rmdir src/secrets; cat src/secrets/key",
    "replaced whiteout": "rm -f .env; ln second-name .env; cat .env",
}


def test_a_hidden_file_does_not_exist_and_without_the_mask_it_does(sandbox: Sandbox) -> None:
    script = "ls -A . src | grep -xE '[.]env|second-name|secrets'; stat -c %n .env second-name src/secrets"
    control = run(sandbox.prepare(), script, is_masked=False)
    sandbox.release()
    masked = run(sandbox.prepare(), script)
    assert control.split() == [".env", "second-name", "secrets", ".env", "second-name", "src/secrets"]
    assert masked.count("No such file or directory") == 3
    assert len(masked.splitlines()) == 3, masked


def test_no_probe_reaches_a_hidden_file(sandbox: Sandbox) -> None:
    """All of them, one container each way; the renaming ones last, as they change the tree."""
    script = "; ".join(f"echo '== {name}'; ( {probe} ) 2>&1" for name, probe in PROBES.items())
    prepared = sandbox.prepare()
    control = run(prepared, script, is_masked=False)
    sandbox.release()
    masked = run(sandbox.prepare(), script)
    assert control.count("TOPSECRET") >= 8, control
    assert "TOPSECRET" not in masked
    assert "== recreated" in masked  # it ran to the end


def test_the_sandbox_writes_its_own_layer_and_the_users_directory_stays(sandbox: Sandbox) -> None:
    before = _tree(sandbox.workspace)
    prepared = sandbox.prepare()
    assert prepared.uid != 0
    told = run(
        prepared,
        "id -u; cat src/private.txt; echo 2 >> src/main.py; echo new > src/new; rm docs/a.md;"
        "chmod 755 src/private.txt; mkdir d && echo x > d/f && mv src/main.py d/ && touch .envrc;"
        "echo fine; stat -c %u:%g . src src/private.txt",
    )
    mine = f"{prepared.uid}:{prepared.gid}\n"
    assert told == f"{prepared.uid}\nmine\nfine\n{mine * 3}"
    assert _tree(sandbox.workspace) == before
    exported = sandbox.export()
    assert [(file.kind, file.path) for file in exported.files] == [
        ("deleted", b"docs/a.md"),
        ("deleted", b"src/main.py"),
        ("mode", b"src/private.txt"),
        ("added", b"d/f"),
        ("added", b"d/main.py"),
        ("added", b"src/new"),
    ]
    assert [item.path for item in exported.withheld] == [b".envrc"]
    sandbox.do(lambda: apply_patch(exported.path, exported.digest, sandbox.workspace))
    assert (sandbox.workspace / "d" / "main.py").read_text() == "print(1)\n2\n"
    assert (sandbox.workspace / "src" / "new").stat().st_uid == sandbox.controller
    assert stat.S_IMODE((sandbox.workspace / "src" / "private.txt").stat().st_mode) & 0o077 in (0, 0o011)
    assert (sandbox.workspace / ".env").read_text() == "TOPSECRET\n"


def test_folders_that_were_removed_and_made_again_are_understood(sandbox: Sandbox) -> None:
    prepared = sandbox.prepare()
    run(prepared, "rm -rf src docs && mkdir src && echo n > src/n && echo file > docs")
    exported = sandbox.export()
    assert {(file.kind, file.path) for file in exported.files} == {
        ("deleted", b"src/main.py"),
        ("deleted", b"src/private.txt"),
        ("deleted", b"docs/a.md"),
        ("added", b"src/n"),
        ("added", b"docs"),
    }


def test_the_task_cannot_forge_the_overlays_marks(sandbox: Sandbox) -> None:
    """It sets opaque and redirect marks on a folder it did not replace, and makes whiteouts."""
    prepared = sandbox.prepare()
    told = run(
        prepared,
        "touch docs/b; python3 -c \"import os\nfor key in ('user.overlay.opaque', 'user.overlay.redirect'):\n"
        " try: os.setxattr('docs', key, b'y'); print('set', os.getxattr('docs', key))\n"
        " except OSError as e: print('refused')\n"
        "try: os.mknod('docs/a.md2', 0o020644, 0); print('whiteout made')\n"
        "except OSError as e: print('no whiteout')\"",
    )
    if "not found" in told:
        pytest.skip("the image has no python3")
    assert "whiteout made" not in told
    exported = sandbox.export()
    assert [(file.kind, file.path) for file in exported.files] == [("added", b"docs/b")]


@pytest.mark.parametrize("name", ["a:b,c d", "new\nline"])
def test_a_workspace_path_that_mount_options_cannot_carry_works(sandbox: Sandbox, name: str) -> None:
    odd = sandbox.root / name

    def prepare_odd() -> PreparedWorkspace:
        _make_project(odd)
        return prepare(odd, PATTERNS, sandbox.session)

    assert "main.py" in run(sandbox.do(prepare_odd), "ls src")


def test_names_that_are_not_utf8_work_and_are_hidden(sandbox: Sandbox) -> None:
    def add() -> None:
        for name in (b"\xff\xfe", b".env\xff", b"new\nline"):
            Path(os.fsdecode(os.fsencode(sandbox.workspace) + b"/" + name)).write_text(name.hex())

    sandbox.do(add)
    told = run(
        sandbox.prepare(), "cat \"$(printf '\\377\\376')\"; cat .env*; echo x >> \"$(printf '\\377\\376')\""
    )
    assert told.startswith(b"\xff\xfe".hex())
    assert b".env\xff".hex() not in told
    assert [file.path for file in sandbox.export().files] == [b"\xff\xfe"]


def test_random_work_in_a_container_comes_back_exactly(sandbox: Sandbox) -> None:
    """A script of random edits; the patch applied to the user's directory gives what the container saw."""
    chance = random.Random(7)  # noqa: S311  # reproducible, not secret
    lines = ["set -f"]
    for step in range(80):
        a, b = (chance.choice(["src", "docs", "x/y", "x"]) + f"/{chance.choice('abcdefg')}" for _ in "12")
        lines.append(
            chance.choice(
                [
                    f"mkdir -p $(dirname {a}); head -c {chance.randrange(5000)} /dev/urandom > {a}",
                    f"mkdir -p $(dirname {a}); echo {step} >> {a}",
                    f"rm -rf {a}",
                    f"mkdir -p $(dirname {b}); mv {a} {b}",
                    f"chmod 755 {a}",
                    f"ln -sf b {a}",
                    f"rm -rf $(dirname {a})",
                ]
            )
        )
    # What cannot be in a patch is not compared: the masks' names, and empty folders.
    listed = "find . -type f -exec sha256sum {} + | sort -k2; find . -type l -printf '%p %l\\n' | sort"
    lines.append(f"({listed}) >&3")
    told = run(sandbox.prepare(), "exec 3>&1 >/dev/null 2>/dev/null\n" + "\n".join(lines))
    exported = sandbox.export()
    assert exported.files
    sandbox.do(lambda: shutil.copytree(sandbox.workspace, sandbox.root / "copy", symlinks=True))
    sandbox.do(lambda: apply_patch(exported.path, exported.digest, sandbox.root / "copy"))
    copy = sandbox.root / "copy"
    for path in (".env", "second-name", "src/secrets"):  # not there inside
        target = copy / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    here = subprocess.run(["sh", "-c", listed], cwd=copy, capture_output=True, text=True, check=True).stdout
    assert here == told != ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for both controllers")
def test_an_ordinary_user_is_told_what_only_root_can_remove() -> None:
    """Without the second mount the engine's own remnant stays; nothing else does, and it is named."""
    root = Path(tempfile.mkdtemp(prefix="agent-runner-ws-"))
    os.chown(root, ORDINARY_UID, ORDINARY_UID)
    made = Sandbox(root, ORDINARY_UID)
    made.do(lambda: _make_project(made.workspace))
    made.prepare()
    (made.session / "work" / "work").mkdir()
    (made.session / "work" / "work" / "#1").touch()
    (made.session / "work" / "work").chmod(0)
    with pytest.raises(WorkspaceError, match=r"work.*remove it as root"):
        made.release()
    assert not (made.session / "upper").exists()
    assert (made.workspace / ".env").exists()
    with contextlib.suppress(OSError):
        (made.session / "work" / "work" / "#1").unlink()
    made.release()
    assert not list(made.session.iterdir())
    shutil.rmtree(root)


def _tree(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    found = {}
    for path in sorted(root.rglob("*")):
        entry = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(entry.st_mode) else b""
        found[str(path)] = (entry.st_mode, entry.st_uid, entry.st_mtime_ns, content)
    return found
