"""``agent-runner apply``: every way to name a session, every option, and everything it refuses."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sandbox.cli.apply import command
from sandbox.digest import digest_bytes
from sandbox.provenance.keys import signing_key
from sandbox.provenance.statement import seal_session
from tests.unit.provenance.recorded import PATCH, SESSION, events, write_ledger

HOOK = (
    b"diff --git a/.envrc b/.envrc\nnew file mode 100644\n"
    b"index 0000000000000000000000000000000000000000..78981922613b2afb6025042ff6bd878ac1994e85\n"
    b"--- /dev/null\n+++ b/.envrc\n@@ -0,0 +1 @@\n+a\n"
)
OLDER = "20261121-000000-000000"


class World:
    """A state directory, a workspace that the recorded patch fits, and the command line."""

    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.workspace = root / "project"
        self.file = self.workspace / "src" / "sum.py"
        self.file.parent.mkdir(parents=True)
        self.file.write_text("a-b\n")

    def record(
        self, session: str = SESSION, patch: bytes | None = PATCH, workspace: str | None = None
    ) -> Path:
        """Record and seal a session as a run does; ``patch=None``: none could be made."""
        directory = self.state / "sessions" / session
        directory.mkdir(parents=True)
        all_events = events(session, patch=patch or b"")
        if patch is None:
            all_events = [event for event in all_events if event.type != "PatchExported"]
        else:
            (directory / "patch.diff").write_bytes(patch)
        ledger = write_ledger(directory / "ledger.jsonl", all_events)
        digest = digest_bytes(patch or b"")
        told = {"path": "/elsewhere/patch.diff", "blake3": digest.blake3, "sha256": digest.sha256, "files": 1}
        result = {
            "session": session,
            "status": "completed",
            "workspace": workspace or str(self.workspace),
            "patch": None if patch is None else told | {"withheld": []},
            "ledger": {"head": ledger.head, "entries": ledger.entries},
        }
        (directory / "result.json").write_text(json.dumps(result))
        seal_session(
            directory, signing_key(self.state), head=ledger.head, entries=ledger.entries, runner_version="1"
        )
        return directory

    def refused(self, *arguments: str | Path, code: int = 3) -> str:
        """Expect a refusal in one line that leaves every file as it is; return the line."""
        before = self.files()
        result = apply(*arguments)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert self.files() == before
        assert result.stderr.startswith("agent-runner: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.workspace.parent.rglob("*") if path.is_file()}

    @property
    def is_applied(self) -> bool:
        return self.file.read_text() == "a+b\n"


def apply(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setenv("AGENT_RUNNER_STATE", str(made.state))
    return made


@pytest.mark.parametrize("reference", [SESSION, "20261122", "latest"])
def test_a_session_is_named_by_id_by_beginning_and_as_latest(world: World, reference: str) -> None:
    world.record(OLDER, HOOK)
    world.record()
    result = apply(reference)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"applied to {world.workspace}: 1 files\n  modified src/sum.py\n"
    assert world.is_applied


def test_no_or_an_ambiguous_session_is_the_callers_mistake(world: World) -> None:
    assert "there are none" in world.refused("latest", code=2)
    world.record(OLDER)
    world.record()
    assert "is not unique" in world.refused("202611", code=2)
    assert "no session '1999'" in world.refused("1999", code=2)
    assert "no session '../../x'" in world.refused("../../x", code=2)


def test_another_workspace_can_be_named(world: World, tmp_path: Path) -> None:
    world.record()
    copy = tmp_path / "copy"
    shutil.copytree(world.workspace, copy)
    assert apply("latest", "--workspace", copy).exit_code == 0
    assert (copy / "src" / "sum.py").read_text() == "a+b\n"
    assert not world.is_applied


def test_a_check_says_what_would_happen_and_does_nothing(world: World) -> None:
    world.record()
    before = world.files()
    result = apply("latest", "--check")
    assert (result.exit_code, world.files()) == (0, before)
    assert result.stdout.startswith(f"would apply to {world.workspace}: 1 files")
    world.file.write_text("something else\n")
    assert "does not fit" in world.refused("latest", "--check")


def test_paths_that_run_code_need_a_yes(world: World) -> None:
    world.record(patch=PATCH + HOOK)
    said = world.refused("latest")
    assert ".envrc (a shell or debugger runs it" in said
    assert "--allow-executable-paths" in said
    assert "refusing to apply 1 paths" in world.refused("latest", "--check")
    result = apply("latest", "--allow-executable-paths")
    assert result.exit_code == 0
    assert "added    .envrc  ! a shell or debugger runs it" in result.stdout
    assert (world.workspace / ".envrc").read_text() == "a\n"
    assert world.is_applied


def test_a_workspace_that_changed_is_left_alone_as_a_whole(world: World) -> None:
    added = HOOK.replace(b".envrc", b"new")
    world.record(patch=added + PATCH)
    world.file.write_text("changed\n")
    assert "does not fit: error: patch failed: src/sum.py:1" in world.refused("latest")
    assert not (world.workspace / "new").exists()


def test_applying_twice_is_refused(world: World) -> None:
    world.record()
    assert apply("latest").exit_code == 0
    assert "was it applied already?" in world.refused("latest")


@pytest.mark.parametrize("where", ["no repository", "a repository", "a folder of a repository"])
def test_paths_count_from_the_workspace_and_no_repository_plays_a_part(world: World, where: str) -> None:
    top = {"no repository": None, "a repository": world.workspace}.get(where, world.workspace.parent)
    ran = world.state / "ran"
    if top is not None:
        git = ["git", "-C", str(top)]
        subprocess.run([*git, "init", "-q"], check=True)
        for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.smudge", "core.hooksPath"):
            subprocess.run([*git, "config", key, f"touch {ran}; cat"], check=True)
        (top / ".gitattributes").write_text("* filter=evil text eol=crlf working-tree-encoding=UTF-16\n")
    world.record()
    assert apply("latest").exit_code == 0
    assert world.is_applied
    assert not ran.exists()


@pytest.mark.parametrize("name", ["patch.diff", "result.json", "ledger.jsonl", "statement.json"])
def test_a_record_that_was_tampered_with_is_not_applied(world: World, name: str) -> None:
    target = world.record() / name
    target.write_bytes(target.read_bytes()[:-2] + b" \n")
    assert "its record does not hold" in world.refused("latest")


def test_patch_and_result_changed_together_are_not_applied(world: World) -> None:
    """The result alone would vouch for any patch; the signed statement does not."""
    directory = world.record()
    forged = PATCH.replace(b"+a+b", b"+a*b")
    result = json.loads((directory / "result.json").read_text())
    digest = digest_bytes(forged)
    result["patch"] |= {"blake3": digest.blake3, "sha256": digest.sha256}
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "patch.diff").write_bytes(forged)
    assert "its record does not hold" in world.refused("latest")


def test_a_result_that_names_another_workspace_is_not_followed(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.workspace, other)
    directory = world.record()
    text = (directory / "result.json").read_text()
    (directory / "result.json").write_text(text.replace(str(world.workspace), str(other)))
    assert "its record does not hold" in world.refused("latest")


def test_a_session_without_a_result_is_not_applied(world: World) -> None:
    (world.record() / "result.json").unlink()
    assert "it has no result; it is running, or was killed" in world.refused("latest")


def test_a_session_whose_patch_is_gone_is_not_applied(world: World) -> None:
    (world.record() / "patch.diff").unlink()
    assert "its record does not hold" in world.refused("latest")


def test_a_session_that_made_no_patch_says_so(world: World) -> None:
    world.record(patch=None)
    assert "it made no patch" in world.refused("latest")


def test_an_empty_patch_is_nothing_to_do(world: World) -> None:
    world.record(patch=b"")
    result = apply("latest")
    assert (result.exit_code, result.stdout) == (0, "nothing to apply: the session changed no file\n")


def test_a_workspace_that_is_gone_or_no_directory_is_named(world: World, tmp_path: Path) -> None:
    world.record()
    world.workspace.rename(tmp_path / "moved")
    assert str(world.workspace) in world.refused("latest")
    assert apply("latest", "--workspace", tmp_path / "moved").exit_code == 0
    (tmp_path / "file").write_text("")
    assert apply("latest", "--workspace", tmp_path / "file").exit_code == 2


def test_a_patch_file_that_became_a_link_is_not_followed(world: World, tmp_path: Path) -> None:
    patch = world.record() / "patch.diff"
    shutil.move(patch, tmp_path / "kept.diff")
    patch.symlink_to(tmp_path / "kept.diff")
    assert "its record does not hold" in world.refused("latest")


@pytest.mark.parametrize("make", ["file", "folder"])
def test_nothing_is_written_through_a_link(world: World, tmp_path: Path, make: str) -> None:
    world.record()
    outside = tmp_path / "outside"
    if make == "folder":
        shutil.move(world.file.parent, outside)
        world.file.parent.symlink_to(outside)
        target = outside / "sum.py"
    else:
        shutil.move(world.file, outside)
        world.file.symlink_to(outside)
        target = outside
    world.refused("latest")
    assert target.read_text() == "a-b\n"


@pytest.mark.parametrize("path", [b"../evil", b"/tmp/evil", b".git/hooks/pre-commit", b"src/../../evil"])
def test_paths_outside_are_refused_even_with_a_yes(world: World, path: bytes) -> None:
    world.record(patch=HOOK.replace(b".envrc", path))
    world.refused("latest", "--allow-executable-paths")
    assert not (world.workspace.parent / "evil").exists()


def test_a_private_file_stays_private(world: World) -> None:
    world.record()
    world.file.chmod(0o600)
    os.umask(0o022)
    assert apply("latest").exit_code == 0
    assert stat.S_IMODE(world.file.stat().st_mode) == 0o600


def test_names_in_the_patch_do_not_reach_the_terminal(world: World) -> None:
    name = b'"%s/\\033[2J\\342\\200\\256\\napplied"'
    patch = HOOK.replace(b"a/.envrc b/.envrc", name % b"a" + b" " + name % b"b")
    world.record(patch=patch.replace(b"+++ b/.envrc", b"+++ " + name % b"b"))
    result = apply("latest")
    assert result.exit_code == 0, result.stderr
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    assert result.stdout.count("\n") == 2


def test_a_swap_of_the_workspace_after_the_check_is_not_followed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is written, wherever its name leads by then."""
    import sandbox.container.patch.apply as applying

    world.record()
    moved, target = tmp_path / "moved", tmp_path / "target"
    shutil.copytree(world.workspace, target)
    bring: Callable[..., None] = applying._bring

    def swap(*arguments: object) -> None:
        world.workspace.rename(moved)
        world.workspace.symlink_to(target)
        bring(*arguments)

    monkeypatch.setattr(applying, "_bring", swap)
    assert apply("latest").exit_code == 0
    assert (target / "src" / "sum.py").read_text() == "a-b\n"
    assert (moved / "src" / "sum.py").read_text() == "a+b\n"
