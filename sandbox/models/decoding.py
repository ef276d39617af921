"""Read what a model or its server sent: fragments, JSON, counts, waits. Trusts none of it; pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

MAX_REPLY_CHARS = 16 * 1024 * 1024
"""Longest reply that is kept in memory, all blocks together; a longer one is a broken stream."""
MAX_JSON_DEPTH = 64
"""Deepest tool input that is accepted: serialisers recurse, and a hostile reply must not end the process."""
MAX_TOKEN_COUNT = 10**9
"""Largest token count that is believed; money computed from it stays within canonical JSON's integers."""


class TextAssembler:
    """Join fragments of text that may be cut anywhere, also between the halves of a surrogate pair."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._held = ""

    def feed(self, fragment: str) -> str:
        """Take a fragment; return what can be shown already, always encodable as UTF-8."""
        pending = self._held + fragment
        # A high surrogate at the end waits: its other half is the start of the next fragment.
        cut = len(pending) - 1 if pending and "\ud800" <= pending[-1] <= "\udbff" else len(pending)
        self._held = pending[cut:]
        shown = clean_text(pending[:cut])
        self._parts.append(shown)
        return shown

    def text(self) -> str:
        """Return everything fed so far, lone surrogates replaced."""
        return "".join(self._parts) + clean_text(self._held)


def clean_text(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, so that the text can be sent and recorded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def one_line(text: str, limit: int = 400) -> str:
    """Make a server's message safe to show in one line: control characters escaped, length limited."""
    clean = clean_text(text)[: limit + 1]
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in clean)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def parse_json(text: str) -> Any:
    """Parse JSON as RFC 8259 has it. Raises ValueError, also for what Python alone would accept.

    Refused: NaN and infinities, a key that appears twice (readers disagree on which one counts), and
    nesting beyond ``MAX_JSON_DEPTH``.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_pairs)
    except RecursionError as exc:
        raise ValueError("JSON is nested too deeply") from exc
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        raise ValueError(f"JSON is nested deeper than {MAX_JSON_DEPTH}")
    return value


def parse_tool_input(raw: str) -> dict[str, Any] | None:
    """Return a tool's arguments, or None when the text is not one JSON object. Empty text is ``{}``.

    Escaped lone surrogates make it None too: such a string could neither be recorded nor sent again.
    """
    if not raw.strip():
        return {}
    try:
        value = parse_json(raw)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def arguments_to_send(arguments: dict[str, Any] | None, raw: str) -> dict[str, Any]:
    """Return the object that stands for a tool use in the context; unparsable text is wrapped, not lost."""
    return {"INVALID_JSON": clean_text(raw)} if arguments is None else arguments


def token_count(value: object) -> int | None:
    """Return a reported count, or None when it cannot be one: not whole, negative or absurd."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_COUNT:
        return value
    return None


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds a server asks to wait; None when it does not say or cannot be understood.

    ``retry-after-ms`` wins over ``retry-after``, which is seconds or an HTTP date; ``now`` is Unix time.
    A moment in the past is 0.
    """
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice")
    return unique


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return any(isinstance(node, dict | list) for node in level)
