"""One line on stderr that says what a run is doing. Silent when stderr is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from sandbox.cli.display import printable
from sandbox.events import (
    ContainerStarted,
    DecisionMade,
    ModelCall,
    ModelCallFailed,
    ModelFallback,
    SessionStarted,
    ToolCall,
)
from sandbox.provenance.ledger import Entry


class Progress:
    """A listener of the session's events."""

    def __init__(self, *, is_quiet: bool) -> None:
        is_shown = sys.stderr.isatty() and not is_quiet
        self._console = Console(stderr=True, quiet=not is_shown, highlight=False)
        self._status: Status | None = self._console.status("starting") if is_shown else None
        self._calls = 0
        self._last = ""

    def __enter__(self) -> Progress:
        self.resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Take the line away, e.g. while someone types an answer."""
        if self._status is not None:
            self._status.stop()

    def resume(self) -> None:
        """Draw the line again."""
        if self._status is not None:
            self._status.start()

    def on_text(self, text: str) -> None:
        """Note that the model is speaking; its words are in the ledger, not on the terminal."""
        self._show("the model is answering")

    def __call__(self, entry: Entry) -> None:
        """Show one event."""
        match entry.event:
            case SessionStarted(session_id=session):
                self._console.print(f"session [bold]{session}[/bold]")
            case ContainerStarted(started_ms=milliseconds):
                self._console.print(f"container ready after {milliseconds} ms")
            case ModelCall(model=model):
                self._show(f"asking {model}")
            case ModelCallFailed(message=message, retry_in_ms=wait):
                then = "giving up on it" if wait is None else f"trying again in {wait / 1000:.1f} s"
                self._console.print(f"model call failed: {printable(message)}; {then}", markup=False)
            case ModelFallback(to_model=model, reason=reason):
                self._console.print(f"falling back to {model}: {printable(reason)}", markup=False)
            case ToolCall(tool=tool, summary=summary):
                self._calls += 1
                self._last = f"{printable(tool)}: {printable(summary)[:80]}"
                self._show(self._last)
            case DecisionMade(verdict="deny", rule=rule):
                self._console.print(f"denied  {self._last}  ({printable(rule)})", markup=False)
            case _:
                pass

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(escape(f"{self._calls} tool calls, {text}"))
