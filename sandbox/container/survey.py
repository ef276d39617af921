"""Walk the user's directory once: what is hidden, what the visible tree is, what cannot be mounted. D4

Reads names and metadata, never content, and follows no link. The visible tree is written down as a
manifest: NUL-terminated records in path order, ``MODE SIZE MTIME_NS PATH`` (mode in octal), and after a
symlink's record its target. Its blake3 is the digest of the base tree, and it tells later which files
the user changed while the session ran. A folder's size and time are left out (0): they change with
hidden entries too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from sandbox.container.idmap import Exchange
from sandbox.container.mounts import list_mounts_beneath
from sandbox.errors import WorkspaceError
from sandbox.policy.paths import DenyPatterns

_SHOWN = 5
"""Paths named in one warning; the rest is counted."""

_COMMON = stat.S_IFREG | 0o444
_COMMON_MASK = 0o170444  # the type, and everybody's read bits

_SPECIAL = {
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True)
class Identity:
    """Who the sandbox's processes are, and how owners on disk appear to them."""

    uid: int
    gid: int
    users: Exchange
    groups: Exchange

    def may_read(self, entry: os.stat_result) -> bool:
        """Whether mode bits let the sandbox read a file, or list and enter a directory."""
        if self.users.seen(entry.st_uid) == self.uid:
            shift = 6
        elif self.groups.seen(entry.st_gid) == self.gid:
            shift = 3
        else:
            shift = 0
        wanted = 0o5 if stat.S_ISDIR(entry.st_mode) else 0o4
        return (entry.st_mode >> shift) & wanted == wanted


@dataclass
class Survey:
    """What one walk found. Paths are bytes, relative to the workspace."""

    root: os.stat_result
    hidden: list[bytes] = field(default_factory=list)
    """Topmost hidden paths: each needs one whiteout."""
    leading: dict[bytes, os.stat_result] = field(default_factory=dict)
    """The directories on the way to hidden paths; the mask must look like them."""
    manifest: bytes = b""
    files: int = 0
    """Visible entries that are not directories."""
    warnings: list[str] = field(default_factory=list)
    """One line each, for the user; the session may go on."""


