"""The result is a fold of the events, bounded, in a shape that is published."""

import json
from datetime import UTC, datetime
from typing import get_args

from sandbox.errors import RunStopped
from sandbox.events import (
    BudgetReserved,
    BudgetSettled,
    DecisionMade,
    EgressConnection,
    Event,
    ExecObserved,
    ModelCall,
    ModelCallFailed,
    ModelReply,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.ledger import Entry
from sandbox.resources import shipped
from sandbox.session.result import (
    EXIT_CODES,
    MAX_DESTINATIONS,
    OTHER_HOSTS,
    ResultFold,
    RunResult,
    RunStatus,
)


def fold(*events: Event) -> ResultFold:
    folded = ResultFold()
    for seq, event in enumerate(events, 1):
        folded(Entry(seq, datetime.now(UTC), "", event, ""))
    return folded


def asked(action: str, summary: str = "make") -> Event:
    return ToolCall(action_id=action, tool="run_command", arguments_blake3="0" * 64, summary=summary)


def decided(action: str, verdict: str) -> Event:
    return DecisionMade(action_id=action, verdict=verdict, rule="r", reason="because")  # type: ignore[arg-type]


def connection(number: int, host: str, phase: str = "open", verdict: str = "deny", **more: int) -> Event:
    fields = {"connection": number, "phase": phase, "verdict": verdict, "reason": "x", "rule": "r"}
    return EgressConnection.model_validate({**fields, "host": host, "port": 443, **more})


def test_the_published_schema_is_the_one_of_the_model() -> None:
    published = json.loads(shipped("policy/schemas/run-result.json").read_text(encoding="utf-8"))
    assert published.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert published == RunResult.model_json_schema()


def test_every_status_has_an_exit_code_of_its_own() -> None:
    assert set(EXIT_CODES) == set(get_args(RunStatus))
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert {stopped.status for stopped in RunStopped.__subclasses__()} <= set(EXIT_CODES)
    assert not {1, 2, 3} & set(EXIT_CODES.values())


def test_an_action_is_what_was_asked_decided_and_done() -> None:
    done = ToolResult(action_id="a1", ok=True, exit_code=1, wall_ms=5, output_bytes=9, excerpt="red")
    first, second, third = fold(
        asked("a1"), decided("a1", "allow"), done, asked("a2"), decided("a2", "deny"), asked("a3"),
        decided("a3", "confirm"),
    ).actions  # fmt: skip
    assert (first.ok, first.exit_code, first.verdict) == (True, 1, "allow")
    assert (second.ok, second.verdict, second.reason) == (None, "deny", "because")
    assert third.verdict == "confirm"  # the run ended before the answer


def test_an_action_counts_the_programs_it_started_recorded_or_not() -> None:
    program = ExecObserved(action_id="a1", claimed_pid=7, argv=["make"])
    done = ToolResult(action_id="a1", ok=True, execs_unrecorded=40)
    once = (asked("a1"), decided("a1", "allow"), program, program, done)
    (first,) = fold(*once).actions
    assert first.execs == 42
    (again,) = fold(*once, asked("a1")).actions  # A model may use an id again: the newest is reported.
    assert again.execs == 0


def test_money_is_what_was_charged_kept_reservations_included() -> None:
    def call(model: str, attempt: int, reservation: str) -> list[Event]:
        return [
            BudgetReserved(reservation=reservation, amounts={"usd_nano": 1000}),
            ModelCall(
                call_id="c", attempt=attempt, model=model, request_blake3="", input_tokens_bound=1,
                max_tokens=1, reservation=reservation,
            ),
        ]  # fmt: skip

    failed = ModelCallFailed(
        call_id="c", attempt=1, kind="stream_broken", http_status=200, message="", retry_in_ms=None
    )
    reply = ModelReply(
        call_id="c", attempt=2, response_model="b", response_id=None, finish_reason="end", input_tokens=3,
        cached_input_tokens=0, output_tokens=4, usage_reported=True, text_blake3="", text_excerpt="",
        tool_calls=0,
    )  # fmt: skip
    folded = fold(
        *call("a", 1, "s/1"),
        BudgetSettled(reservation="s/1", amounts={"usd_nano": 1000}, kept=True),
        failed,
        *call("b", 2, "s/2"),
        BudgetSettled(reservation="s/2", amounts={"usd_nano": 7}, kept=False),
        reply,
    )
    first, second = folded.models
    assert (first.model, first.calls, first.failed_calls, first.cost_usd) == ("a", 1, 1, 1e-6)
    assert (second.input_tokens, second.output_tokens, second.cost_usd) == (3, 4, 7e-9)
    assert folded.cost_usd == 1.007e-6


def test_connections_to_one_destination_are_added_up() -> None:
    (line,) = fold(
        connection(1, "a.test", verdict="allow"),
        connection(1, "a.test", "close", "allow", bytes_up=3, bytes_down=4),
        connection(2, "a.test", verdict="allow"),
    ).egress
    assert (line.connections, line.bytes_up, line.bytes_down) == (2, 3, 4)


def test_made_up_names_do_not_grow_the_result() -> None:
    lines = fold(*(connection(n, f"{n}.test") for n in range(MAX_DESTINATIONS + 70))).egress
    assert len(lines) == MAX_DESTINATIONS + 1
    assert (lines[-1].host, lines[-1].port, lines[-1].connections) == (OTHER_HOSTS, None, 70)
    assert lines[0].host == "0.test"
