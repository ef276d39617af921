"""Record the programs that a command's processes started, within bounds. Telemetry: decides nothing. D6, D7

Code in the sandbox chooses how many programs it starts and what their arguments are. The guest reports a
bounded number for each command; here a session's record is bounded as well. What is left out is counted.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Literal

from sandbox.container.closed_shell import is_executable
from sandbox.container.spec import ClosedShell
from sandbox.events import Event, ExecObserved, excerpt
from sandbox.guest.messages import ExecSeen

MAX_EXECS = 50_000
"""``ExecObserved`` events of one session."""
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Of paths and arguments in one session's record, as JSON holds them."""
MAX_NAMES = 5
PATH_CHARS = 1024
ARGUMENT_CHARS = 256

Refusal = Literal["shell.blocked_commands", "shell.mode closed"]


class ExecRecord:
    """The execs of one session."""

    def __init__(
        self,
        record: Callable[[Event], None],
        blocked_paths: tuple[str, ...] = (),
        closed: ClosedShell | None = None,
    ) -> None:
        """``record`` writes one event, or raises RecordError.

        ``blocked_paths`` are covered by the refusal program, absolute and with links resolved; ``closed`` are
        the rules of a closed shell.
        """
        self._record = record
        self._blocked = frozenset(blocked_paths)
        self._closed = closed
        self._execs_left, self._bytes_left = MAX_EXECS, MAX_TEXT_BYTES

    def of_action(self, action_id: str) -> ActionExecs:
        """Return the execs of one command, to be told of each."""
        return ActionExecs(action_id, self)

    def refusal(self, seen: ExecSeen) -> Refusal | None:
        """Say which rule keeps that program from running, as far as its path tells; None when it runs."""
        path = _text(seen.found or seen.path)
        if path in self._blocked:
            return "shell.blocked_commands"
        if path and self._closed is not None and not is_executable(self._closed, path):
            return "shell.mode closed"
        return None

    def add(self, event: ExecObserved) -> bool:
        """Record one exec; False when the session has no room for it. Raises RecordError."""
        size = sum(map(_json_bytes, (event.claimed_path, *event.argv)))
        if self._execs_left == 0 or size > self._bytes_left:
            return False
        self._execs_left -= 1
        self._bytes_left -= size
        self._record(event)
        return True


class ActionExecs:
    """The execs of one action, as they come. Call it with each."""

    def __init__(self, action_id: str, record: ExecRecord) -> None:
        self.unrecorded = 0
        """Execs that were seen and are not in the record."""
        self._action_id = action_id
        self._record = record
        self._refused: dict[str, Refusal] = {}

    def __call__(self, seen: ExecSeen) -> None:
        """Record one exec, or count it. Raises RecordError."""
        rule = self._record.refusal(seen)
        if rule and len(self._refused) < MAX_NAMES:
            self._refused.setdefault(_name(seen), rule)
        event = ExecObserved(
            action_id=self._action_id,
            claimed_pid=seen.pid,
            claimed_parent=seen.parent,
            claimed_path=excerpt(_text(seen.path), PATH_CHARS),
            argv=[excerpt(_text(argument), ARGUMENT_CHARS) for argument in seen.argv],
            argv_is_cut=seen.is_cut,
            verdict="refused" if rule else "allowed",
        )
        if not self._record.add(event):
            self.unrecorded += 1

    def guidance(self, said: str) -> list[str]:
        """Return one line for each refused program that the output (``said``) does not name as such."""
        verbs: dict[Refusal, str] = {
            "shell.blocked_commands": "blocked",
            "shell.mode closed": "not allowed",
        }
        lines = (f"'{name}' is {verbs[rule]} by policy ({rule})" for name, rule in self._refused.items())
        return [line for line in lines if line not in said]


def _name(seen: ExecSeen) -> str:
    # As the refusal program writes it, so that nothing is said twice.
    name = posixpath.basename(_text(seen.path))
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in name[:128])


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _json_bytes(text: str) -> int:
    # JSON writes a control character in six bytes.
    return len(text) if text.isascii() and text.isprintable() else 6 * len(text)
