"""Read what a session changed: its upper layer against the tree it started from. D4

The upper layer is hostile: the task made every name, mode, link and attribute in it. Nothing is followed
and no file is opened whose kind is not known; what a patch cannot carry, or may not, is withheld with a
reason and never dropped in silence. The user's directory is read only where the manifest of the
session's start says that a file was visible then and is the same now.
"""

from __future__ import annotations

import bisect
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from sandbox.container.workspace.beneath import list_directory, open_beneath, opened
from sandbox.container.workspace.survey import manifest_record
from sandbox.errors import WorkspaceError
from sandbox.policy.paths import PATH_MAX, DenyPatterns

FILE_BYTES_MAX = 64 * 1024 * 1024
"""A larger file, before or after, is withheld."""
TOTAL_BYTES_MAX = 256 * 1024 * 1024
"""Content read for one patch, before and after together; what comes later is withheld."""

NEW_PATHS_MAX = 30_000
"""New files and folders looked at for one patch; more is no patch that anybody reads."""
NEW_PATH_BYTES_MAX = 16 * 1024 * 1024
"""Their paths together: a task can nest folders until each name in them is 4 KiB long."""
FOLDER_BYTES = 64
"""What each folder on the way counts for beside its name: every rule about paths looks at each of them."""

REGULAR, EXECUTABLE, SYMLINK = 0o100644, 0o100755, 0o120000

_OPAQUE = (b"user.overlay.opaque", b"trusted.overlay.opaque")
_INDIRECT = frozenset(
    f"{space}.overlay.{mark}" for space in ("user", "trusted") for mark in ("redirect", "metacopy")
)
_GIT_FOLDER = "git takes no patch to a repository's own folder"
_DRAFT = re.compile(rb"\.agent-runner-[0-9a-f]{16}\.tmp")
"""What images/guest/files.c writes before it renames; a killed write leaves it."""
_HOOKS_SHOWN = 5
_TOO_MANY = (
    f"a patch covers {NEW_PATHS_MAX} new files and folders, and {NEW_PATH_BYTES_MAX // 1024 // 1024} MiB of "
    "their paths"
)
_CHANGED_MEANWHILE = "it changed on the host after the session began; copy it from the session by hand"


Weight = Literal["alarming", "plain", "routine"]


@dataclass(frozen=True)
class Withheld:
    """A change that is not in the patch."""

    path: bytes
    """Relative to the workspace; everything beneath it is withheld too."""
    reason: str
    weight: Weight = "plain"
    """``alarming``: a hidden path or a repository's own folder. ``routine``: what is ignored or empty."""

    @property
    def shown(self) -> str:
        """The path as text; bytes that are not UTF-8 as ``\\xNN``."""
        return self.path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Version:
    """One file as git sees it."""

    mode: int
    content: bytes
    """A symlink's content is its target."""


@dataclass(frozen=True)
class Change:
    """One path, before and after; ``None`` is absent. The two differ."""

    path: bytes
    before: Version | None
    after: Version | None


FindIgnored = Callable[[Sequence[bytes]], Mapping[bytes, Sequence[bytes]]]
"""Given paths of new files, return those to leave out, by the path they are reported under."""


@dataclass
class Changes:
    """All a session changed, in path order."""

    changes: list[Change] = field(default_factory=list)
    withheld: list[Withheld] = field(default_factory=list)


def find_changes(
    upper: int,
    workspace: int,
    manifest: dict[bytes, bytes],
    patterns: DenyPatterns,
    find_ignored: FindIgnored = lambda _: {},
    *,
    may_be_lost: bool = False,
    settled_ns: int = 0,
) -> Changes:
    """Compare an upper layer with the user's directory; both are open directories.

    ``manifest`` maps each path visible at the start to its record; ``find_ignored`` is asked before any
    content is read, so that build products cannot fill the patch up. ``may_be_lost``: the layer's disk
    may have failed to take content that was written; each file is asked before it is believed.
    Changes of owner, time and extended attributes, folder modes and empty folders are not changes to git.
    Raises WorkspaceError when the layer was made by a mount that hides content in attributes.
    """
    return _Comparison(upper, workspace, manifest, patterns, may_be_lost, settled_ns).run(find_ignored)


