"""Ask a person before an effect: the port, and the two answers that need no person.

An approval is bound to the exact bytes that were shown: the digest of the arguments goes into the
question and into the event, and the action cannot change in between (it is frozen).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Answerer = Literal["terminal", "yes_flag", "pre_approved", "no_terminal"]


@dataclass(frozen=True)
class Question:
    """What a person is asked to approve."""

    action_id: str
    tool: str
    text: str
    """The command line or path, raw: it must be shown with its control characters escaped."""
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
