"""Read and check ``network.inject`` as written. Pure: no value is looked up here. D5"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sandbox.policy.model import HostEntry, Injection

MIN_SECRET = 8
"""Characters. What is shorter turns up in other text by chance: requests would be refused for nothing."""

_REFERENCE = re.compile(r"\$\{(?:file:(/[^}]+)|([A-Za-z_][A-Za-z0-9_]*))\}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]+")
_PLACEHOLDER = re.compile(rf"[!-~]{{{MIN_SECRET},256}}")
# Fields that frame, route or qualify a message belong to the gateway alone.
_RESERVED = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "if-range",
        "keep-alive",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_RESERVED_PREFIXES = ("proxy-", "sec-websocket-", "x-http-method", "x-method-override", "x-original-url")


def references(value: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end, variable and file path of each reference; either of the last two is empty."""
    for match in _REFERENCE.finditer(value):
        yield match.start(), match.end(), match[2] or "", match[1] or ""


def injection_problem(injection: Injection, entry: HostEntry | None) -> str:
    """Return why an injection cannot hold; empty when it can. ``entry`` is the host's own, if it has one."""
    header, value = injection.header, injection.value
    if entry is None or entry.host.startswith("*"):
        return "inject needs an exact host that is on the allowlist"
    if not entry.inspect:
        return "inject needs inspect: true; a credential cannot be put into TLS that is not opened"
    if not _HEADER_NAME.fullmatch(header):
        return f"inject header {header!r} is not a header name"
    if header.lower() in _RESERVED or header.lower().startswith(_RESERVED_PREFIXES):
        return f"inject header {header!r} frames or routes requests; it is the gateway's own"
    if any(ord(char) < 0x20 or ord(char) > 0x7E for char in value) or value != value.strip(" "):
        return "inject value holds a control or non-ASCII character, or a blank at its end"
    if "$" in _REFERENCE.sub("", value):
        return "inject value holds a $ that is neither ${NAME} nor ${file:/path}"
    placeholder = injection.placeholder
    if injection.mode == "replace_placeholder" and placeholder is None:
        return "inject mode replace_placeholder needs a placeholder"
    if placeholder is not None and not _PLACEHOLDER.fullmatch(placeholder):
        return f"inject placeholder needs at least {MIN_SECRET} visible ASCII characters"
    if placeholder is not None and placeholder in value:
        return "inject placeholder is a part of the value"
    return ""
