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
from sandbox.session.charges import MAX_DESTINATIONS, OTHER, Charges
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


def test_bytes_are_charged_in_total_and_by_destination(record: Callable[..., dict[str, int]]) -> None:
    events = [*carried(1, "a.test", 3, 4), *carried(2, "b.test", 0, 5), *carried(3, "a.test", 1, 0)]
    assert record(*events) == {"egress_bytes": 13, "egress_bytes:a.test": 8, "egress_bytes:b.test": 5}


def test_a_refused_connection_costs_nothing(record: Callable[..., dict[str, int]]) -> None:
    refused = carried(1, "a.test", 0, 0)[0].model_copy(update={"verdict": "deny"})
    assert record(refused) == {}


def test_made_up_names_do_not_grow_what_was_spent(record: Callable[..., dict[str, int]]) -> None:
    meter = Meter({"egress_bytes:limited.test": 10})
    many = [e for n in range(MAX_DESTINATIONS + 50) for e in carried(n, f"{n}.test", 1, 0)]
    spent = record(*many, *carried(9999, "limited.test", 2, 0), meter=meter)
    assert spent["egress_bytes"] == MAX_DESTINATIONS + 52
    assert spent[f"egress_bytes:{OTHER}"] == 50
    assert spent["egress_bytes:limited.test"] == 2  # a limit is counted under its own name
    assert len(spent) == MAX_DESTINATIONS + 3


def test_absurd_claims_of_a_guest_leave_a_sum_that_can_be_recorded(
    record: Callable[..., dict[str, int]],
) -> None:
    assert record(*ran(MAX_AMOUNT), *ran(MAX_AMOUNT))["cpu_ms"] == MAX_AMOUNT
