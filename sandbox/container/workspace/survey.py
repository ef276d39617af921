"""Write down the visible tree of a workspace: the digest of what a session starts from. D4

Reads names and metadata, never content, and follows no link. The manifest has NUL-terminated records
in path order, ``MODE SIZE MTIME_NS PATH`` (mode in octal), and after a symlink's record its target. Its
blake3 is the digest of the base tree, and it tells later which files the user changed while the session
ran. A folder's size and time are left out (0): they change with hidden entries too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Set
from dataclasses import dataclass

from sandbox.container.workspace.beneath import opened_root
from sandbox.container.workspace.casefold import is_casefolded, may_fold
from sandbox.container.workspace.hidden import and_more, show, unlistable
from sandbox.container.workspace.idmap import Exchange
from sandbox.container.workspace.mounts import find_filesystem
from sandbox.digest import blake3_hex
from sandbox.errors import WorkspaceError

_SHOWN = 5
"""Paths named in one warning; the rest is counted."""

_COMMON = stat.S_IFREG | 0o444
_COMMON_MASK = 0o170444  # the type, and everybody's read bits


@dataclass(frozen=True)
class Identity:
    """Who the sandbox's processes are, and how owners on disk appear to them."""

    uid: int
    gid: int
    users: Exchange
    groups: Exchange

    def may_read(self, entry: os.stat_result) -> bool:
        """Whether mode bits let the sandbox read a file, or list and enter a directory."""
        wanted = 0o5 if stat.S_ISDIR(entry.st_mode) else 0o4
        return (entry.st_mode >> self._shift(entry)) & wanted == wanted

    def may_write(self, entry: os.stat_result) -> bool:
        """Whether mode bits let the sandbox write."""
        return bool((entry.st_mode >> self._shift(entry)) & 0o2)

    def _shift(self, entry: os.stat_result) -> int:
        if self.users.seen(entry.st_uid) == self.uid:
            return 6
        return 3 if self.groups.seen(entry.st_gid) == self.gid else 0


@dataclass(frozen=True)
class BaseTree:
    """The visible tree at the start of a session."""

    manifest: bytes
    blake3: str
    """Digest of paths, modes, sizes, times and link targets; not of content."""
    files: int
    """Visible entries that are not directories."""
    warnings: tuple[str, ...]
    """What works differently inside, one line each; empty when nothing does."""


def survey_workspace(workspace: bytes, hidden: Set[bytes], identity: Identity) -> BaseTree:
    """Walk a resolved, absolute directory, leaving out what is hidden.

    Raises WorkspaceError, naming the first path and the count, for files the sandbox could not read, and for
    folders in which the mask of names cannot be relied on.
    """
    walk = _Walk(workspace, hidden, identity)
    walk.run()
    walk.refuse_folded()
    walk.refuse_unreadable()
    manifest = b"".join(map(walk.records.__getitem__, sorted(walk.records)))
    warnings = (*_link_warnings(walk.leaving), *_git_warnings(workspace), *walk.root_warnings())
    return BaseTree(manifest, blake3_hex(manifest), len(walk.records) - walk.directories, warnings)


