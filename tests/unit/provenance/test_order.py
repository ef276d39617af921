"""What must come before what: an honest ledger passes, and each broken promise is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.events import (
    BudgetReserved,
    BudgetSettled,
    ConfirmationGiven,
    DecisionMade,
    EgressConnection,
    Event,
    ExecObserved,
    ModelCall,
    ModelCallFailed,
    SessionEnded,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.order import Order
from sandbox.provenance.verify import verify_ledger
from tests.unit.provenance.recorded import events, name, started, write_ledger

CALL = ToolCall(action_id="a", tool="run_command", arguments_blake3=name("x"), summary="x")
ALLOW = DecisionMade(action_id="a", verdict="allow", rule="r", reason="")
DENY = DecisionMade(action_id="a", verdict="deny", rule="r", reason="")
CONFIRM = DecisionMade(action_id="a", verdict="confirm", rule="r", reason="")
YES = ConfirmationGiven(action_id="a", approved=True, by="terminal", arguments_blake3=name("x"))
NO = ConfirmationGiven(action_id="a", approved=False, by="terminal", arguments_blake3=name("x"))
EXEC = ExecObserved(action_id="a", claimed_pid=1, argv=["x"])
DONE = ToolResult(action_id="a", ok=True)
MONEY = BudgetReserved(reservation="s/1", amounts={"usd_nano": 5})
SETTLED = BudgetSettled(reservation="s/1", amounts={"usd_nano": 4}, kept=False)
MODEL = ModelCall(
    call_id="m", attempt=1, model="m", request_blake3=name(""), input_tokens_bound=1, max_tokens=1
)
FAILED = ModelCallFailed(
    call_id="m", attempt=1, kind="connection", http_status=None, message="", retry_in_ms=None
)
OPENED = EgressConnection(
    connection=1, phase="open", verdict="allow", reason="ok", rule="r", host="h.example", port=443
)
CLOSED = OPENED.model_copy(update={"phase": "close"})


def end(**spent: int) -> SessionEnded:
    return SessionEnded(status="completed", reason="", spent=spent)


def judge(*after_start: Event) -> str | None:
    order = Order()
    answers = [order.check(event) for event in (started(), *after_start)]
    assert all(answer is None for answer in answers[:-1]), answers
    return answers[-1]


@pytest.mark.parametrize(
    "honest",
    [
        [CALL, ALLOW, EXEC, DONE],
        [CALL, CONFIRM, YES, DONE],
        [CALL, CONFIRM, YES, ALLOW, EXEC, DONE],
        [CALL, CONFIRM, NO, DENY],
        [CALL, DENY, CALL, ALLOW, DONE],
        [MONEY, MODEL, FAILED, MODEL.model_copy(update={"attempt": 2}), SETTLED],
        [MONEY, MODEL.model_copy(update={"reservation": "s/1"})],
        [OPENED, CLOSED, OPENED.model_copy(update={"connection": 2, "verdict": "deny"})],
        [MONEY, SETTLED, end(usd_nano=4)],
        [MONEY, SETTLED, end(usd_nano=5, tokens=1)],
    ],
)
def test_an_honest_order_passes(honest: list[Event]) -> None:
    assert judge(*honest) is None


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ([started()], "starts a second time"),
        ([end(), CALL], "follows SessionEnded"),
        ([end(), end()], "follows SessionEnded"),
        ([ALLOW], "not recorded before"),
        ([DONE], "no allowing decision"),
        ([CALL, DONE], "no allowing decision"),
        ([CALL, EXEC], "no allowing decision"),
        ([CALL, DENY, EXEC], "no allowing decision"),
        ([CALL, DENY, DONE], "no allowing decision"),
        ([CALL, CONFIRM, DONE], "no allowing decision"),
        ([CALL, CONFIRM, NO, DONE], "no allowing decision"),
        ([CALL, ALLOW, CALL, DONE], "no allowing decision"),
        ([CALL, DENY, ALLOW], "was denied and is decided again"),
        ([CALL, CONFIRM, ALLOW], "without the confirmation"),
        ([CALL, CONFIRM, NO, ALLOW], "without the confirmation"),
        ([CALL, ALLOW, YES], "nothing asked"),
        ([CALL, CONFIRM, YES.model_copy(update={"arguments_blake3": name("y")})], "other arguments"),
        ([MODEL], "no open reservation"),
        ([MONEY, SETTLED, MODEL], "no open reservation"),
        ([MONEY, MODEL.model_copy(update={"reservation": "s/2"})], "no open reservation"),
        ([BudgetReserved(reservation="s/1", amounts={"tool_calls": 1}), MODEL], "no open reservation"),
        ([MONEY, FAILED], "not recorded before"),
        ([MONEY, MODEL, FAILED.model_copy(update={"attempt": 2})], "not recorded before"),
        ([MONEY, MONEY], "second time"),
        ([SETTLED], "without being open"),
        ([MONEY, SETTLED, SETTLED], "without being open"),
        ([MONEY, SETTLED.model_copy(update={"kept": True})], "other amounts"),
        ([MONEY, SETTLED, end(usd_nano=3)], "counts 3 usd_nano"),
        ([MONEY, SETTLED, end()], "counts 0 usd_nano"),
        ([CLOSED], "without having been decided"),
    ],
)
def test_a_broken_promise_is_named(broken: list[Event], problem: str) -> None:
    answer = judge(*broken)
    assert answer is not None
    assert problem in answer


def test_something_else_first_is_named() -> None:
    assert Order().check(CALL) == "the first entry is ToolCall, not SessionStarted"


def test_a_ledger_that_chains_but_acted_before_it_decided_is_not_valid(tmp_path: Path) -> None:
    honest = events()
    decision = next(n for n, event in enumerate(honest) if isinstance(event, DecisionMade))
    without = honest[:decision] + honest[decision + 1 :]
    assert verify_ledger(write_ledger(tmp_path / "honest", honest).path).is_valid
    found = verify_ledger(write_ledger(tmp_path / "without", without).path)
    assert (found.is_valid, found.line) == (False, decision + 1)
    assert (
        found.problem == f"line {decision + 1}: ExecObserved of action a1 has no allowing decision before it"
    )
