"""Adding up a tree whose owner does not want it added up."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.container.workspace.beneath import opened_root, remove_beneath
from sandbox.container.workspace.usage import TreeTooDeep, measure_tree

MIB = 1024 * 1024


def measure(top: Path, stop_bytes: int = 1 << 40, stop_files: int = 1 << 30) -> tuple[int, int]:
    with opened_root(top) as root:
        return measure_tree(root, stop_bytes=stop_bytes, stop_files=stop_files)


def nest(top: Path, levels: int, name: str, *, has_siblings: bool = False) -> None:
    """Make folders deeper than any path can name, with a file at the bottom."""
    at = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=at)
        if has_siblings:  # what is still to be visited keeps every level open
            os.mkdir("sibling", dir_fd=at)
            os.mkdir("another", dir_fd=at)
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    with open(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=at), "wb") as file:
        file.write(bytes(MIB))
    os.close(at)


def clear(top: Path) -> None:
    """Remove what pytest could not: it is too deep for it."""
    with opened_root(top) as root:
        for name in os.listdir(root):
            remove_beneath(root, name.encode())


def test_bytes_on_disk_and_entries_are_counted_and_no_link_is_followed(tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(bytes(8 * MIB))
    (top / "folder").mkdir(parents=True)
    (top / "folder" / "file").write_bytes(bytes(MIB))
    os.link(top / "folder" / "file", top / "second-name")
    os.symlink(outside, top / "link")
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    used, files = measure(top)
    assert MIB <= used < 2 * MIB
    assert files == 5


def test_what_lies_deeper_than_a_path_can_name_is_counted(tmp_path: Path) -> None:
    nest(tmp_path, 4000, "d")
    try:
        used, files = measure(tmp_path)
    finally:
        clear(tmp_path)
    assert used >= MIB
    assert files == 4001


def test_a_tree_that_cannot_be_walked_is_said_to_be_one_and_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    nest(tmp_path, 3000, "d" * 255, has_siblings=True)
    try:
        with pytest.raises(TreeTooDeep, match="nested"):
            measure(tmp_path)
    finally:
        clear(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_walk_stops_at_either_bound(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / str(number)).write_bytes(b"x")
    assert measure(tmp_path, stop_files=10)[1] == 11
    (tmp_path / "folder").mkdir()
    assert measure(tmp_path, stop_bytes=0)[0] > 0


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that an ordinary user gets to."""
    made = Path(tempfile.mkdtemp(prefix="agent-runner-usage-"))
    yield made
    shutil.rmtree(made)


def test_a_locked_folder_is_counted_and_stays_locked(open_to_all: Path) -> None:
    """Root passes every folder: the same as an ordinary user, in a child."""
    tmp_path = open_to_all
    (tmp_path / "locked" / "inner").mkdir(parents=True)
    (tmp_path / "locked" / "inner" / "file").write_bytes(bytes(MIB))
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 1000, 1000)
        tmp_path.chmod(0o755)
    for path in (tmp_path / "locked" / "inner", tmp_path / "locked"):
        path.chmod(0)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setresuid(1000, 1000, 1000)
            os.write(writer, repr(measure(tmp_path)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    used, files = eval(os.read(reader, 100))  # noqa: S307  # our own child
    os.close(reader)
    assert (used >= MIB, files) == (True, 3)
    assert (tmp_path / "locked").stat().st_mode & 0o777 == 0
    (tmp_path / "locked").chmod(0o700)
    (tmp_path / "locked" / "inner").chmod(0o700)
