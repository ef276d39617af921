"""Ask a person before an effect. The port, the two answers that need no person, and safe display.

An approval is bound to the exact bytes that were shown: the digest of the arguments goes into the
question and into the event, and the action cannot change in between (it is frozen).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal, Protocol

Answerer = Literal["terminal", "yes_flag", "pre_approved", "no_terminal"]


@dataclass(frozen=True)
class Question:
    """What a person is asked to approve."""

    action_id: str
    tool: str
    text: str
    """The command line or path, raw: show it through ``escape_for_display`` only."""
    reason: str
    arguments_blake3: str


@dataclass(frozen=True)
class Answer:
    """Yes or no, and who said so."""

    is_approved: bool
    by: Answerer


class Confirmer(Protocol):
    """Someone who can be asked."""

    async def ask(self, question: Question) -> Answer:
        """Wait for an answer. Anything but a clear yes is a no."""


class NobodyThere:
    """No terminal: every question is answered no."""

    async def ask(self, question: Question) -> Answer:
        """Deny."""
        return Answer(False, "no_terminal")


class AlwaysYes:
    """The operator passed ``--yes``."""

    async def ask(self, question: Question) -> Answer:
        """Approve; policy denials never get here."""
        return Answer(True, "yes_flag")


def escape_for_display(text: str) -> str:
    """Make text safe to show on a terminal: controls, bidi marks and invisibles become ``\\u`` escapes.

    An attacker who writes the command also writes what the reviewer sees; a carriage return or a
    right-to-left override must not be able to hide half of it.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == " ":
        return character
    # Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Cn unassigned, Z* separators.
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}:
        return repr(character)[1:-1] if character < "\x80" else f"\\u{{{ord(character):x}}}"
    return character
