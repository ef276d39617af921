"""What an agent may have done for it, as values. Validated before they get here; decided in ``broker``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scrutiny:
    """What the model said about its own action. It may only raise scrutiny, never lower it. D9"""

    confidence: float | None = None
    requires_review: bool = False


@dataclass(frozen=True)
class ReadFile:
    """Read a text file of the workspace."""

    path: str
    offset: int = 0
    """Bytes to skip."""


@dataclass(frozen=True)
class ListFiles:
    """List names beneath a directory of the workspace."""

    path: str = "."
    is_recursive: bool = True


@dataclass(frozen=True)
class SearchFiles:
    """Find lines that match an extended regular expression."""

    pattern: str
    path: str = "."


@dataclass(frozen=True)
class CreateFile:
    """Create a file that does not exist yet."""

    path: str
    content: str


@dataclass(frozen=True)
class ModifyFile:
    """Replace one exact passage of a file; the passage must occur exactly once."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class RunCommand:
    """Run one shell command line in the workspace."""

    command: str
    timeout_seconds: int | None = None
    """None: the policy's ``limits.command_seconds``, which also bounds it."""


@dataclass(frozen=True)
class Unavailable:
    """Something this runner knows by name but does not offer; always denied, with the reason."""

    tool: str
    rule: str
    reason: str
    summary: str


Operation = ReadFile | ListFiles | SearchFiles | CreateFile | ModifyFile | RunCommand | Unavailable


@dataclass(frozen=True)
class Action:
    """One operation the agent asked for, with the exact bytes it was asked in."""

    id: str
    """The model's id of the tool call, unique within the session."""
    tool: str
    operation: Operation
    arguments: bytes
    """Canonical JSON of the arguments: what a person's approval is bound to."""
    scrutiny: Scrutiny = Scrutiny()

    @property
    def summary(self) -> str:
        """Return what a reader needs to recognise the action: the command line, or the path."""
        match self.operation:
            case RunCommand(command=command):
                return command
            case SearchFiles(pattern=pattern, path=path):
                return f"{pattern} in {path}"
            case Unavailable(summary=summary):
                return summary
            case _:
                return self.operation.path


@dataclass(frozen=True)
class Outcome:
    """What an action came to, as the agent is told."""

    verdict: Literal["done", "failed", "denied"]
    """``failed``: allowed, and it did not work. A command that exits non-zero is ``done``."""
    content: str
    """Text for the model; bounded."""
