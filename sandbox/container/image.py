"""Find an image, index its file system once, and say where it keeps the programs that a policy blocks. D6

An image is listed from the engine's export of a container that is never started: nothing of it runs.
What cannot be blocked without blocking other programs is refused, not half done.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar, cast

from blake3 import blake3

from sandbox.container.runtime import Runtime
from sandbox.container.spec import LABEL_OWNER, LABEL_SESSION, Image
from sandbox.errors import ImageError, StateError

T = TypeVar("T")

DEFAULT_IMAGE = "agent-runner/base:latest"
INDEX_VERSION = 2
INDEX_SESSION = "image-index"
CHUNK_BYTES = 1024 * 1024
MAX_LINKS = 40
SHARED_BY = 8
"""A file with this many names is many programs in one, whatever it is called."""
MULTICALL = frozenset({"busybox", "toybox", "coreutils", "uutils", "sbase-box", "ubase-box", "9base"})
SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh", "/usr/bin/sh")
VERSION = re.compile(r"(-?[0-9]+\.[0-9][0-9.]*|-[0-9]+|(?<=[0-9])\.[0-9][0-9.]*)(-[a-z][a-z0-9_-]*)?")
"""What follows a program's name in that of another build: a version, perhaps a platform. The ``2`` of
``bzip2`` is none: it is part of the name."""
APPLET = re.compile(rb"(?<=\0)[a-z0-9][a-z0-9_.+-]{0,23}(?=\0)")

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
    roots: tuple[str, ...] = ()
    """Files in which the image keeps the root certificates it trusts."""


async def find_image(runtime: Runtime, reference: str = DEFAULT_IMAGE) -> str:
    """Return the id of an image on this machine. Raises ImageError with the way to get it."""
    try:
        return await runtime.image_id(reference)
    except ImageError as exc:
        remedy = "run make dev" if reference == DEFAULT_IMAGE else f"run docker pull {reference}, or build it"
        raise ImageError(f"cannot use image {reference}: it is not on this machine; {remedy}") from exc


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
    roots = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", ChunkReader(chunks)), mode="r|") as archive:
            for member in archive:
                path = _absolute(member.name)
                if member.issym():
                    links[path] = member.linkname
                elif member.islnk():
                    # The first name of the file came before; a name for what is no program is none either.
                    original = _absolute(member.linkname)
                    if original in programs:
                        programs[path] = programs[original]
                    if original in applets:
                        applets[path] = applets[original]
                elif member.isreg() and (content := archive.extractfile(member)) is not None:
                    _index_file(path, member.mode, content, programs, applets)
                    if path in BUNDLES or path.endswith(TRUSTSTORES):
                        roots.append(path)
    except tarfile.TarError as exc:
        raise ImageError(f"cannot index image {image_id}: its export is no tar stream ({exc})") from exc
    return ImageIndex(image_id, programs, links, applets, tuple(sorted(roots)))


def blocked_paths(
    index: ImageIndex, blocked_commands: tuple[str, ...], allowed_binaries: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return every path that must be covered so that no blocked program is left under any name.

    These are: files of a blocked name anywhere in the image, what links of a blocked name lead to, all
    files with the same content, and other builds of the program that carry its name with a version
    (``perl5.36-x86_64-linux-gnu``), but for those that are allowed. A name that is not in the image needs
    nothing. Raises ImageError when covering a path would take programs along that nobody blocked.
    """
    blocked = {posixpath.basename(name) for name in blocked_commands}
    names = _names_by_content(index)
    paths_by_content = defaultdict(set)
    for path, content in index.programs.items():
        paths_by_content[content].add(path)

    covered: set[str] = set()
    for path in (*index.programs, *index.links):
        name = posixpath.basename(path)
        if name not in blocked or (target := resolve(index, path)) not in index.programs:
            continue
        content = index.programs[target]
        _check_shared(index, name, target, names[content], blocked, set(allowed_binaries))
        covered |= paths_by_content[content]
    for path, content in index.programs.items():
        if _is_version_of(posixpath.basename(path), blocked) and not names[content] & set(allowed_binaries):
            covered |= paths_by_content[content]

    for path, words in index.applets.items():
        # ``busybox rm`` needs no link called rm.
        if path not in covered and (hidden := sorted(blocked & set(words))):
            raise ImageError(
                f"cannot block {', '.join(hidden)} in image {index.image_id}: {path} has it as an applet; "
                f"block {posixpath.basename(path)} too, or use an image without it"
            )
    return tuple(sorted(covered))


