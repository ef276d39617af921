"""What effects used counts as spent, bounded whatever the sandbox claims or makes up."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.budget import MAX_AMOUNT, Meter
from sandbox.events import (
    DecisionMade,
    EgressConnection,
    Event,
    ExecObserved,
    SessionEnded,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.ledger import Ledger
from sandbox.provenance.verify import verify_ledger
from sandbox.session.charges import Charges
from sandbox.session.recorder import Recorder
from tests.unit.session.started import STARTED


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Record events and return what then counts as spent; the ledger must verify."""

    def run(*events: Event, meter: Meter | None = None) -> dict[str, int]:
        meter = meter or Meter({})
        ledger = Ledger.create(tmp_path / "ledger.jsonl", clock=lambda: datetime.now(UTC))
        recorder = Recorder(ledger, (Charges(meter),))
        for event in (STARTED, *events, SessionEnded(status="completed", reason="", spent=meter.spent())):
            recorder.record(
                event.model_copy(update={"spent": meter.spent()}) if event.type == "SessionEnded" else event
            )
        ledger.close()
        assert verify_ledger(tmp_path / "ledger.jsonl").problem is None
        return meter.spent()

    return run


def ran(cpu_ms: int) -> tuple[Event, ...]:
    return (
        ToolCall(action_id="a1", tool="run_command", arguments_blake3="0" * 64, summary="make"),
        DecisionMade(action_id="a1", verdict="allow", rule="r", reason=""),
        ExecObserved(action_id="a1", claimed_pid=7, argv=["make"]),
        ToolResult(action_id="a1", ok=True, cpu_ms=cpu_ms),
    )


def carried(number: int, host: str, up: int, down: int) -> tuple[Event, ...]:
    opened = EgressConnection(
        connection=number, phase="open", verdict="allow", reason="ok", rule="r", host=host, port=443
    )
    return opened, opened.model_copy(update={"phase": "close", "bytes_up": up, "bytes_down": down})


def test_cpu_time_and_programs_are_charged(record: Callable[..., dict[str, int]]) -> None:
    assert record(*ran(30), *ran(12)) == {"cpu_ms": 42, "execs": 2}


def test_programs_that_were_only_counted_are_charged_too(record: Callable[..., dict[str, int]]) -> None:
    result = ToolResult(action_id="a1", ok=True, execs_unrecorded=5)
    assert record(*ran(0)[:-1], result) == {"execs": 6}


def test_bytes_are_not_charged_a_second_time_when_a_connection_closes(
    record: Callable[..., dict[str, int]],
) -> None:
    assert record(*carried(1, "a.test", 3, 4)) == {}


def test_absurd_claims_of_a_guest_leave_a_sum_that_can_be_recorded(
    record: Callable[..., dict[str, int]],
) -> None:
    assert record(*ran(MAX_AMOUNT), *ran(MAX_AMOUNT))["cpu_ms"] == MAX_AMOUNT
