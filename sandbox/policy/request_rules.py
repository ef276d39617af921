"""Check the ``rules`` of a host as written: each must be able to match something. Pure. D5

Paths are judged in one canonical spelling; a glob in any other could never match, and whoever wrote it
would believe that it does.
"""

from __future__ import annotations

import re

from sandbox.policy.model import RequestRule

_METHOD = re.compile(r"[A-Z]{1,20}")
# What a canonical path may hold; a question mark begins the query, which no rule sees.
_GLOB = re.compile(r"(?:/|\*\*)[!$&'()*+,./:;<=>@\[\]^`{|}~\"%A-Za-z0-9_-]*")
_KEPT_ESCAPE = re.compile(r"%[0-9A-F]{2}")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_NEVER_ESCAPED = _UNRESERVED | frozenset(b"/\\%?#;\x7f") | frozenset(range(0x20))


def rule_problem(rule: RequestRule) -> str:
    """Return why a rule could never match as written; empty when it can."""
    if not rule.methods or not all(_METHOD.fullmatch(method) for method in rule.methods):
        return "rule methods are upper-case HTTP methods, at least one"
    if {"CONNECT", "TRACE"} & set(rule.methods):
        return "rule methods CONNECT and TRACE are always refused; drop them"
    if rule.websocket and "GET" not in rule.methods:
        return "rule has websocket: true without GET, with which every websocket begins"
    path = rule.path
    if not path.startswith(("/", "**")):
        return f"rule path {path!r} must start with / (a glob on the whole path)"
    if not _GLOB.fullmatch(path):
        return f"rule path {path!r} holds a character that no path has (the query is not judged)"
    if "***" in path:
        return f"rule path {path!r}: write * (within a segment) or ** (across segments)"
    segments = path.split("/")[1:]
    if any(segment.partition(";")[0] in (".", "..") for segment in segments) or "" in segments[:-1]:
        return f"rule path {path!r} has a segment that is empty, . or ..; judged paths have none"
    escapes = [path[at : at + 3] for at, char in enumerate(path) if char == "%"]
    if any(not _KEPT_ESCAPE.fullmatch(escape) or int(escape[1:], 16) in _NEVER_ESCAPED for escape in escapes):
        return f"rule path {path!r} has an escape that judged paths never have; write the character itself"
    return ""