def is_refused_by_git(path: bytes) -> bool:
    """Whether git takes no such path in a patch: a ``.git`` in any spelling some filesystem accepts."""
    # Backslashes separate on Windows, and git judges them as such everywhere.
    return any(
        segment.split(":", 1)[0].rstrip(". ").casefold() in (".git", "git~1")
        for segment in re.split(r"[/\\]", _without_ignored(path))
    )


def find_obstacle(directory: int, path: bytes, deleted: Set[bytes]) -> bytes | None:
    """Return what keeps a file from being written beneath a directory once ``deleted`` files are gone.

    A file or link where a folder must be, or something in a folder where the file must be: a hidden
    file, say. An empty folder at the path itself is no obstacle to git; one within a folder is.
    """
    segments = path.split(b"/")
    for depth in range(1, len(segments)):
        parent = b"/".join(segments[:depth])
        match _kind(directory, parent):
            case stat.S_IFDIR:
                continue
            case None:
                return None
            case _:
                return None if parent in deleted else parent
    return _find_left(directory, path, deleted)


def _find_left(directory: int, path: bytes, deleted: Set[bytes]) -> bytes | None:
    """Return something in a folder at ``path`` that would stay there; None when nothing would."""
    if _kind(directory, path) != stat.S_IFDIR:
        return None
    pending = [path]
    while pending:
        folder = pending.pop()
        names = list_directory(directory, folder)
        if not names and folder != path:
            return folder
        for child in (folder + b"/" + name for name in names):
            if _kind(directory, child) == stat.S_IFDIR:
                pending.append(child)
            elif child not in deleted:
                return child
    return None


def _kind(directory: int, path: bytes) -> int | None:
    """Return the type bits of what is at a path beneath a directory; None when nothing is."""
    try:
        with opened(path, os.O_PATH | os.O_NOFOLLOW, directory=directory) as handle:
            return stat.S_IFMT(os.fstat(handle).st_mode)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a parent is a file or a link
            return None
        raise


