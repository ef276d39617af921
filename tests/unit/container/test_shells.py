"""The image's own shells, set aside for those that ask: one folder for each choice of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.shells import replace_shells
from sandbox.container.spec import Image
from sandbox.errors import ImageError
from tests.unit.container.test_image import ID, Tree


class Source:
    """An engine that has one image."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.reads = 0

    async def read_image(
        self, image_id: str, labels: dict[str, str], consume: Callable[[Iterator[bytes]], Any]
    ) -> Any:
        self.reads += 1
        tree = Tree()
        for name, content in self.files.items():
            tree.file(f"usr/bin/{name}", content)
        return consume(tree.symlink("bin", "usr/bin").symlink("usr/bin/sh", "dash").chunks())


async def replace(source: Source, state: Path, *blocked: str) -> tuple[tuple[str, ...], Path]:
    image = Image("x", ID, blocked, "/refused", "/bin/sh")
    shells = (await replace_shells(source, image, "/asking", state, "me")).asking_shells
    assert shells is not None
    return shells.paths, Path(shells.originals)


def files(directory: Path) -> dict[str, bytes]:
    return {
        f"/{path.relative_to(directory)}": path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


async def test_a_shell_that_one_policy_blocks_is_not_where_another_kept_it(tmp_path: Path) -> None:
    source = Source(bash=b"bash", dash=b"dash")
    everything = await replace(source, tmp_path)
    assert files(everything[1]) == {"/usr/bin/bash": b"bash", "/usr/bin/dash": b"dash"}
    without = await replace(source, tmp_path, "/usr/bin/bash")
    assert files(without[1]) == {"/usr/bin/dash": b"dash"}
    # Both may be mounted at the same time.
    assert files(everything[1]) == {"/usr/bin/bash": b"bash", "/usr/bin/dash": b"dash"}


async def test_the_image_is_read_once_for_each_choice(tmp_path: Path) -> None:
    source = Source(bash=b"bash", dash=b"dash")
    first = await replace(source, tmp_path)
    assert source.reads == 2  # its index, and its shells
    assert await replace(source, tmp_path) == first
    assert source.reads == 2


async def test_a_folder_that_lost_a_shell_gets_it_back_and_keeps_what_is_mounted(tmp_path: Path) -> None:
    source = Source(bash=b"bash", dash=b"dash")
    _, directory = await replace(source, tmp_path)
    mounted = (directory / "usr/bin/dash").stat().st_ino
    (directory / "usr/bin/bash").unlink()
    assert await replace(source, tmp_path) == (("/usr/bin/bash", "/usr/bin/dash"), directory)
    assert files(directory) == {"/usr/bin/bash": b"bash", "/usr/bin/dash": b"dash"}
    assert (directory / "usr/bin/dash").stat().st_ino == mounted


async def test_a_shell_that_is_busybox_is_refused(tmp_path: Path) -> None:
    source = Source(dash=b"BusyBox v1\0sh\0wget\0")
    with pytest.raises(ImageError, match=r"cannot put a shell that asks in the place of /bin/sh"):
        await replace(source, tmp_path)