def read_manifest(manifest: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield path and record of each entry of a manifest."""
    fields = iter(manifest.split(b"\0")[:-1])
    for line in fields:
        path = line.split(b" ", 3)[3]
        if stat.S_ISLNK(int(line.split(b" ", 1)[0], 8)):
            yield path, b"%s\0%s\0" % (line, next(fields))
        else:
            yield path, line + b"\0"


def manifest_record(path: bytes, entry: os.stat_result, target: bytes | None) -> bytes:
    """Return the record of one entry; ``target`` is given for symlinks only."""
    if stat.S_ISDIR(entry.st_mode):
        return b"%o 0 0 %s\0" % (entry.st_mode, path)
    record = b"%o %d %d %s\0" % (entry.st_mode, entry.st_size, entry.st_mtime_ns, path)
    return record if target is None else b"%s%s\0" % (record, target)


def leaves_workspace(path: bytes, target: bytes) -> bool:
    """Whether a symlink's target, read as text, lies outside the workspace. Absolute targets always do."""
    if target.startswith(b"/"):
        return True
    depth = path.count(b"/")
    for segment in target.split(b"/"):
        if segment == b"..":
            depth -= 1
            if depth < 0:
                return True
        elif segment not in (b"", b"."):
            depth += 1
    return False


class _Walk:
    def __init__(self, workspace: bytes, hidden: Set[bytes], identity: Identity) -> None:
        self.workspace = workspace
        self.hidden = hidden
        self.identity = identity
        self.records: dict[bytes, bytes] = {}
        self.directories = 0
        self.leaving: list[bytes] = []
        self._unreadable: list[bytes] = []
        self._is_writable = True
        self._folded: list[bytes] = []

    def run(self) -> None:
        records, hidden = self.records, self.hidden
        pending = [b""]
        try:
            root = os.stat(self.workspace)
        except OSError as exc:
            raise unlistable(self.workspace, exc) from exc
        self._is_writable = self.identity.may_write(root)
        if not self.identity.may_read(root):
            self._unreadable.append(b".")
        with opened_root(self.workspace) as directory:
            folds = may_fold(find_filesystem(directory))
        while pending:
            parent = pending.pop()
            prefix = parent + b"/" if parent else b""
            try:
                if folds and is_casefolded(self.workspace + b"/" + parent):
                    self._folded.append(parent)
                with os.scandir(self.workspace + b"/" + parent) as listing:
                    for entry in listing:
                        path = prefix + entry.name
                        if path in hidden:
                            continue
                        found = entry.stat(follow_symlinks=False)
                        # The common case first: 100,000 times a regular file that everybody may read.
                        if found.st_mode & _COMMON_MASK == _COMMON:
                            records[path] = b"%o %d %d %s\0" % (
                                found.st_mode,
                                found.st_size,
                                found.st_mtime_ns,
                                path,
                            )
                        else:
                            self._visit(path, found, pending)
            except FileNotFoundError:
                continue  # the user removed it just now: not part of the tree
            except OSError as exc:
                raise unlistable(self.workspace + b"/" + parent, exc) from exc

    def refuse_folded(self) -> None:
        if self._folded:
            raise WorkspaceError(
                f"cannot use workspace {show(self.workspace)}: {show(min(self._folded) or b'.')} compares "
                f"names without regard to case{and_more(len(self._folded) - 1)}, and no deny pattern covers "
                "every spelling there; take that attribute away (chattr -F on an empty folder), or hide it"
            )

    def refuse_unreadable(self) -> None:
        if self._unreadable:
            raise WorkspaceError(
                f"cannot use workspace {show(self.workspace)}: {show(min(self._unreadable))} is not readable "
                f"for the sandbox's user{and_more(len(self._unreadable) - 1)}; "
                "change its mode or owner, or hide it with a deny pattern"
            )

    def root_warnings(self) -> list[str]:
        if self._is_writable:
            return []
        return ["the sandbox's user may not write at the top of the workspace"]

    def _visit(self, path: bytes, entry: os.stat_result, pending: list[bytes]) -> None:
        target: bytes | None = None
        if stat.S_ISLNK(entry.st_mode):
            target = os.readlink(self.workspace + b"/" + path)
            if leaves_workspace(path, target):
                self.leaving.append(path)
        elif not self.identity.may_read(entry):
            self._unreadable.append(path)
        if stat.S_ISDIR(entry.st_mode):
            pending.append(path)
            self.directories += 1
        self.records[path] = manifest_record(path, entry, target)


def _link_warnings(leaving: list[bytes]) -> list[str]:
    if not leaving:
        return []
    shown = ", ".join(show(path) for path in sorted(leaving)[:_SHOWN])
    return [
        f"{len(leaving)} symlinks lead out of the workspace and lead nowhere inside: {shown}"
        + (" …" if len(leaving) > _SHOWN else "")
    ]


def _git_warnings(workspace: bytes) -> list[str]:
    """Say when the repository itself lies elsewhere: a linked worktree, a submodule, borrowed objects."""
    git = workspace + b"/.git"
    if os.path.isfile(git) and not os.path.islink(git):
        return [
            ".git is a file (a linked worktree or submodule): git commands fail inside, as its "
            "repository is outside"
        ]
    if os.path.exists(git + b"/objects/info/alternates"):
        return [".git borrows objects from another repository: git commands may fail inside"]
    return []