def survey_workspace(workspace: bytes, patterns: DenyPatterns, identity: Identity) -> Survey:
    """Walk a resolved, absolute directory.

    Raises WorkspaceError, naming the first path and the count, for what would break inside: special
    files, files the sandbox could not read, other filesystems mounted beneath. What a deny pattern
    hides is never a reason to refuse.
    """
    _refuse_mounts(workspace, patterns)
    walk = _Walk(workspace, patterns, identity)
    walk.run()
    walk.refuse_unusable()
    walk.hide_hard_links()
    survey = walk.survey
    survey.files = len(walk.records) - (len(walk.directories) - 1)  # the root has no record
    survey.manifest = b"".join(walk.records[path] for path in sorted(walk.records))
    survey.warnings += _link_warnings(walk.leaving) + _git_warnings(workspace)
    return survey


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
    def __init__(self, workspace: bytes, patterns: DenyPatterns, identity: Identity) -> None:
        self.workspace = workspace
        self.patterns = patterns
        self.identity = identity
        try:
            root = os.stat(workspace)
        except OSError as exc:
            raise _unlistable(workspace, exc) from exc
        self.survey = Survey(root)
        self.records: dict[bytes, bytes] = {}
        self.directories: dict[bytes, os.stat_result] = {b"": root}
        self.leaving: list[bytes] = []
        self._special: list[tuple[bytes, str]] = []
        self._unreadable: list[bytes] = []
        self._shared: dict[tuple[int, int], list[bytes]] = {}
        """Visible files with more than one name, by device and inode."""

    def run(self) -> None:
        if not self.identity.may_read(self.survey.root):
            self._unreadable.append(b".")
        records = self.records
        pending = [b""]
        while pending:
            parent = pending.pop()
            prefix = parent + b"/" if parent else b""
            try:
                with os.scandir(self.workspace + b"/" + parent) as listing:
                    entries = list(listing)
                hidden = self.patterns.match_names(parent, [entry.name for entry in entries])
                for name in hidden:
                    self._hide(prefix + name)
                for entry in entries:
                    if entry.name not in hidden:
                        found = entry.stat(follow_symlinks=False)
                        # The common case first: 100,000 times a regular file that everybody may read.
                        if found.st_mode & _COMMON_MASK == _COMMON and found.st_nlink == 1:
                            path = prefix + entry.name
                            records[path] = b"%o %d %d %s\0" % (
                                found.st_mode,
                                found.st_size,
                                found.st_mtime_ns,
                                path,
                            )
                        else:
                            self._visit(prefix + entry.name, found, pending)
            except OSError as exc:
                raise _unlistable(self.workspace + b"/" + parent, exc) from exc

    def refuse_unusable(self) -> None:
        where = os.fsdecode(self.workspace)
        if self._special:
            path, kind = min(self._special)
            raise WorkspaceError(
                f"cannot use workspace {where}: {_name(path)} is a {kind}"
                f"{_and_more(len(self._special) - 1)}; remove it or hide it with a deny pattern"
            )
        if self._unreadable:
            raise WorkspaceError(
                f"cannot use workspace {where}: {_name(min(self._unreadable))} is not readable for the "
                f"sandbox's user{_and_more(len(self._unreadable) - 1)}; "
                "change its mode or owner, or hide it with a deny pattern"
            )

    def hide_hard_links(self) -> None:
        """Hide every other name of a hidden file: a second hard link would show its content."""
        if not self._shared or not self.survey.hidden:
            return
        for path in list(self.survey.hidden):
            for identifier in self._shared_inodes(path):
                for other in self._shared.pop(identifier, ()):
                    self._hide(other)
                    del self.records[other]

    def _visit(self, path: bytes, entry: os.stat_result, pending: list[bytes]) -> None:
        kind = stat.S_IFMT(entry.st_mode)
        target: bytes | None = None
        if kind == stat.S_IFDIR:
            pending.append(path)
            self.directories[path] = entry
            if not self.identity.may_read(entry):
                self._unreadable.append(path)
        elif kind == stat.S_IFREG:
            if not self.identity.may_read(entry):
                self._unreadable.append(path)
            if entry.st_nlink > 1:
                self._shared.setdefault((entry.st_dev, entry.st_ino), []).append(path)
        elif kind == stat.S_IFLNK:
            target = os.readlink(self.workspace + b"/" + path)
            if leaves_workspace(path, target):
                self.leaving.append(path)
        else:
            self._special.append((path, _SPECIAL.get(kind, "special file")))
            return
        self.records[path] = manifest_record(path, entry, target)

    def _hide(self, path: bytes) -> None:
        self.survey.hidden.append(path)
        while path:
            path = path.rpartition(b"/")[0]
            self.survey.leading[path] = self.directories[path]

    def _shared_inodes(self, path: bytes) -> Iterator[tuple[int, int]]:
        """Yield device and inode of every file with several names at or beneath a hidden path."""
        pending = [self.workspace + b"/" + path]
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
                    f"cannot look for second names of hidden files at {_name(at)}: {exc.strerror}; "
                    "make it readable for yourself"
                ) from exc


def _refuse_mounts(workspace: bytes, patterns: DenyPatterns) -> None:
    """An overlay shows what lies under a mount point, not what is mounted there."""
    for mount in list_mounts_beneath(workspace):
        if patterns.match(mount.point[len(workspace.rstrip(b"/")) + 1 :]) is None:
            raise WorkspaceError(
                f"cannot use workspace {os.fsdecode(workspace)}: {_name(mount.point)} is a mount of its own, "
                "which the sandbox could not see; unmount it or hide it with a deny pattern"
            )


def _link_warnings(leaving: list[bytes]) -> list[str]:
    if not leaving:
        return []
    shown = ", ".join(_name(path) for path in sorted(leaving)[:_SHOWN])
    return [
        f"{len(leaving)} symlinks lead out of the workspace and lead nowhere inside: {shown}"
        + (" …" if len(leaving) > _SHOWN else "")
    ]


def _git_warnings(workspace: bytes) -> list[str]:
    """Say when the repository itself lies elsewhere: a linked worktree, a submodule, borrowed objects."""
    git = workspace + b"/.git"
    try:
        if os.path.isfile(git) and not os.path.islink(git):
            return [
                ".git is a file (a linked worktree or submodule): git commands fail inside, as its "
                "repository is outside"
            ]
        if os.path.exists(git + b"/objects/info/alternates"):
            return [".git borrows objects from another repository: git commands may fail inside"]
    except OSError:
        return []  # hidden or unreadable: nothing to say about it
    return []


def _unlistable(path: bytes, exc: OSError) -> WorkspaceError:
    return WorkspaceError(
        f"cannot read workspace folder {_name(path)}: {exc.strerror}; "
        "make it readable for yourself, or hide it with a deny pattern"
    )


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _name(path: bytes) -> str:
    """Return a path as one printable line."""
    return repr(os.fsdecode(path)) if not os.fsdecode(path).isprintable() else os.fsdecode(path)
