"""Judge method and path of one request against a host's rules. Pure. D5

The path that is judged is the path that is forwarded: one canonical spelling, or a refusal.
"""

from __future__ import annotations

import re
from functools import lru_cache

from sandbox.policy.hosts import Refusal
from sandbox.policy.model import HostEntry

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_PATH = re.compile(rb"/[!-\"$->@-\[\]-~]*")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# Decoded or not, servers disagree on these: a separator for one is a letter for the next.
_AMBIGUOUS = frozenset(b"/\\%?#;") | frozenset(range(0x20)) | {0x7F}
_NO_WEBSOCKET = Refusal(
    "upgrade", "what a websocket carries cannot be judged; it needs a rule with websocket: true"
)


def judge_request(
    entry: HostEntry, method: str, path: bytes, *, is_websocket: bool = False
) -> bytes | Refusal:
    """Return the path to forward, query included, or why the request is refused.

    A request for a websocket needs a rule that says so.

    Without rules every method but TRACE passes and the path stays as sent. With rules, a request that
    no rule accepts is refused, and so is a path that servers could read in two ways.
    """
    if method == "TRACE":
        return Refusal("method_not_allowed", "TRACE would echo what the gateway adds or strips")
    if not entry.rules:
        return _NO_WEBSOCKET if is_websocket else path
    on_method = [rule for rule in entry.rules if method in rule.methods]
    if not on_method:
        allowed = ", ".join(sorted({name for rule in entry.rules for name in rule.methods}))
        return Refusal("method_not_allowed", f"{entry.host} accepts {allowed}")
    bare, mark, query = path.partition(b"?")
    canonical = canonical_path(bare)
    if isinstance(canonical, Refusal):
        return canonical
    accepting = [rule for rule in on_method if _glob(rule.path).fullmatch(canonical.decode("ascii"))]
    if not accepting:
        shown = ", ".join(rule.path for rule in on_method)
        return Refusal("path_not_allowed", f"{method} is allowed on {shown}")
    if is_websocket and not any(rule.websocket for rule in accepting):
        return _NO_WEBSOCKET
    return canonical + mark + query


def canonical_path(path: bytes) -> bytes | Refusal:
    """Return a path with unreserved escapes decoded and dot segments resolved; refuse what is ambiguous."""
    if not _PATH.fullmatch(path):
        return Refusal("bad_request", "the path holds a byte that must be percent-encoded")
    decoded = bytearray()
    position = 0
    for escape in _ESCAPE.finditer(path):
        decoded += path[position : escape.start()]
        if escape[1] is None:
            return Refusal("bad_request", "the path holds a broken percent-encoding")
        byte = int(escape[1], 16)
        if byte in _AMBIGUOUS:
            return Refusal("path_not_allowed", "the path hides a separator or control byte")
        decoded += bytes([byte]) if byte in _UNRESERVED else b"%%%02X" % byte
        position = escape.end()
    decoded += path[position:]
    kept: list[bytes] = []
    segments = bytes(decoded).split(b"/")[1:]
    for index, segment in enumerate(segments):
        is_last = index == len(segments) - 1
        name, parameter, _ = segment.partition(b";")
        if (parameter and name in (b".", b"..")) or (not segment and not is_last):
            return Refusal(
                "path_not_allowed", "the path has an empty segment or a parameter on a dot segment"
            )
        if segment == b"..":
            if not kept:
                return Refusal("path_not_allowed", "the path climbs above the root")
            kept.pop()
        if segment in (b".", b".."):
            # ``/a/.`` and ``/a/b/..`` name the directory: the slash stays.
            kept += [b""] if is_last else []
        else:
            kept.append(segment)
    return b"/" + b"/".join(kept)


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*|\*)", pattern)
    wild = {"**": ".*", "*": "[^/]*"}
    return re.compile("".join(wild.get(piece) or re.escape(piece) for piece in pieces))
