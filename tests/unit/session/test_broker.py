"""What the broker decides and records. Effects on a real guest are in tests/e2e."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.budget import Meter
from sandbox.errors import GuestError, RecordError, ToolCallsExhausted
from sandbox.events import ConfirmationGiven, DecisionMade, Event
from sandbox.guest.channel import GuestChannel
from sandbox.policy.decide import deny
from sandbox.policy.model import FilesystemPolicy, Policy, ShellPolicy
from sandbox.provenance.ledger import Ledger
from sandbox.provenance.verify import verify_ledger
from sandbox.session.actions import Action, CreateFile, Operation, ReadFile, RunCommand, Scrutiny, Unavailable
from sandbox.session.broker import Broker
from sandbox.session.confirm import AlwaysYes, Answer, Confirmer, NobodyThere, Question
from sandbox.session.effects import Shell
from sandbox.session.recorder import Recorder
from tests.unit.session.started import STARTED

POLICY = Policy(
    name="test",
    filesystem=FilesystemPolicy(deny_patterns=("**/.env*",)),
    shell=ShellPolicy(allowed_binaries=("git", "make"), blocked_commands=("rm",)),
)


class Reached(GuestError):
    """The guest was asked: the decision let the action through."""


async def reach_guest() -> GuestChannel:
    raise Reached("the guest was asked")


class Bench:
    """A broker over a real ledger, with no guest behind it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.jsonl"
        self.ledger = Ledger.create(self.path, clock=lambda: datetime.now(UTC))
        self.events: list[Event] = []
        self.ledger.append(STARTED)
        self.recorder = Recorder(self.ledger, (lambda entry: self.events.append(entry.event),))
        self.meter = Meter({"tool_calls": 3})

    def broker(self, policy: Policy = POLICY, confirmer: Confirmer | None = None) -> Broker:
        return Broker(
            policy, Shell("/bin/sh", {}), reach_guest, self.recorder, self.meter, confirmer or NobodyThere()
        )

    @property
    def decisions(self) -> list[tuple[str, str]]:
        return [(e.verdict, e.rule) for e in self.events if isinstance(e, DecisionMade)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def action(operation: Operation, **scrutiny: bool) -> Action:
    return Action("a1", "tool", operation, b"{}", Scrutiny(**scrutiny))


async def test_an_allowed_action_reaches_the_guest_and_its_decision_is_recorded_first(bench: Bench) -> None:
    with pytest.raises(Reached):
        await bench.broker().perform(action(RunCommand("git status")))
    assert [event.type for event in bench.events] == [
        "BudgetReserved",
        "BudgetSettled",
        "ToolCall",
        "Decision",
    ]
    assert bench.decisions[0][0] == "allow"


@pytest.mark.parametrize(
    ("operation", "rule"),
    [
        (RunCommand("rm -rf src"), "shell.blocked_commands"),
        (RunCommand("curl https://docs.internal.net/"), "shell.allowed_binaries"),
        (ReadFile(".env"), "filesystem.deny_patterns"),
        (ReadFile("../../etc/passwd"), "path.outside_workspace"),
        (CreateFile("config/.env.local", "x"), "filesystem.deny_patterns"),
        (Unavailable("query_db", "action.query_db", "not here", ""), "action.query_db"),
    ],
)
async def test_a_denied_action_names_its_rule_and_never_reaches_the_guest(
    bench: Bench, operation: Operation, rule: str
) -> None:
    outcome = await bench.broker().perform(action(operation))
    assert outcome.verdict == "denied"
    assert outcome.content.startswith(f"Refused by {rule}: ")
    assert bench.decisions == [("deny", rule)]


async def test_an_objection_of_the_schema_is_a_recorded_decision(bench: Bench) -> None:
    objection = deny("action.target_path", "outside")
    outcome = await bench.broker().perform(action(CreateFile("docs/x", "")), objection)
    assert outcome.verdict == "denied"
    assert bench.decisions == [("deny", "action.target_path")]


async def test_an_error_while_deciding_is_a_denial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sandbox.session.broker.decide_command", explode)
    outcome = await bench.broker().perform(action(RunCommand("git status")))
    assert outcome.verdict == "denied"
    assert bench.decisions == [("deny", "policy.error")]


async def test_the_call_after_the_last_one_ends_the_run(bench: Bench) -> None:
    broker = bench.broker()
    for _ in range(3):
        await broker.perform(action(ReadFile(".env")))
    with pytest.raises(ToolCallsExhausted, match="all of its 3 tool calls"):
        await broker.perform(action(ReadFile(".env")))
    assert bench.events[-1].type == "BreakerTripped"
    assert bench.meter.spent()["tool_calls"] == 3


CONFIRMING = POLICY.model_copy(
    update={"shell": POLICY.shell.model_copy(update={"require_confirmation": True})}
)


async def test_a_command_that_needs_confirmation_is_denied_where_nobody_can_be_asked(bench: Bench) -> None:
    outcome = await bench.broker(CONFIRMING).perform(action(RunCommand("git status")))
    assert outcome.verdict == "denied"
    assert "no terminal" in outcome.content
    assert [verdict for verdict, _ in bench.decisions] == ["confirm", "deny"]


async def test_a_confirmed_command_reaches_the_guest(bench: Bench) -> None:
    with pytest.raises(Reached):
        await bench.broker(CONFIRMING, AlwaysYes()).perform(action(RunCommand("git status")))
    assert [verdict for verdict, _ in bench.decisions] == ["confirm", "allow"]


async def test_an_approval_is_bound_to_the_bytes_that_were_shown(bench: Bench) -> None:
    asked: list[Question] = []

    class Person:
        async def ask(self, question: Question) -> Answer:
            asked.append(question)
            return Answer(True, "terminal")

    with pytest.raises(Reached):
        await bench.broker(CONFIRMING, Person()).perform(action(RunCommand("git status")))
    given = next(event for event in bench.events if isinstance(event, ConfirmationGiven))
    assert given.arguments_blake3 == asked[0].arguments_blake3


async def test_the_model_can_ask_for_a_review_of_what_the_policy_would_allow(bench: Bench) -> None:
    outcome = await bench.broker().perform(action(RunCommand("git status"), requires_review=True))
    assert outcome.verdict == "denied"
    assert bench.decisions[0] == ("confirm", "action.requires_review")


async def test_a_denial_is_not_up_for_confirmation(bench: Bench) -> None:
    outcome = await bench.broker(CONFIRMING, AlwaysYes()).perform(
        action(RunCommand("rm -rf src"), requires_review=True)
    )
    assert outcome.verdict == "denied"
    assert bench.decisions == [("deny", "shell.blocked_commands")]


async def test_what_cannot_be_recorded_is_not_done(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Event], object] = bench.ledger.append

    def full(event: Event) -> object:
        if event.type == "Decision":
            raise RecordError("no space left")
        return real(event)

    monkeypatch.setattr(bench.ledger, "append", full)
    with pytest.raises(RecordError):  # not Reached: the guest was never asked
        await bench.broker().perform(action(RunCommand("git status")))


async def test_the_brokers_own_order_satisfies_the_verifier(bench: Bench) -> None:
    await bench.broker(CONFIRMING).perform(action(RunCommand("git status")))
    bench.ledger.sync()
    assert verify_ledger(bench.path).problem is None
