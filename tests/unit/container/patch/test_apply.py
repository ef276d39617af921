"""Applying a stranger's patch to a directory that changes under the hands: nothing beyond it is touched."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.container.patch import apply as applying
from sandbox.container.patch.apply import ApplyReport, apply_patch
from sandbox.digest import digest_bytes
from sandbox.errors import WorkspaceError

CHANGE = b"""diff --git a/src/a.txt b/src/a.txt
--- a/src/a.txt
+++ b/src/a.txt
@@ -1 +1 @@
-one
+two
"""
ADD = b"""diff --git a/src/new.txt b/src/new.txt
new file mode 100644
--- /dev/null
+++ b/src/new.txt
@@ -0,0 +1 @@
+new
"""
REMOVE = b"""diff --git a/src/a.txt b/src/a.txt
deleted file mode 100644
--- a/src/a.txt
+++ /dev/null
@@ -1 +0,0 @@
-one
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    made = tmp_path / "project"
    (made / "src").mkdir(parents=True)
    (made / "src" / "a.txt").write_text("one\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("one\n")
    return made


def apply(workspace: Path, patch: bytes, **options: bool) -> ApplyReport:
    file = workspace.parent / "patch.diff"
    file.write_bytes(patch)
    return apply_patch(file, digest_bytes(patch), workspace, **options)


def outside(workspace: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (workspace.parent / "outside").iterdir()}


def when_checked(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Change something after all checks and before the first write."""
    bring: Callable[..., None] = applying._bring

    def changed(*arguments: object) -> None:
        change()
        bring(*arguments)

    monkeypatch.setattr(applying, "_bring", changed)


def swap_folder(workspace: Path) -> None:
    (workspace / "src").rename(workspace / "src.old")
    (workspace / "src").symlink_to(workspace.parent / "outside")


@pytest.mark.parametrize("patch", [CHANGE, ADD, REMOVE])
def test_a_folder_that_is_a_link_is_refused(workspace: Path, patch: bytes) -> None:
    swap_folder(workspace)
    with pytest.raises(WorkspaceError, match="symbolic link"):
        apply(workspace, patch)
    assert outside(workspace) == {"a.txt": "one\n"}


@pytest.mark.parametrize("patch", [CHANGE, ADD, REMOVE])
def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, patch: bytes
) -> None:
    when_checked(monkeypatch, lambda: swap_folder(workspace))
    with pytest.raises(WorkspaceError, match="0 of 1 paths"):
        apply(workspace, patch)
    assert outside(workspace) == {"a.txt": "one\n"}
    assert (workspace / "src.old" / "a.txt").read_text() == "one\n"


@pytest.mark.parametrize("patch", [CHANGE, ADD, REMOVE])
def test_control_without_a_link_each_of_them_is_applied(workspace: Path, patch: bytes) -> None:
    assert apply(workspace, patch).is_applied
    assert not (workspace / "src" / "a.txt").exists() or (workspace / "src").stat()
    assert {CHANGE: "two\n", ADD: "one\n", REMOVE: None}[patch] == (
        (workspace / "src" / "a.txt").read_text() if (workspace / "src" / "a.txt").exists() else None
    )
    assert not list(workspace.rglob("*.tmp"))


def test_control_a_write_by_the_path_follows_that_swap(workspace: Path) -> None:
    swap_folder(workspace)
    (workspace / "src" / "a.txt").write_text("two\n")
    assert outside(workspace) == {"a.txt": "two\n"}


@pytest.mark.parametrize("patch", [CHANGE, REMOVE])
def test_a_file_that_changes_after_the_check_is_left_as_it_is(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, patch: bytes
) -> None:
    when_checked(monkeypatch, lambda: (workspace / "src" / "a.txt").write_text("mine, by now\n"))
    with pytest.raises(WorkspaceError, match="changed while it was applied"):
        apply(workspace, patch)
    assert (workspace / "src" / "a.txt").read_text() == "mine, by now\n"


def test_a_link_at_the_file_itself_is_not_written_through(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = workspace / "src" / "a.txt"

    def swap() -> None:
        target.unlink()
        target.symlink_to(workspace.parent / "outside" / "a.txt")

    when_checked(monkeypatch, swap)
    with pytest.raises(WorkspaceError, match="changed while"):
        apply(workspace, CHANGE)
    assert outside(workspace) == {"a.txt": "one\n"}


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("patch", [CHANGE, ADD, REMOVE])
def test_a_special_file_is_neither_opened_nor_replaced(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, patch: bytes, is_late: bool
) -> None:
    target = workspace / "src" / ("new.txt" if patch is ADD else "a.txt")

    def place_fifo() -> None:
        target.unlink(missing_ok=True)
        os.mkfifo(target)

    if is_late:
        when_checked(monkeypatch, place_fifo)
    else:
        place_fifo()
    with pytest.raises(WorkspaceError, match="FIFO"):
        apply(workspace, patch)
    assert stat.S_ISFIFO(target.lstat().st_mode)


def test_set_id_bits_never_come_with_a_patch_and_do_not_stay_on_a_changed_file(workspace: Path) -> None:
    (workspace / "src" / "a.txt").chmod(0o6755)
    apply(workspace, ADD.replace(b"100644", b"104755"))
    assert stat.S_IMODE((workspace / "src" / "new.txt").stat().st_mode) & 0o7000 == 0
    apply(workspace, CHANGE)
    assert stat.S_IMODE((workspace / "src" / "a.txt").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "path", [b"../outside/new.txt", b"/tmp/new.txt", b"src/../../outside/new.txt", b".git/x"]
)
def test_a_path_that_leaves_or_is_a_repositorys_own_is_refused(workspace: Path, path: bytes) -> None:
    with pytest.raises(WorkspaceError):
        apply(workspace, ADD.replace(b"src/new.txt", path), allow_executable_paths=True)
    assert outside(workspace) == {"a.txt": "one\n"}


def test_a_second_name_of_a_changed_file_keeps_its_content(workspace: Path) -> None:
    """A hard link in the user's directory leads to a file elsewhere: that one is not written."""
    os.link(workspace / "src" / "a.txt", workspace.parent / "outside" / "linked.txt")
    apply(workspace, CHANGE)
    assert outside(workspace)["linked.txt"] == "one\n"
    assert (workspace / "src" / "a.txt").read_text() == "two\n"


def test_a_check_writes_nothing_and_gits_configuration_does_not_count(workspace: Path) -> None:
    subprocess.run(["git", "init", "-q", str(workspace)], check=True)
    (workspace / ".gitattributes").write_text("* filter=evil text eol=crlf\n")
    with (workspace / ".git" / "config").open("a") as config:
        config.write(f'[filter "evil"]\n smudge = touch {workspace.parent}/owned\n')
    assert not apply(workspace, CHANGE, is_check_only=True).is_applied
    assert (workspace / "src" / "a.txt").read_text() == "one\n"
    apply(workspace, CHANGE)
    assert (workspace / "src" / "a.txt").read_bytes() == b"two\n"
    assert not (workspace.parent / "owned").exists()