class _Comparison:
    def __init__(
        self,
        upper: int,
        workspace: int,
        manifest: dict[bytes, bytes],
        patterns: DenyPatterns,
        may_be_lost: bool,
        settled_ns: int,
    ) -> None:
        self.upper = upper
        self.workspace = workspace
        self.manifest = manifest
        self.ordered = sorted(manifest)
        self.patterns = patterns
        self.may_be_lost = may_be_lost
        self.settled_ns = settled_ns
        self.result = Changes()
        self.after: dict[bytes, os.stat_result] = {}
        """Files and symlinks of the upper layer."""
        self.replaced: list[bytes] = []
        """Paths whose whole former content is gone: whiteouts, opaque directories, changed kinds."""
        self.refused: set[bytes] = set()
        """Changed paths that git would not take."""
        self.bytes_left = TOTAL_BYTES_MAX
        self.new_paths_left = NEW_PATHS_MAX
        self.new_path_bytes_left = NEW_PATH_BYTES_MAX

    def run(self, find_ignored: FindIgnored) -> Changes:
        # Folders of the user's all of them and first: no mass of new ones may hide what became of those.
        # Then new ones, the shallow first: a chain of thousands is no reason to miss what stands beside it.
        # Last the build products, however many: they are left out anyway.
        known, new = deque([b""]), deque[bytes]()
        while known:
            self._read_directory(known.popleft(), known, new)
        products = find_ignored([folder + b"/file" for folder in new]).keys() & set(new)
        new = deque(folder for folder in new if folder not in products)
        for folders in (new, deque(sorted(products))):
            while folders:
                self._read_directory(folders.popleft(), folders, folders)
        gone = {path for top in self.replaced for path in self._former_files(top)} - self.after.keys()
        self._leave_out_ignored(find_ignored)
        for path in sorted(gone | self.after.keys(), key=self._urgency):
            if path in self.after or not self._is_refused(path):
                self._compare(path)
        self.result.changes.sort(key=lambda change: change.path)
        self._withhold_obstructed()
        for path in self.refused:
            self._withhold(path, _GIT_FOLDER + self._changed_hooks(path), "alarming")
        self.result.withheld.sort(key=lambda item: item.path)
        return self.result

    def _leave_out_ignored(self, find_ignored: FindIgnored) -> None:
        added = sorted(path for path in self.after if not self._was_file(path))
        for top, paths in find_ignored(added).items():
            count = len(paths)
            self._withhold(
                top,
                f"the project's .gitignore leaves it out ({count} new file{'s' * (count > 1)})",
                "routine",
            )
            for path in paths:
                del self.after[path]

    def _withhold_obstructed(self) -> None:
        """Leave out what cannot be written on the host: one such file would keep git from all others."""
        changes, self.result.changes = self.result.changes, []
        deleted = {change.path for change in changes if change.after is None}
        for change in changes:
            left = None if change.after is None else find_obstacle(self.workspace, change.path, deleted)
            if left is None:
                self.result.changes.append(change)
            else:
                self._withhold(change.path, f"{_shown(left)} stays in its place on the host")

    def _was_file(self, path: bytes) -> bool:
        return (record := self.manifest.get(path)) is not None and not _is_directory(record)

    def _urgency(self, path: bytes) -> tuple[bool, int, bytes]:
        """Read what existed first, then the small: what a task makes en masse is what a full patch lacks."""
        is_new = not self._was_file(path)
        return is_new, self.after[path].st_size if path in self.after else 0, path

    def _read_directory(self, path: bytes, known: deque[bytes], new: deque[bytes]) -> None:
        names = self._bounded(path, list_directory(self.upper, path))
        hidden = self.patterns.match_names(path, names)
        with opened(path, os.O_DIRECTORY | os.O_RDONLY, directory=self.upper) as directory:
            self._check_marks(directory, path)
            for name in names:
                child = path + b"/" + name if path else name
                entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if name in hidden:
                    # A whiteout there only says that the task removed what it had made itself.
                    if not _is_whiteout(entry):
                        self._withhold(child, f"the policy hides it with {hidden[name]!r}", "alarming")
                elif len(child) > PATH_MAX:
                    self._withhold(child[:200] + b"...", "its path is longer than a patch can name")
                elif is_refused_by_git(name):
                    self.refused.add(child)
                elif stat.S_ISDIR(entry.st_mode):
                    (known if child in self.manifest else new).append(child)
                    self._enter_directory(child)
                elif _DRAFT.fullmatch(name) and stat.S_ISREG(entry.st_mode) and child not in self.manifest:
                    self._withhold(child, "a write of the sandbox that was cut off")
                else:
                    self._read_entry(child, entry)

    def _bounded(self, path: bytes, names: list[bytes]) -> list[bytes]:
        """Return the names to look at: what was there when the session began, and as much else as may be."""
        prefix = path + b"/" if path else b""
        above = len(prefix) + FOLDER_BYTES * prefix.count(b"/")
        is_new = bool(path) and path not in self.manifest
        kept, left = [], 0
        for name in names:
            if not is_new and prefix + name in self.manifest:
                kept.append(name)
                continue
            size = above + len(name)
            if self.new_paths_left < 1 or self.new_path_bytes_left < size:
                left += 1
                continue
            self.new_paths_left -= 1
            self.new_path_bytes_left -= size
            kept.append(name)
        if left:
            reason = f"{left} new names in it were not looked at: {_TOO_MANY}"
            self._withhold(path or b".", reason, "alarming")
        return kept

    def _changed_hooks(self, path: bytes) -> str:
        """Name what was put in a repository's hooks: that is what a reviewer wants to know of."""
        try:
            hooks = list_directory(self.upper, path + b"/hooks")
        except OSError:
            return ""
        shown = ", ".join(f"hooks/{_shown(name)}" for name in sorted(hooks)[:_HOOKS_SHOWN])
        more = f" and {len(hooks) - _HOOKS_SHOWN} more" if len(hooks) > _HOOKS_SHOWN else ""
        return f" (changed in it: {shown}{more})" if shown else ""

    def _check_marks(self, directory: int, path: bytes) -> None:
        marks = set(os.listxattr(directory))
        if marks & _INDIRECT:
            raise WorkspaceError(
                f"cannot read the changes in {_shown(path)!r}: the overlay was mounted without userxattr "
                "and moved folders by reference; mount it with the volume's own flags"
            )
        if any(mark.decode() in marks and os.getxattr(directory, mark) in (b"y", b"x") for mark in _OPAQUE):
            self.replaced.append(path)

    def _enter_directory(self, path: bytes) -> None:
        if (record := self.manifest.get(path)) is not None and not _is_directory(record):
            self.replaced.append(path)
        elif record is None and not self._has_entries(path):
            self._withhold(path, "git carries no empty folder", "routine")

    def _has_entries(self, path: bytes) -> bool:
        return bool(list_directory(self.upper, path))

    def _read_entry(self, path: bytes, entry: os.stat_result) -> None:
        if _is_whiteout(entry):
            self.replaced.append(path)
        elif stat.S_ISREG(entry.st_mode) or stat.S_ISLNK(entry.st_mode):
            self.after[path] = entry
            self.replaced.append(path)
        else:
            self._withhold(path, "a socket, FIFO or device cannot be in a patch")

    def _former_files(self, top: bytes) -> Iterator[bytes]:
        """Yield the files that were at or beneath a path when the session began."""
        if top in self.manifest and not _is_directory(self.manifest[top]):
            yield top
        prefix = top + b"/" if top else b""
        at = bisect.bisect_left(self.ordered, prefix)
        while at < len(self.ordered) and self.ordered[at].startswith(prefix):
            if not _is_directory(self.manifest[self.ordered[at]]):
                yield self.ordered[at]
            at += 1

    def _is_refused(self, path: bytes) -> bool:
        """Whether a former file stays as it is on the host; what a repository loses is said once."""
        segments = path.split(b"/")
        for depth, segment in enumerate(segments, 1):
            if is_refused_by_git(segment):
                self.refused.add(b"/".join(segments[:depth]))
                return True
        return self.patterns.match(path) is not None

    def _compare(self, path: bytes) -> None:
        try:
            before = self._former_version(path)
            after = self._current_version(path)
        except _CannotCarry as exc:
            self._withhold(path, str(exc))
            return
        if before != after:
            if any(version and version.mode == SYMLINK for version in (before, after)) and _is_git_file(path):
                self._withhold(path, "git takes no symlink of that name")
                return
            self.result.changes.append(Change(path, before, after))

    def _former_version(self, path: bytes) -> Version | None:
        """Read a file of the user's directory, which must be what it was at the start."""
        record = self.manifest.get(path)
        if record is None or _is_directory(record):
            # Either it did not exist, or it was a folder: then its files count, one by one.
            if record is None and self._exists_on_host(path):
                raise _CannotCarry("it is on the host, but was hidden or absent when the session began")
            return None
        version, now = self._read(self.workspace, path)
        if now != record:
            raise _CannotCarry(_CHANGED_MEANWHILE)
        return version

    def _current_version(self, path: bytes) -> Version | None:
        if (entry := self.after.get(path)) is None:
            return None
        version, _ = self._read(self.upper, path)
        if entry.st_mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(entry.st_mode):
            self._withhold(path, "its set-user-id and set-group-id bits; the file itself is in the patch")
        return version

    def _exists_on_host(self, path: bytes) -> bool:
        try:
            os.close(open_beneath(self.workspace, path, os.O_PATH | os.O_NOFOLLOW))
        except OSError as exc:
            # ENOTDIR, ELOOP: a parent is a file or a link there; the file itself cannot be.
            return exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        return True

    def _read(self, root: int, path: bytes) -> tuple[Version, bytes]:
        """Read one file or symlink beneath a root; return it with its manifest record."""
        try:
            with opened(path, os.O_PATH | os.O_NOFOLLOW, directory=root) as handle:
                entry = os.fstat(handle)
                if stat.S_ISLNK(entry.st_mode):
                    target = os.readlink(b"", dir_fd=handle)
                    return Version(SYMLINK, target), manifest_record(path, entry, target)
                if not stat.S_ISREG(entry.st_mode):
                    raise _CannotCarry(_CHANGED_MEANWHILE)
                content = self._read_content(root, path, handle)
        except OSError as exc:
            if root == self.workspace and exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise _CannotCarry(_CHANGED_MEANWHILE) from exc
            raise _CannotCarry(f"it cannot be read: {exc.strerror}") from exc
        mode = EXECUTABLE if entry.st_mode & 0o100 else REGULAR
        return Version(mode, content), manifest_record(path, entry, None)

    def _read_content(self, root: int, path: bytes, handle: int) -> bytes:
        entry = os.fstat(handle)
        if entry.st_size > FILE_BYTES_MAX:
            raise _CannotCarry(f"it has {entry.st_size} bytes; a patch carries {FILE_BYTES_MAX} per file")
        if entry.st_size > self.bytes_left:
            raise _CannotCarry(f"the patch is full: it carries {TOTAL_BYTES_MAX} bytes of files in all")
        if root == self.upper and set(os.listxattr(f"/proc/self/fd/{handle}")) & _INDIRECT:
            raise _CannotCarry("the overlay kept its content elsewhere; mount with the volume's own flags")
        if root == self.upper and not entry.st_mode & 0o400 and os.geteuid() == entry.st_uid:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(entry.st_mode) | 0o400)
        # Through the handle: the file that was judged is the file that is read.
        descriptor = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if root == self.upper and self.may_be_lost:
                self._check_written(descriptor, entry)
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise _CannotCarry("it grew while it was read")
        self.bytes_left -= len(content)
        return content

    def _check_written(self, descriptor: int, entry: os.stat_result) -> None:
        """Raise OSError when what is read may be zeros by now."""
        try:
            # The kernel tells a file's first asker that it could not be written, and then forgets it.
            os.fsync(descriptor)
        except OSError as exc:
            # A filesystem that was shut down says this of every file. Nobody inside can set a file's ctime.
            if exc.errno != errno.EROFS or entry.st_ctime_ns >= self.settled_ns:
                raise

    def _withhold(self, path: bytes, reason: str, weight: Weight = "plain") -> None:
        self.result.withheld.append(Withheld(path, reason, weight))


class _CannotCarry(Exception):
    """Why one path stays out of the patch."""


def _is_whiteout(entry: os.stat_result) -> bool:
    return stat.S_ISCHR(entry.st_mode) and entry.st_rdev == 0


def _is_directory(record: bytes) -> bool:
    return stat.S_ISDIR(int(record.split(b" ", 1)[0], 8))


_GITMODULES = re.compile(r"\.gitmodules[. ]*|gitmod~[1-4][. ]*|(?=.{8}[. ]*\Z)g?i?7?e?b?a?~[1-9][0-9]*[. ]*")
"""Names that some filesystem takes for ``.gitmodules``: its spelling and the short names NTFS may make."""


def _is_git_file(path: bytes) -> bool:
    """Whether git refuses a symlink of that name, and with it the whole patch."""
    text = _without_ignored(path).casefold()
    return any(_GITMODULES.fullmatch(segment.split(":", 1)[0]) for segment in re.split(r"[/\\]", text))


def _without_ignored(name: bytes) -> str:
    """Drop the code points that HFS+ leaves out when it compares names."""
    return re.sub("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]", "", name.decode("utf-8", "replace"))


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace") or "."
