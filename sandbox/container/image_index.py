"""Index an image's file system once: its programs, what they are, its links. Decides nothing. D6

An image is listed from the engine's export of a container that is never started: nothing of it runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Protocol, TypeVar, cast

from blake3 import blake3

from sandbox.container.program import ELF, Kind, read_start
from sandbox.container.spec import LABEL_OWNER, LABEL_SESSION
from sandbox.errors import ImageError, StateError

T = TypeVar("T")

INDEX_VERSION = 3
INDEX_SESSION = "image-index"
CHUNK_BYTES = 1024 * 1024
MAX_LINKS = 40
SHARED_BY = 8
"""A file with this many names is many programs in one, whatever it is called."""
MULTICALL = frozenset({"busybox", "toybox", "coreutils", "uutils", "sbase-box", "ubase-box", "9base"})
BUNDLES = frozenset(
    {
        "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch, Alpine
        "/etc/ssl/cert.pem",  # Alpine
        "/etc/ssl/ca-bundle.pem",  # openSUSE
        "/var/lib/ca-certificates/ca-bundle.pem",
        "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
        "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/ca-certificates/extracted/tls-ca-bundle.pem",  # Arch
    }
)
"""Where distributions keep their roots as one PEM file; most of these are links to another of them."""
TRUSTSTORES = (
    "/etc/ssl/certs/java/cacerts",
    "/etc/pki/ca-trust/extracted/java/cacerts",
    "/lib/security/cacerts",
)
"""How the path of Java's own roots ends: the distribution's, or that of a JDK unpacked anywhere."""
APPLET = re.compile(rb"(?<=\0)[a-z0-9][a-z0-9_.+-]{0,23}(?=\0)")


class ImageSource(Protocol):
    """Reads images out of an engine; DockerRuntime is one."""

    async def read_image(
        self, image_id: str, labels: dict[str, str], consume: Callable[[Iterator[bytes]], T]
    ) -> T:
        """Pass the file system of an image, as a tar stream, to ``consume`` in a thread."""


@dataclass(frozen=True)
class ImageIndex:
    """What an image holds, as far as running programs goes. Paths are absolute, links not followed."""

    image_id: str
    programs: dict[str, str]
    """Path to blake3 of each executable file, and of each ELF file: a loader runs those without the bit."""
    links: dict[str, str]
    """Path of each symbolic link to its target, as written."""
    applets: dict[str, tuple[str, ...]]
    """Path of each multi-call binary (busybox and kin) to the words in it that may be its applets."""
    kinds: dict[str, Kind] = field(default_factory=dict)
    """Path of each of ``programs`` to what it is; what is missing counts as a program."""
    interpreters: dict[str, str] = field(default_factory=dict)
    """Path of each program that the kernel starts with another to that other: an ELF interpreter's path, or
    what follows ``#!``."""
    beside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Each directory with a program or script anywhere beneath it to the files and directories in it."""
    roots: tuple[str, ...] = ()
    """Files in which the image keeps the root certificates it trusts."""


async def index_image(source: ImageSource, image_id: str, state: Path, owner: str) -> ImageIndex:
    """Return the index of an image, from ``state/images/`` when it was indexed before.

    Raises ImageError when the image cannot be read, StateError when the index cannot be kept.
    """
    cache = state / "images" / f"{image_id.removeprefix('sha256:')}.json"
    if (known := _load(cache, image_id)) is not None:
        return known
    labels = {LABEL_SESSION: INDEX_SESSION, LABEL_OWNER: owner}

    def read(chunks: Iterator[bytes]) -> ImageIndex:
        return read_index(image_id, chunks)

    index = await source.read_image(image_id, labels, read)
    _save(cache, index)
    return index


def read_index(image_id: str, chunks: Iterator[bytes]) -> ImageIndex:
    """Index a file system given as a tar stream. Raises ImageError when it is none."""
    programs: dict[str, str] = {}
    links: dict[str, str] = {}
    applets: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, Kind] = {}
    interpreters: dict[str, str] = {}
    index = ImageIndex(image_id, programs, links, applets, kinds, interpreters)
    present: set[str] = set()
    roots = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", ChunkReader(chunks)), mode="r|") as archive:
            for member in archive:
                path = _absolute(member.name)
                if member.issym():
                    links[path] = member.linkname
                    continue
                if member.isdir() or member.isreg() or member.islnk():
                    present.add(path)
                if member.islnk():
                    # The first name of the file came before; a name for what is no program is none either.
                    original = _absolute(member.linkname)
                    if original in programs:
                        programs[path] = programs[original]
                        kinds[path] = kinds[original]
                    if original in interpreters:
                        interpreters[path] = interpreters[original]
                    if original in applets:
                        applets[path] = applets[original]
                elif member.isreg() and (content := archive.extractfile(member)) is not None:
                    _index_file(index, path, member.mode, content)
                    if path in BUNDLES or path.endswith(TRUSTSTORES):
                        roots.append(path)
    except tarfile.TarError as exc:
        raise ImageError(f"cannot index image {image_id}: its export is no tar stream ({exc})") from exc
    return replace(index, beside=_beside(present, kinds), roots=tuple(sorted(roots)))


def resolve(index: ImageIndex, path: str) -> str:
    """Follow all symbolic links of a path, as a kernel rooted in the image would; a loop gives ``""``."""
    return follow(index.links, path)


def follow(links: Mapping[str, str], path: str) -> str:
    """Follow all of these symbolic links in an absolute path; a loop gives ``""``."""
    todo = [part for part in reversed(path.split("/")) if part]
    done: list[str] = []
    followed = 0
    while todo:
        part = todo.pop()
        if part == ".":
            continue
        if part == "..":
            done = done[:-1]
            continue
        target = links.get("/" + "/".join([*done, part]))
        if target is None:
            done.append(part)
            continue
        followed += 1
        if followed > MAX_LINKS:
            return ""
        if target.startswith("/"):
            done = []
        todo += [step for step in reversed(target.split("/")) if step]
    return "/" + "/".join(done)


def many_in_one(index: ImageIndex) -> dict[str, set[str]]:
    """Return each program that is many, by path, with all its names: multi-call binaries and their like."""
    names = names_by_content(index)
    return {
        path: names[content]
        for path, content in index.programs.items()
        if path in index.applets or names[content] & MULTICALL or len(names[content]) >= SHARED_BY
    }


def names_by_content(index: ImageIndex) -> dict[str, set[str]]:
    """Every name, own or by link, under which each program can be called."""
    names: dict[str, set[str]] = defaultdict(set)
    for path, content in index.programs.items():
        names[content].add(posixpath.basename(path))
    for path in index.links:
        target = resolve(index, path)
        if target in index.programs:
            names[index.programs[target]].add(posixpath.basename(path))
    return names


def _index_file(index: ImageIndex, path: str, mode: int, content: IO[bytes]) -> None:
    head = content.read(CHUNK_BYTES)
    if not mode & 0o111 and not head.startswith(ELF):
        return
    digest = blake3(head)
    start = read_start(posixpath.basename(path), head)
    is_multicall = posixpath.basename(path) in MULTICALL or b"BusyBox v" in head
    words = set(APPLET.findall(head)) if is_multicall else set()
    tail = head[-64:]
    while chunk := content.read(CHUNK_BYTES):
        digest.update(chunk)
        if is_multicall:
            words |= set(APPLET.findall(tail + chunk))
            tail = chunk[-64:]
    index.programs[path] = digest.hexdigest()
    index.kinds[path] = start.kind
    if start.interpreter:
        index.interpreters[path] = start.interpreter
    if is_multicall:
        index.applets[path] = tuple(sorted(word.decode() for word in words))


def _beside(present: set[str], kinds: dict[str, Kind]) -> dict[str, tuple[str, ...]]:
    wanted = set()
    for path, kind in kinds.items():
        directory = path
        while kind != "library" and directory != "/":
            directory = posixpath.dirname(directory)
            wanted.add(directory)
    beside: dict[str, list[str]] = {directory: [] for directory in wanted}
    for path in sorted(present - {"/"}):
        if (directory := posixpath.dirname(path)) in wanted:
            beside[directory].append(posixpath.basename(path))
    return {directory: tuple(names) for directory, names in beside.items()}


def _absolute(name: str) -> str:
    return posixpath.normpath("/" + name.removeprefix("./").lstrip("/"))


def _load(cache: Path, image_id: str) -> ImageIndex | None:
    """Return a kept index, or None when there is none, or none that this version wrote to its end."""
    try:
        kept = json.loads(cache.read_bytes())
        if kept["version"] != INDEX_VERSION or kept["image_id"] != image_id:
            return None
        return ImageIndex(
            image_id,
            dict(kept["programs"]),
            dict(kept["links"]),
            {path: tuple(words) for path, words in kept["applets"].items()},
            dict(kept["kinds"]),
            dict(kept["interpreters"]),
            {directory: tuple(names) for directory, names in kept["beside"].items()},
            tuple(kept["roots"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # indexing again costs a second; a half-read index could leave a program unblocked


def _save(cache: Path, index: ImageIndex) -> None:
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=cache.parent, prefix=".index-")  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"version": INDEX_VERSION, **asdict(index)}, file)
            Path(temporary).replace(cache)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as exc:
        raise StateError(
            f"cannot keep the image index in {cache.parent}: {exc.strerror}; free or fix it"
        ) from exc


class ChunkReader(io.RawIOBase):
    """An iterator of chunks as a file that tarfile can stream from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        pieces, wanted = [], size
        while wanted:
            if not self._rest:
                chunk = next(self._chunks, b"")
                if not chunk:
                    break
                self._rest = memoryview(chunk)
            piece = self._rest[:wanted] if wanted > 0 else self._rest
            self._rest = self._rest[len(piece) :]
            pieces.append(piece)
            wanted -= len(piece) if wanted > 0 else 0
        return b"".join(pieces)
