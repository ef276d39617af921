"""Find an image, and say where it keeps the programs that a policy blocks and those it lists. D6

What cannot be blocked without blocking other programs is refused, not half done.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from pathlib import Path

from sandbox.container.closed_shell import close_shell
from sandbox.container.image_index import (
    BUNDLES,
    MULTICALL,
    SHARED_BY,
    ImageIndex,
    ImageSource,
    index_image,
    names_by_content,
    resolve,
)
from sandbox.container.runtime import Runtime
from sandbox.container.spec import Image
from sandbox.errors import ImageError
from sandbox.policy.model import ShellPolicy

DEFAULT_IMAGE = "agent-runner/base:latest"
SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh", "/usr/bin/sh")
VERSION = re.compile(r"(-?[0-9]+\.[0-9][0-9.]*|-[0-9]+|(?<=[0-9])\.[0-9][0-9.]*)(-[a-z][a-z0-9_-]*)?")
"""What follows a program's name in that of another build: a version, perhaps a platform. The ``2`` of
``bzip2`` is none: it is part of the name."""


async def find_image(runtime: Runtime, reference: str = DEFAULT_IMAGE) -> str:
    """Return the id of an image on this machine. Raises ImageError with the way to get it."""
    try:
        return await runtime.image_id(reference)
    except ImageError as exc:
        remedy = "run make dev" if reference == DEFAULT_IMAGE else f"run docker pull {reference}, or build it"
        raise ImageError(f"cannot use image {reference}: it is not on this machine; {remedy}") from exc


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
    names = names_by_content(index)
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
    shell: ShellPolicy,
    *,
    refusal_binary: str,
    state: Path,
    owner: str,
) -> Image:
    """Find an image, its shell, what in it must be covered and, for a closed shell, what may run."""
    image_id = await find_image(runtime, reference)
    index = await index_image(source, image_id, state, owner)
    paths = blocked_paths(index, shell.blocked_commands, shell.allowed_binaries)
    command_shell = find_shell(index, paths)
    closed = close_shell(index, shell, command_shell, paths) if shell.mode == "closed" else None
    return Image(
        reference,
        image_id,
        paths,
        refusal_binary,
        command_shell,
        closed=closed,
        bundles=tuple(path for path in index.roots if path in BUNDLES),
        truststores=tuple(path for path in index.roots if path not in BUNDLES),
    )


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
