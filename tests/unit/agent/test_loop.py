"""The loop with a real route, a scripted model and a real broker; only what is denied, so no container."""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.agent.actions import ActionReader
from sandbox.agent.context import Context
from sandbox.agent.loop import PROBLEM_CHARS, Agent
from sandbox.agent.tools import offered_tools
from sandbox.budget import Meter
from sandbox.errors import (
    BudgetExhausted,
    GuestError,
    InvalidOutput,
    ModelFailed,
    Refused,
    RunStopped,
    ToolCallsExhausted,
)
from sandbox.events import DecisionMade, Event, ModelCall, SessionEnded, ToolCall
from sandbox.guest.channel import GuestChannel
from sandbox.models.prices import PriceTable
from sandbox.models.provider import ModelReply, ModelRequest, ToolUse, UserTurn
from sandbox.models.route import Route
from sandbox.models.script import ScriptProvider
from sandbox.policy.model import FilesystemPolicy, Policy, PriceEntry, ShellPolicy
from sandbox.provenance.ledger import Ledger
from sandbox.provenance.verify import verify_ledger
from sandbox.session.broker import Broker
from sandbox.session.confirm import NobodyThere
from sandbox.session.effects import Shell
from sandbox.session.recorder import Recorder
from tests.unit.session.started import STARTED

POLICY = Policy(
    name="test",
    filesystem=FilesystemPolicy(deny_patterns=("**/.env*",)),
    shell=ShellPolicy(allowed_binaries=("git",)),
)
HIDDEN = {"tool": "read", "input": {"path": ".env"}}
NONSENSE = {"tool": "no_such_tool", "input": {}}
FINISH = {"calls": [{"tool": "finish", "input": {"summary": "done"}}]}