def find_shell(index: ImageIndex, covered: tuple[str, ...] = ()) -> str:
    """Return the shell that runs command lines, bash before sh; never one that is covered.

    Raises ImageError when there is none: without a shell nothing the agent may ask for could be run.
    """
    for path in SHELLS:
        target = resolve(index, path)
        if target in index.programs and target not in covered:
            return path
    raise ImageError(
        f"cannot run commands in image {index.image_id}: it has no shell that is not blocked; "
        "use an image with bash or sh, or take it off shell.blocked_commands"
    )


async def prepare_image(
    runtime: Runtime,
    source: ImageSource,
    reference: str,
    *,
    blocked_commands: tuple[str, ...],
    allowed_binaries: tuple[str, ...],
    refusal_binary: str,
    state: Path,
    owner: str,
) -> Image:
    """Find an image, its shell, and everything in it that must be covered."""
    image_id = await find_image(runtime, reference)
    index = await index_image(source, image_id, state, owner)
    paths = blocked_paths(index, blocked_commands, allowed_binaries)
    return Image(
        reference,
        image_id,
        paths,
        refusal_binary,
        find_shell(index, paths),
        bundles=tuple(path for path in index.roots if path in BUNDLES),
        truststores=tuple(path for path in index.roots if path not in BUNDLES),
    )


def resolve(index: ImageIndex, path: str) -> str:
    """Follow all symbolic links of a path, as a kernel rooted in the image would; a loop gives ``""``."""
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
        target = index.links.get("/" + "/".join([*done, part]))
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


def _check_shared(
    index: ImageIndex, name: str, target: str, names: set[str], blocked: set[str], allowed: set[str]
) -> None:
    """Refuse when the program behind ``name`` is also others that nobody blocked."""
    program = posixpath.basename(target)
    others = names - blocked
    is_many_in_one = program in MULTICALL or len(names) >= SHARED_BY
    if program not in blocked and is_many_in_one and others:
        raise ImageError(
            f"cannot block {name} in image {index.image_id}: it is {target}, which has {len(names)} names; "
            f"block {program} as well, or use an image with a {name} of its own"
        )
    if taken_along := sorted(others & allowed):
        raise ImageError(
            f"cannot block {name} in image {index.image_id}: {target} is also {', '.join(taken_along)}, "
            "which shell.allowed_binaries lists; drop one of them"
        )


def _is_version_of(name: str, blocked: set[str]) -> bool:
    return any(name.startswith(known) and VERSION.fullmatch(name, len(known)) for known in blocked if known)


def _names_by_content(index: ImageIndex) -> dict[str, set[str]]:
    """Every name, own or by link, under which each program can be called."""
    names: dict[str, set[str]] = defaultdict(set)
    for path, content in index.programs.items():
        names[content].add(posixpath.basename(path))
    for path in index.links:
        target = resolve(index, path)
        if target in index.programs:
            names[index.programs[target]].add(posixpath.basename(path))
    return names


def _index_file(
    path: str, mode: int, content: IO[bytes], programs: dict[str, str], applets: dict[str, tuple[str, ...]]
) -> None:
    head = content.read(CHUNK_BYTES)
    if not mode & 0o111 and not head.startswith(b"\x7fELF"):
        return
    digest = blake3(head)
    is_multicall = posixpath.basename(path) in MULTICALL or b"BusyBox v" in head
    words = set(APPLET.findall(head)) if is_multicall else set()
    tail = head[-64:]
    while chunk := content.read(CHUNK_BYTES):
        digest.update(chunk)
        if is_multicall:
            words |= set(APPLET.findall(tail + chunk))
            tail = chunk[-64:]
    programs[path] = digest.hexdigest()
    if is_multicall:
        applets[path] = tuple(sorted(word.decode() for word in words))


def _absolute(name: str) -> str:
    return posixpath.normpath("/" + name.removeprefix("./").lstrip("/"))


def _load(cache: Path, image_id: str) -> ImageIndex | None:
    """Return a kept index, or None when there is none, or none that this version wrote to its end."""
    try:
        kept = json.loads(cache.read_bytes())
        if kept["version"] != INDEX_VERSION or kept["image_id"] != image_id:
            return None
        applets = {path: tuple(words) for path, words in kept["applets"].items()}
        roots = tuple(kept["roots"])
        return ImageIndex(image_id, dict(kept["programs"]), dict(kept["links"]), applets, roots)
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
