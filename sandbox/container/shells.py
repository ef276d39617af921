"""The shells of an image, taken aside so that one that asks first can stand in their place. D6

Their files are read from the engine's export of the image; nothing of it runs. They are kept beside the
image's index, so that this is done once.
"""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from sandbox.container.image_index import (
    INDEX_SESSION,
    ChunkReader,
    ImageIndex,
    ImageSource,
    index_image,
    resolve,
)
from sandbox.container.spec import LABEL_OWNER, LABEL_SESSION, SHELLS, AskingShells, Image
from sandbox.digest import digest_json
from sandbox.errors import ImageError, StateError

NAMES = ("sh", "bash", "rbash", "dash", "ash", "ksh", "mksh", "zsh", "yash", "posh")
DIRECTORIES = ("/bin", "/usr/bin", "/usr/local/bin")


def shell_paths(index: ImageIndex, covered: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the files behind every name of a shell, less those that are covered already.

    Raises ImageError when a shell is part of a program with other uses (busybox), which would go with it.
    """
    found = set()
    for directory in DIRECTORIES:
        for name in NAMES:
            target = resolve(index, f"{directory}/{name}")
            if target not in index.programs or target in covered:
                continue
            if target in index.applets or posixpath.basename(target) not in NAMES:
                raise ImageError(
                    f"cannot put a shell that asks in the place of {directory}/{name}: it is {target}, which "
                    "is other programs as well; use an image with a shell of its own, or drop shell.agents"
                )
            found.add(target)
    return tuple(sorted(found))


async def replace_shells(
    source: ImageSource, image: Image, asking_binary: str, state: Path, owner: str
) -> Image:
    """Return the image with shells that ask in the place of its own, which are copied out of it, once.

    Raises ImageError and StateError.
    """
    index = await index_image(source, image.image_id, state, owner)
    paths = shell_paths(index, image.blocked_paths)
    # One folder for each choice: it is mounted whole, and must hold no shell that this policy blocks.
    choice = digest_json(paths).blake3[:16]
    directory = state / "images" / f"{index.image_id.removeprefix('sha256:')}.shells-{choice}"
    if not all((directory / path.lstrip("/")).is_file() for path in paths):

        def read(chunks: Iterator[bytes]) -> None:
            _copy(index.image_id, chunks, set(paths), directory)

        await source.read_image(index.image_id, {LABEL_SESSION: INDEX_SESSION, LABEL_OWNER: owner}, read)
    original = SHELLS + resolve(index, image.shell)
    return replace(image, asking_shells=AskingShells(asking_binary, paths, str(directory), original))


def _copy(image_id: str, chunks: Iterator[bytes], wanted: set[str], directory: Path) -> None:
    """All or nothing: the folder appears under its name when every file is in it."""
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".shells-") as temporary:
            made = Path(temporary, "shells")
            made.mkdir(mode=0o755)
            missing = _extract(chunks, wanted, made)
            if missing:
                raise ImageError(
                    f"cannot copy {', '.join(sorted(missing))} out of image {image_id}: not in its export"
                )
            _settle(made, directory)
    except tarfile.TarError as exc:
        raise ImageError(f"cannot read image {image_id}: its export is no tar stream ({exc})") from exc
    except OSError as exc:
        raise StateError(
            f"cannot keep the shells of image {image_id} in {directory}: {exc.strerror}; free or fix it"
        ) from exc


def _settle(made: Path, directory: Path) -> None:
    """Give the folder its name. One that is there already may be mounted in a container: it stays."""
    try:
        made.rename(directory)
    except OSError as exc:
        if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another session was faster, or somebody took files out of it: those are put back, one by one.
        for file in sorted(made.rglob("*")):
            there = directory / file.relative_to(made)
            if file.is_file() and not there.is_file():
                there.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                file.rename(there)


def _extract(chunks: Iterator[bytes], wanted: set[str], made: Path) -> set[str]:
    """Write the wanted files; return those that are not in the stream."""
    missing = set(wanted)
    with tarfile.open(fileobj=cast("IO[bytes]", ChunkReader(chunks)), mode="r|") as archive:
        for member in archive:
            path = posixpath.normpath("/" + member.name.removeprefix("./").lstrip("/"))
            if path not in missing or not member.isreg():
                continue
            content = archive.extractfile(member)
            if content is None:
                continue
            target = made / path.lstrip("/")
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o755)
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(content, file)
            missing.discard(path)
    return missing
