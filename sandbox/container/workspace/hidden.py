"""Find what the mask must cover, from names alone: the part of the walk that a session waits for. D4

A hundred thousand names take a tenth of a second, their metadata four times that: so this pass reads
directories only, and ``survey`` reads the rest while the engine starts the container.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from sandbox.container.workspace.mounts import list_mounts_beneath
from sandbox.errors import WorkspaceError
from sandbox.policy.paths import DenyPatterns

_SPECIAL = {
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass
class Hidden:
    """What is not to exist inside. Paths are bytes, relative to the workspace."""

    root: os.stat_result
    paths: set[bytes] = field(default_factory=set)
    """Topmost hidden paths: each needs one whiteout."""
    leading: dict[bytes, os.stat_result] = field(default_factory=dict)
    """The directories on the way to hidden paths, the root included; the mask must look like them."""


def find_hidden(workspace: bytes, patterns: DenyPatterns) -> Hidden:
    """Walk a resolved, absolute directory, following no link.

    A second name (hard link) of a hidden file is hidden with it. Raises WorkspaceError, naming the first
    path and the count, for what an overlay cannot show right: special files, mounts beneath. What a
    pattern hides is never a reason to refuse.
    """
    _refuse_mounts(workspace, patterns)
    try:
        hidden = Hidden(os.stat(workspace))
    except OSError as exc:
        raise unlistable(workspace, exc) from exc
    special: list[bytes] = []
    for parent, entries in _walk(workspace):
        prefix = parent + b"/" if parent else b""
        found = patterns.match_names(parent, [entry.name for entry in entries])
        hidden.paths.update(prefix + name for name in found)
        entries[:] = [entry for entry in entries if entry.name not in found] if found else entries
        special += [prefix + entry.name for entry in entries if not _is_plain(entry)]
    _refuse_special(workspace, special)
    hidden.paths |= _find_second_names(workspace, hidden.paths)
    for path in hidden.paths:
        while path:
            path = path.rpartition(b"/")[0]
            if path in hidden.leading:
                break
            hidden.leading[path] = os.lstat(workspace + b"/" + path) if path else hidden.root
    return hidden


def find_appeared(workspace: bytes, patterns: DenyPatterns, mask: bytes) -> list[bytes]:
    """Return what a pattern matches now and no whiteout covers: made on the host since, and visible inside.

    What cannot be listed is left out: this is told to the user, nothing hangs on it.
    """
    appeared: list[bytes] = []
    pending = [b""]
    while pending:
        parent = pending.pop()
        prefix = parent + b"/" if parent else b""
        try:
            with os.scandir(workspace + b"/" + parent) as listing:
                entries = list(listing)
        except OSError:
            continue
        found = patterns.match_names(parent, [entry.name for entry in entries])
        appeared += [prefix + name for name in found if not os.path.lexists(mask + b"/" + prefix + name)]
        pending += [
            prefix + entry.name
            for entry in entries
            if entry.name not in found and entry.is_dir(follow_symlinks=False)
        ]
    return sorted(appeared)


def unlistable(path: bytes, exc: OSError) -> WorkspaceError:
    """Say that a folder of the workspace cannot be read."""
    return WorkspaceError(
        f"cannot read workspace folder {show(path)}: {exc.strerror}; "
        "make it readable for yourself, or hide it with a deny pattern"
    )


def show(path: bytes) -> str:
    """Return a path as one printable line."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


def and_more(count: int) -> str:
    """Return `` (and N more)``, or nothing."""
    return f" (and {count} more)" if count else ""


def _walk(workspace: bytes) -> Iterator[tuple[bytes, list[os.DirEntry[bytes]]]]:
    """Yield each directory with its entries; those the caller takes out of the list are not entered."""
    pending = [b""]
    while pending:
        parent = pending.pop()
        try:
            with os.scandir(workspace + b"/" + parent) as listing:
                entries = list(listing)
        except OSError as exc:
            raise unlistable(workspace + b"/" + parent, exc) from exc
        yield parent, entries
        prefix = parent + b"/" if parent else b""
        pending += [prefix + entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _is_plain(entry: os.DirEntry[bytes]) -> bool:
    return entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink()


def _find_second_names(workspace: bytes, hidden: set[bytes]) -> set[bytes]:
    """Return visible paths that are hard links to hidden files: they would show the same content."""
    inodes = {inode for path in hidden for inode in _shared_inodes(workspace + b"/" + path)}
    second: set[bytes] = set()
    if not inodes:
        return second
    for parent, entries in _walk(workspace):
        prefix = parent + b"/" if parent else b""
        entries[:] = [entry for entry in entries if prefix + entry.name not in hidden]
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            if (found.st_dev, found.st_ino) in inodes:
                second.add(prefix + entry.name)
    return second


def _shared_inodes(top: bytes) -> Iterator[tuple[int, int]]:
    """Yield device and inode of every file with several names at or beneath a path."""
    pending = [top]
    while pending:
        at = pending.pop()
        try:
            entry = os.lstat(at)
            if stat.S_ISDIR(entry.st_mode):
                pending += [at + b"/" + name for name in os.listdir(at)]
            elif entry.st_nlink > 1:
                yield entry.st_dev, entry.st_ino
        except OSError as exc:
            raise WorkspaceError(
                f"cannot look for second names of hidden files at {show(at)}: {exc.strerror}; "
                "make it readable for yourself"
            ) from exc


def _refuse_mounts(workspace: bytes, patterns: DenyPatterns) -> None:
    """An overlay shows what lies under a mount point, not what is mounted there."""
    for mount in list_mounts_beneath(workspace):
        if patterns.match(mount.point[len(workspace.rstrip(b"/")) + 1 :]) is None:
            raise WorkspaceError(
                f"cannot use workspace {show(workspace)}: {show(mount.point)} is a mount of its own, "
                "which the sandbox could not see; unmount it or hide it with a deny pattern"
            )


def _refuse_special(workspace: bytes, special: list[bytes]) -> None:
    if not special:
        return
    first = min(special)
    kind = _SPECIAL.get(stat.S_IFMT(os.lstat(workspace + b"/" + first).st_mode), "special file")
    raise WorkspaceError(
        f"cannot use workspace {show(workspace)}: {show(first)} is a {kind}{and_more(len(special) - 1)}; "
        "remove it or hide it with a deny pattern"
    )
