"""Record, then charge, then act: every event goes to the ledger first, then to whoever folds it. D7"""

from __future__ import annotations

from collections.abc import Callable

from sandbox.events import Event
from sandbox.provenance.ledger import Entry, Ledger

Listener = Callable[[Entry], None]


class Recorder:
    """The one way an event comes into being.

    Budget, result, progress and queries never talk to each other: each listens here. An event that
    cannot be written raises RecordError and reaches no listener: what is not recorded did not happen.
    """

    def __init__(self, ledger: Ledger, listeners: tuple[Listener, ...] = ()) -> None:
        self._ledger = ledger
        self._listeners = listeners

    def record(self, event: Event) -> None:
        """Append to the ledger, then tell every listener in order."""
        entry = self._ledger.append(event)
        for listener in self._listeners:
            listener(entry)
