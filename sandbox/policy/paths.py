"""Decide which paths of the workspace exist for the agent, and which it may name. Pure: no I/O. D4

Names are bytes, as the kernel has them, and are compared as stored: ``.ENV`` is not ``.env``, on a
case-insensitive filesystem either (there the stored spelling counts). Unicode spellings that are
canonically equivalent are one name. The glob grammar is in ``globs``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from sandbox.policy.decide import Decision, allow, deny
from sandbox.policy.globs import compile_glob, decode_path
from sandbox.policy.host_paths import runs_on_host as runs_on_host
from sandbox.policy.model import FilesystemPolicy

WORKSPACE = b"/workspace"
"""Where the workspace is inside the container; the one absolute prefix an agent may name."""

PATH_MAX = 4095
"""Bytes the kernel takes in one path; a longer one names nothing."""


class DenyPatterns:
    """A list of globs; what one of them matches, and all beneath it, does not exist inside."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Compile the patterns; raises PolicyError for one that could never match."""
        self.patterns: tuple[str, ...] = tuple(patterns)
        self._globs = tuple(compile_glob(pattern) for pattern in self.patterns)
        self._each = tuple(re.compile(glob.regex, re.DOTALL) for glob in self._globs)
        self._any = re.compile("|".join(f"(?:{glob.regex})" for glob in self._globs) or r"(?!)", re.DOTALL)

    def match(self, path: bytes) -> str | None:
        """Return the first pattern that hides this path or any of its ancestors, else None.

        ``path`` is relative to the workspace and canonical; ``b""`` is the workspace itself.
        """
        return self._first(decode_path(path))

    def match_names(self, parent: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
        """Return the hidden ones among the entries of one visible directory, with their pattern.

        ``parent`` is relative and canonical, ``b""`` for the root. For scans: one regular expression
        decides each name, whatever the number of patterns.
        """
        if not names:
            return {}
        # NUL is in no name. One decoding for the directory; a name alone is normalised as in its path.
        texts = decode_path(b"\0".join(names)).split("\0")
        prefix = decode_path(parent + b"/") if parent else ""
        is_hidden = self._any.match
        hidden: dict[bytes, str] = {}
        for name, text in zip(names, texts, strict=True):
            if is_hidden(prefix + text) and (pattern := self.match(_join(parent, name))) is not None:
                hidden[name] = pattern
        return hidden

    def hides_root(self) -> str | None:
        """Return the first pattern that leaves nothing of the workspace, else None."""
        return next((glob.pattern for glob in self._globs if glob.covers_everything), None)

    def _first(self, text: str) -> str | None:
        if not text:
            return next((glob.pattern for glob in self._globs if not glob.regex), None)
        if not self._any.match(text):
            return None
        for pattern, regex in zip(self.patterns, self._each, strict=True):
            if regex.match(text):
                return pattern
        return None


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def canonical_path(path: str | bytes) -> bytes | None:
    """Return a path an agent gave as relative to the workspace, or None when it lies outside or is malformed.

    Takes relative paths and absolute ones beneath ``/workspace``; ``b""`` is the workspace itself.
    ``..`` is resolved by its text. Only the result may be opened, beneath the workspace and without
    following links out of it: the given spelling can mean another file once symlinks are involved.
    """
    raw = _as_bytes(path)
    if raw is None:
        return None
    if raw.startswith(b"/"):
        # "//workspace" is "/workspace" to the kernel; the workspace prefix counts after "..", not before.
        segments = _resolve(raw.split(b"/"))
        if not segments or segments[0] != WORKSPACE[1:]:
            return None
        return b"/".join(segments[1:])
    beneath = _resolve([WORKSPACE[1:], *raw.split(b"/")])
    if not beneath or beneath[0] != WORKSPACE[1:]:
        return None
    return b"/".join(beneath[1:])


def decide_path(filesystem: FilesystemPolicy, path: str | bytes, *, is_write: bool) -> Decision:
    """Decide whether the agent may read or write a path.

    Rules: ``path.malformed``, ``path.outside_workspace``, ``filesystem.deny_patterns``, else
    ``path.workspace`` allows. A path that runs code on the reader's machine may be written here: it is
    flagged in the patch and refused when that is applied. Never raises for what an agent can send.
    """
    verb = "write" if is_write else "read"
    if _as_bytes(path) is None:
        return deny(
            "path.malformed",
            f"cannot {verb} {path!r:.200}: a path is 1 to {PATH_MAX} bytes without NUL; name one beneath ./",
        )
    canonical = canonical_path(path)
    if canonical is None:
        return deny(
            "path.outside_workspace",
            f"cannot {verb} {path!r:.200}: it lies outside the workspace; name a path beneath ./",
        )
    if is_write and not canonical:
        return deny(
            "path.malformed", f"cannot write {path!r:.200}: it is the workspace itself; name a file in it"
        )
    pattern = _compiled(filesystem.deny_patterns).match(canonical)
    if pattern is not None:
        return deny(
            "filesystem.deny_patterns",
            f"cannot {verb} {path!r:.200}: the policy hides it with {pattern!r}; work without that file",
        )
    return allow("path.workspace")


def _as_bytes(path: str | bytes) -> bytes | None:
    if isinstance(path, str):
        try:
            path = path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return None
    return path if path and b"\0" not in path and len(path) <= PATH_MAX else None


def _resolve(segments: Sequence[bytes]) -> list[bytes] | None:
    """Drop empty and ``.`` segments and resolve ``..``; None when it climbs above where it began.

    The kernel stays at ``/`` there; an agent that writes that is not heading into the workspace.
    A relative path that leaves the workspace and comes back (``../workspace/a``) is inside again.
    """
    out: list[bytes] = []
    for segment in segments:
        if segment == b"..":
            if not out:
                return None
            out.pop()
        elif segment not in (b"", b"."):
            out.append(segment)
    return out


@lru_cache(maxsize=64)
def _compiled(patterns: tuple[str, ...]) -> DenyPatterns:
    return DenyPatterns(patterns)
