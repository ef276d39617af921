"""Turn one gitignore-like glob into a regular expression over a canonical, relative path. Pure.

Grammar, as in gitignore where nothing else is said:

- ``**/`` is any number of directories, zero included; ``*`` and ``?`` stay within one segment;
  ``?`` is one character (or one byte that is not UTF-8).
- A pattern without a slash, or with only a trailing one, matches at any depth; any other slash, and a
  leading ``/`` or ``./``, anchors it at the root.
- ``[abc]``, ``[a-z]``, ``[!a]`` or ``[^a]``, ``[[:alpha:]]``; a ``[`` that no ``]`` closes is itself.
- A backslash takes the next character literally; at the end of a pattern it is itself.
- A match covers everything beneath it. ``dir/**`` covers the directory as well, unlike gitignore; and a
  trailing slash covers a file of that name too, because what is a file now can be a directory later.

Refused, because they would silently cover nothing: an empty pattern, ``!negation``, ``..``, NUL, and a
set that no character is in (``[z-a]``).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from sandbox.errors import PolicyError

_POSIX_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r" \t",
    "cntrl": r"\x01-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r" \t\n\r\f\v",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}

Token = tuple[Literal["star", "one", "set", "literal"], str]


@dataclass(frozen=True)
class Glob:
    """One compiled pattern. ``regex`` is matched from the start of a path that ``decode_path`` gave."""

    pattern: str
    regex: str
    """Matches the path or one of its ancestors; capture-free, so that many can be joined."""
    covers_everything: bool
    """True when no path at all is left: ``**``, ``*``, ``/``, ``**/*`` and the like."""


def compile_glob(pattern: str) -> Glob:
    """Compile a pattern; raises PolicyError, naming it, for one that could never match."""
    if not pattern.strip():
        raise PolicyError("cannot use an empty path pattern: it matches nothing; remove it")
    if pattern.startswith("!"):
        raise PolicyError(
            f"cannot use path pattern {pattern!r}: there is no negation here; remove it, "
            "or write \\! for a name that begins with '!'"
        )
    if "\0" in pattern:
        raise PolicyError(f"cannot use path pattern {pattern!r}: no name contains NUL; remove it")
    segments = _split(unicodedata.normalize("NFC", pattern))
    if ".." in segments:
        raise PolicyError(
            f"cannot use path pattern {pattern!r}: '..' never matches inside the workspace; "
            "write it relative to the workspace"
        )
    while segments and segments[-1] == "**":
        segments.pop()
    named = [segment for segment in segments if segment != "**"]
    tokens = [_tokens(segment, pattern) for segment in named]
    covers_everything = not named or (len(named) == 1 and segments[-1] == named[0] and _is_any(tokens[0]))
    return Glob(pattern, _regex(segments, pattern), covers_everything)


def decode_path(path: bytes) -> str:
    """Return the text that globs are matched against.

    A byte that is not UTF-8 becomes one lone surrogate. Canonically equivalent spellings become the
    same text (NFC): nobody can tell them apart in a policy file, so no rule may.
    """
    text = path.decode("utf-8", "surrogateescape")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _split(pattern: str) -> list[str]:
    """Cut a pattern into segments; ``**`` first when it is not anchored."""
    segments = [segment for segment in pattern.split("/") if segment not in ("", ".")]
    is_anchored = pattern.startswith(("/", "./")) or len(segments) != 1
    return segments if is_anchored or segments == ["**"] else ["**", *segments]


def _regex(segments: list[str], pattern: str) -> str:
    """Join the segments. Groups are atomic: names come from an attacker, and the first place where a
    run of segments fits is always as good as a later one, so there is nothing to go back for."""
    runs: list[list[str]] = [[]]
    for segment in segments:
        if segment == "**":
            runs.append([])
        else:
            runs[-1].append(_segment_regex(_tokens(segment, pattern)))
    out = "".join(f"{segment}(?:/|\\Z)" for segment in runs[0])
    for run in runs[1:]:
        if run:
            out += "(?>(?:[^/]+/)*?" + "".join(f"{segment}(?:/|\\Z)" for segment in run) + ")"
    return out


def _segment_regex(tokens: list[Token]) -> str:
    """Translate one segment. Between two stars the text has a fixed length: again atomic."""
    chunks: list[str] = [""]
    for kind, text in tokens:
        if kind == "star":
            chunks.append("")
        else:
            chunks[-1] += text
    if len(chunks) == 1:
        return chunks[0]
    middle = "".join(f"(?>[^/]*?{chunk})" for chunk in chunks[1:-1] if chunk)
    # What follows a segment is a slash or the end, so the last chunk is pinned by one look ahead.
    # Without a first chunk the lookahead keeps a star from matching the empty end of a path.
    return f"(?=[^/]){chunks[0]}{middle}[^/]*{chunks[-1]}(?=/|\\Z)"


def _tokens(segment: str, pattern: str) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    while at < len(segment):
        char = segment[at]
        at += 1
        if char == "*":
            if not tokens or tokens[-1][0] != "star":
                tokens.append(("star", ""))
        elif char == "?":
            tokens.append(("one", "[^/]"))
        elif char == "\\" and at < len(segment):
            tokens.append(("literal", re.escape(segment[at])))
            at += 1
        elif char == "[" and (end := _set_end(segment, at)) is not None:
            tokens.append(("set", _set_regex(segment[at:end], pattern)))
            at = end + 1
        else:
            tokens.append(("literal", re.escape(char)))
    return tokens


def _is_any(tokens: list[Token]) -> bool:
    """Whether a segment matches every name: stars, and at most one ``?``."""
    kinds = [kind for kind, _ in tokens]
    return "star" in kinds and kinds.count("one") <= 1 and set(kinds) <= {"star", "one"}


def _set_end(segment: str, at: int) -> int | None:
    """Return where the set that begins at ``at`` closes, or None: then its bracket is literal."""
    if at < len(segment) and segment[at] in "!^":
        at += 1
    if at < len(segment) and segment[at] == "]":
        at += 1
    while at < len(segment):
        if segment[at] == "]":
            return at
        if segment.startswith("[:", at) and (close := segment.find(":]", at + 2)) != -1:
            at = close + 2
        else:
            at += 2 if segment[at] == "\\" else 1
    return None


def _set_regex(body: str, pattern: str) -> str:
    is_negated = body[0] in "!^"
    at = 1 if is_negated else 0
    parts: list[str] = []
    while at < len(body):
        if body.startswith("[:", at) and (close := body.find(":]", at + 2)) != -1:
            name = body[at + 2 : close]
            if name not in _POSIX_CLASSES:
                raise PolicyError(
                    f"cannot use path pattern {pattern!r}: no character class is called {name!r}; "
                    f"known: {', '.join(_POSIX_CLASSES)}"
                )
            parts.append(_POSIX_CLASSES[name])
            at = close + 2
            continue
        low, at = _set_char(body, at)
        high = low
        if at + 1 < len(body) and body[at] == "-":
            high, at = _set_char(body, at + 1)
        if low > high:
            raise PolicyError(
                f"cannot use path pattern {pattern!r}: the range {low}-{high} is empty; "
                f"write {high}-{low}, or \\[ for a bracket in a name"
            )
        parts.append(f"{re.escape(low)}-{re.escape(high)}")
    inside = "".join(parts)
    return f"[^/{inside}]" if is_negated else f"(?!/)[{inside}]"


def _set_char(body: str, at: int) -> tuple[str, int]:
    if body[at] == "\\" and at + 1 < len(body):
        at += 1
    return body[at], at + 1
