"""Take a git patch apart by file, and say which files are dangerous to whoever applies it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sandbox.errors import WorkspaceError
from sandbox.policy.paths import runs_on_host

Kind = Literal["added", "modified", "deleted", "mode"]

SYMLINK_MODE = "120000"

_HEADER = b"diff --git "
_ESCAPES = {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, '"': 34, "\\": 92}


@dataclass(frozen=True)
class Section:
    """The part of a patch that concerns one path."""

    path: bytes
    kind: Kind
    """``mode``: the mode changes, and perhaps the content too."""
    mode: str
    """The mode after the patch, in octal; empty for a deletion or when the patch does not say."""
    text: bytes

    @property
    def unambiguous(self) -> bytes:
        """The text, with its path in quotes where a blank leaves git in doubt where the path ends.

        A new empty file, a new mode and a binary file have no other line that names the path.
        """
        if b" " not in self.path or self.text.startswith(_HEADER + b'"'):
            return self.text
        rest = self.text.split(b"\n", 1)[1]
        return b'%s"a/%s" "b/%s"\n%s' % (_HEADER, self.path, self.path, rest)

    @property
    def link_target(self) -> bytes | None:
        """The target of a symlink after the patch; None for anything else."""
        return _added_text(self.text) if self.mode == SYMLINK_MODE else None

    @property
    def hazard(self) -> str | None:
        """Why taking this change needs an explicit yes, else None."""
        return find_hazard(self.path, self.link_target)


def find_hazard(path: bytes, link_target: bytes | None) -> str | None:
    """Return why a change would run code on the reader's machine or reach out of the workspace.

    ``link_target`` is given for symlinks. A deletion counts too: removing a hook or a CI check acts.
    """
    if (reason := runs_on_host(path)) is not None:
        return reason
    if link_target is None:
        return None
    resolved = _resolve_link(path, link_target)
    if resolved is None:
        return "a symlink that may lead out of the workspace: what is written to it later lands elsewhere"
    if runs_on_host(resolved) is not None:
        return "a symlink to a file that runs code on this machine"
    return None


def split_patch(patch: bytes) -> list[Section]:
    """Split a patch made by ``git diff --binary --full-index --no-renames``, in its order.

    Raises WorkspaceError for anything else: this is no reader for patches of unknown origin.
    """
    if not patch:
        return []
    # No line of a hunk and no line of base85 can begin like this.
    starts = [found.start() for found in re.finditer(rb"^diff --git ", patch, re.MULTILINE)]
    if not starts or starts[0] != 0:
        raise WorkspaceError("cannot read the patch: it does not begin with a git header; export it again")
    return [_section(patch[a:b]) for a, b in zip(starts, [*starts[1:], len(patch)], strict=True)]


def _section(text: bytes) -> Section:
    kind: Kind = "modified"
    mode = ""
    for line in _header_lines(text):
        if found := re.fullmatch(rb"(new file|deleted file|old|new) mode ([0-7]{6})", line):
            what, mode_text = found[1], found[2].decode()
            kind = {b"new file": "added", b"deleted file": "deleted"}.get(what, "mode")  # type: ignore[assignment]
            mode = "" if what == b"deleted file" else mode_text
        elif found := re.fullmatch(rb"index [0-9a-f]+\.\.[0-9a-f]+ ([0-7]{6})", line):
            mode = found[1].decode()
        elif re.match(rb"(rename|copy|similarity|dissimilarity) ", line):
            raise WorkspaceError("cannot read the patch: it has renames or copies; export it again")
    return Section(_header_path(text.split(b"\n", 1)[0]), kind, mode, text)


def _header_lines(text: bytes) -> Iterator[bytes]:
    for line in text.split(b"\n")[1:]:
        if line.startswith((b"@@ ", b"GIT binary patch", b"--- ", b"+++ ")):
            return
        yield line


def _header_path(line: bytes) -> bytes:
    """Read ``diff --git a/P b/P``: the same path twice, both quoted or neither."""
    rest = line[len(_HEADER) :]
    if rest.startswith(b'"'):
        middle = rest.find(b'" "')
        first, second = rest[1:middle], rest[middle + 3 : -1]
        path = _unquote(first.decode("ascii"))
        other = _unquote(second.decode("ascii"))
    else:
        half = len(rest) // 2
        path, other = rest[:half], rest[half + 1 :]
    if not path.startswith(b"a/") or other != b"b/" + path[2:]:
        raise WorkspaceError("cannot read the patch: a header does not name one path; export it again")
    return path[2:]


def _unquote(text: str) -> bytes:
    """Undo git's C-style quoting."""

    def one(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code, 8) if code[0] in "0123" else _ESCAPES[code])

    try:
        return re.sub(r"\\([0-3][0-7]{2}|.)", one, text).encode("latin-1")
    except KeyError as exc:
        raise WorkspaceError("cannot read the patch: a path is quoted in an unknown way") from exc


def _added_text(text: bytes) -> bytes:
    """Return the new content of a small text file whose diff shows all of it (a symlink's target)."""
    lines = text.split(b"\n")
    kept: list[bytes] = []
    in_hunk = False
    for line in lines:
        if line.startswith(b"@@ "):
            in_hunk = True
        elif in_hunk and line[:1] in (b"+", b" "):
            kept.append(line[1:])
    return b"\n".join(kept)


def _resolve_link(path: bytes, target: bytes) -> bytes | None:
    """Resolve a symlink's target by its text; None when it leaves, or when text cannot tell.

    Leading ``..`` are exact: a patched link lies in real folders. A ``..`` after a name is not, as that
    name can be a link itself.
    """
    if target.startswith(b"/"):
        return None
    at = path.split(b"/")[:-1]
    has_name = False
    for segment in target.split(b"/"):
        if segment == b"..":
            if has_name or not at:
                return None
            at.pop()
        elif segment not in (b"", b"."):
            has_name = True
            at.append(segment)
    return b"/".join(at)
