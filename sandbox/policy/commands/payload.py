"""What a command turns out to run, as values. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.policy.commands.shell import Assignment, Word

Words = Sequence[Word]
"""The words after a program's name."""


@dataclass(frozen=True)
class Refused:
    """The command as a whole is refused, by this rule."""

    rule: str
    reason: str
    """Continues "NAME was refused: "."""


@dataclass(frozen=True)
class Payload:
    """The command runs other commands. An empty payload is a command that runs nothing else."""

    commands: tuple[tuple[Word, ...], ...] = ()
    scripts: tuple[str, ...] = ()
    """Shell text that is run."""
    packages: tuple[tuple[Word, ...], ...] = ()
    """What a package runner starts: any package's program, so only the blocked ones are refused."""
    assignments: tuple[Assignment, ...] = ()
    is_transparent: bool = False
    """The wrapper adds no reach of its own and needs no listing."""
    knows_functions: bool = False
    """The payload runs in the same shell, where functions of the line exist."""


Unwrapped = Payload | Refused | None
"""None: not a wrapper."""

UNKNOWN = Word(None, "…", may_split=True)
"""Arguments that arrive at run time."""


def dynamic(word: Word) -> Refused:
    """Refuse a command because of a word that is only known at run time."""
    return Refused(
        "shell.dynamic_program",
        f"{word.raw[:60]!r} is only known when it runs, and could be an option or a program; write it out",
    )