class Bench:
    """An agent at work on a script, over a real ledger."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "ledger.jsonl"
        self.ledger = Ledger.create(self.path, clock=lambda: datetime.now(UTC))
        self.ledger.append(STARTED)
        self.events: list[Event] = []
        self.requests: list[ModelRequest] = []
        self.meter = Meter({"tool_calls": 50, "usd_nano": 10**9})
        self.prices: dict[str, PriceEntry] = {}
        self.policy = POLICY

    def provider(self, *turns: dict[str, Any]) -> "Watched":
        path = self.directory / "turns.yaml"
        path.write_text(yaml.safe_dump({"turns": list(turns)}))
        return Watched(self, path)

    async def run(self, *turns: dict[str, Any], window: int = 64_000, task: str = "a task") -> str:
        return await self.run_provider(self.provider(*turns), window, task)

    async def run_provider(self, provider: Any, window: int = 64_000, task: str = "a task") -> str:
        recorder = Recorder(self.ledger, (lambda entry: self.events.append(entry.event),))
        route = Route(
            provider, None, meter=self.meter, prices=PriceTable(self.prices), record=recorder.record
        )
        broker = Broker(self.policy, Shell("/bin/sh", {}), no_container, recorder, self.meter, NobodyThere())
        context = Context(self.policy, task, offered_tools(self.policy), window)
        return await Agent(route, broker, ActionReader(None), context).run()

    @property
    def decisions(self) -> list[tuple[str, str]]:
        return [(e.action_id, e.rule) for e in self.events if isinstance(e, DecisionMade)]

    @property
    def model_calls(self) -> int:
        return sum(isinstance(event, ModelCall) for event in self.events)

    def verify(self) -> None:
        self.ledger.append(SessionEnded(status="x", reason="", spent=self.meter.spent()))
        self.ledger.sync()
        assert verify_ledger(self.path).problem is None


class Watched(ScriptProvider):
    """The scripted model; what it is asked can be looked at."""

    def __init__(self, bench: Bench, path: Path) -> None:
        super().__init__(f"script:{path}", path)
        self._bench = bench

    async def complete(self, request: ModelRequest, on_text: Any) -> ModelReply:
        self._bench.requests.append(request)
        return await super().complete(request, on_text)


async def no_container() -> GuestChannel:
    raise GuestError("the guest was asked")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.verify()  # whatever happened, in the order the verifier demands


async def test_the_summary_of_finish_is_the_result(bench: Bench) -> None:
    assert await bench.run(FINISH) == "done"


async def test_what_follows_finish_in_the_same_turn_is_not_done(bench: Bench) -> None:
    assert await bench.run({"calls": [*FINISH["calls"], HIDDEN]}) == "done"
    assert bench.decisions == []


async def test_a_refusal_is_told_to_the_model_with_its_rule(bench: Bench) -> None:
    await bench.run({"calls": [HIDDEN]}, FINISH)
    told = bench.requests[1].turns[-1]
    assert isinstance(told, UserTurn)
    assert told.outcomes[0].is_error
    assert told.outcomes[0].content.startswith("Refused by filesystem.deny_patterns")


async def test_an_allowed_action_reaches_the_container(bench: Bench) -> None:
    with pytest.raises(GuestError, match="the guest was asked"):
        await bench.run({"calls": [{"tool": "read", "input": {"path": "README.md"}}]}, FINISH)


async def test_two_invalid_turns_are_repaired_and_a_third_ends_the_run(bench: Bench) -> None:
    turn = {"calls": [NONSENSE]}
    assert await bench.run(turn, turn, {"calls": [HIDDEN]}, turn, turn, FINISH) == "done"
    with pytest.raises(InvalidOutput, match="no_such_tool"):
        await bench.run(turn, turn, turn, FINISH)


async def test_a_model_that_only_talks_is_told_twice_and_then_stopped(bench: Bench) -> None:
    with pytest.raises(InvalidOutput, match="no tool was called"):
        await bench.run(*[{"say": "let me think"}] * 9)
    assert bench.model_calls == 3


async def test_a_finish_with_wrong_arguments_for_ever_is_stopped(bench: Bench) -> None:
    with pytest.raises(InvalidOutput):
        await bench.run(*[{"calls": [{"tool": "finish", "input": {"summary": 7}}]}] * 9)
    assert bench.model_calls == 3


async def test_a_call_that_is_no_action_is_on_record(bench: Bench) -> None:
    await bench.run({"calls": [NONSENSE, HIDDEN]}, FINISH)
    assert bench.decisions == [("a1", "action.invalid"), ("a2", "filesystem.deny_patterns")]
    assert [event.tool for event in bench.events if isinstance(event, ToolCall)] == ["no_such_tool", "read"]


async def test_nonsense_beside_sense_for_ever_uses_up_the_tool_calls(bench: Bench) -> None:
    bench.meter = Meter({"tool_calls": 7})
    with pytest.raises((ToolCallsExhausted, InvalidOutput)):
        await bench.run(*[{"calls": [NONSENSE] * 100}] * 9)
    assert bench.meter.spent()["tool_calls"] == 7


async def test_a_model_that_declines_ends_the_run_as_refused(bench: Bench) -> None:
    with pytest.raises(Refused):
        await bench.run({"say": "no", "finish": "refusal"})


async def test_no_tool_call_left_means_none_is_made(bench: Bench) -> None:
    bench.meter = Meter({"tool_calls": 0})
    with pytest.raises(ToolCallsExhausted):
        await bench.run({"calls": [HIDDEN]}, FINISH)
    assert bench.decisions == []


async def test_a_context_that_the_provider_always_finds_too_long_ends_the_run(bench: Bench) -> None:
    with pytest.raises(ModelFailed, match="context"):
        await bench.run(*[{"fail": {"kind": "context_exceeded", "http_status": 400}}] * 99)
    assert bench.model_calls < 20


async def test_a_provider_that_counts_next_to_nothing_cannot_switch_the_window_off(bench: Bench) -> None:
    lying = {"calls": [HIDDEN], "usage": {"input_tokens": 1, "output_tokens": 1}}
    failing = [{"fail": {"kind": "context_exceeded", "http_status": 400}}] * 99
    with pytest.raises(ModelFailed):
        await bench.run(lying, *failing)
    assert bench.model_calls < 20


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": 0, "output_tokens": 0},
        {"input_tokens": 10**9, "output_tokens": 10**9},
        None,
    ],
)
async def test_whatever_usage_is_reported_a_priced_session_ends(bench: Bench, usage: object) -> None:
    bench.prices = {"script:*": PriceEntry(input_usd_per_million=10, output_usd_per_million=10)}
    turn = {"calls": [HIDDEN]} | ({"usage": usage} if usage else {})
    with pytest.raises(RunStopped) as stopped:
        await bench.run(*[turn] * 60)
    assert isinstance(stopped.value, BudgetExhausted | ToolCallsExhausted)


@pytest.mark.parametrize("name", ["\x00", "\u202e" * 500, "[/red]", "a" * 20_000, " ", "fin\nish"])
async def test_a_tool_of_any_name_is_refused_and_recorded(bench: Bench, name: str) -> None:
    assert await bench.run({"calls": [{"tool": name, "input": {}}]}, FINISH) == "done"
    told = bench.requests[1].turns[-1]
    assert isinstance(told, UserTurn)
    assert len(told.outcomes[0].content) < PROBLEM_CHARS + 20
    assert bench.decisions == [("a1", "action.invalid")]


HOSTILE = ["\x00", "a\x00b", "\u2028", "../" * 2000, "/" * 5000, "\x1b[2J", "~root", "-rf", "." * 9_000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "call",
    [
        lambda text: {"tool": "read", "input": {"path": text}},
        lambda text: {"tool": "search", "input": {"pattern": text, "path": ".env"}},
        lambda text: {
            "tool": "create_file",
            "input": {"target_path": text, "payload": {"content": text}},
        },
        lambda text: {"tool": "run_command", "input": {"payload": {"command": text}}},
        lambda text: {"tool": "run_command", "input": {"payload": {text: text}}},
        lambda text: {"tool": "query_db", "input": {"payload": {"query": text}}},
    ],
)
async def test_hostile_text_in_any_field_crashes_nothing(bench: Bench, call: Any, text: str) -> None:
    with suppress(GuestError):  # allowed, and the container was asked
        await bench.run({"calls": [call(text)]}, FINISH)
    assert len(bench.decisions) == 1


class Raw:
    """A provider that replies with given tool uses, however broken, and then finishes."""

    model = "script:raw"

    def __init__(self, *uses: ToolUse) -> None:
        self._uses = uses

    def input_bound(self, request: ModelRequest) -> int:
        return 1000

    async def complete(self, request: ModelRequest, on_text: object) -> ModelReply:
        if len(request.turns) == 1:
            return ModelReply("m", None, "\ud800", self._uses, "tool_use", None)
        finish = ToolUse("f", "finish", {"summary": ""}, "{}")
        return ModelReply("m", None, "", (finish,), "tool_use", None)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "use",
    [
        ToolUse("x", "read", None, '{"path": '),
        ToolUse("x", "re\ud800ad", None, "\udfff"),
        ToolUse("x", "read", {"path": "\ud800"}, "{}"),
        ToolUse("x", "read", {"\ud800": 1}, "{}"),
        ToolUse("x", "read", {"path": "a", "offset": 2**70}, "{}"),
        ToolUse("x", "read", {"k" * 100_000: 1}, "{}"),
        ToolUse("x", "create_file", {"k" * 100_000: {"y" * 100_000: 2}}, "{}"),
        ToolUse("x", "create_file", {"intent": "read"}, "{}"),
        ToolUse("x", "run_command", {"payload": {"command": "git", "timeout_seconds": True}}, "{}"),
        ToolUse("x", "run_command", {"payload": json.loads("[" * 60 + "]" * 60)}, "{}"),
    ],
    ids=range(10),
)
async def test_broken_arguments_are_answered_in_few_words_and_recorded(bench: Bench, use: ToolUse) -> None:
    bench.meter = Meter({"tool_calls": 50})
    assert await bench.run_provider(Raw(use)) == ""
    assert bench.decisions == [("a1", "action.invalid")]
