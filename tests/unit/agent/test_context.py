from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agent.actions import ActionReader
from sandbox.agent.context import Context, system_text
from sandbox.agent.tools import offered_tools
from sandbox.errors import ModelFailed
from sandbox.models.provider import AssistantTurn, ModelReply, ToolOutcome, ToolUse, Usage, UserTurn
from sandbox.policy.model import HostEntry, NetworkPolicy, Policy, SessionPolicy, ShellPolicy

POLICY = Policy(name="test", shell=ShellPolicy(allowed_binaries=("make",)))


def context(window: int, policy: Policy = POLICY) -> Context:
    return Context(policy, "the task", offered_tools(policy), window)


def reply(number: int, usage: Usage | None = None) -> ModelReply:
    use = ToolUse(f"c{number}", "read", {"path": "x"}, '{"path": "x"}')
    return ModelReply("model", None, f"text {number}", (use,), "tool_use", usage)


def outcome(number: int, size: int) -> tuple[ToolOutcome, ...]:
    return (ToolOutcome(f"c{number}", "read", f"{number}:" + "x" * size, False),)


def test_only_the_tools_that_the_profile_allows_are_offered() -> None:
    names = {tool.name for tool in offered_tools(Policy(name="closed"))}
    assert "run_command" not in names
    assert "run_command" in {tool.name for tool in offered_tools(POLICY)}


def test_the_oldest_results_are_dropped_first_and_the_task_and_the_newest_stay() -> None:
    grown = context(8000)
    for number in range(8):
        grown.add_reply(reply(number))
        grown.add_outcomes(outcome(number, 2000))
    turns = grown.request().turns
    assert turns[0] == UserTurn("the task")
    results = [turn.outcomes[0].content for turn in turns if isinstance(turn, UserTurn) and turn.outcomes]
    assert results[0].startswith("[dropped to save room")
    assert results[-1].startswith("7:")
    kept = [content.startswith("[dropped") for content in results]
    assert kept == sorted(kept, reverse=True)


def test_every_call_keeps_its_result() -> None:
    grown = context(8000)
    for number in range(8):
        grown.add_reply(reply(number))
        grown.add_outcomes(outcome(number, 2000))
    turns = grown.request().turns
    called = [use.id for turn in turns if isinstance(turn, AssistantTurn) for use in turn.tool_uses]
    answered = [o.tool_use_id for turn in turns if isinstance(turn, UserTurn) for o in turn.outcomes]
    assert called == answered


def test_without_auto_truncate_a_full_window_ends_the_run() -> None:
    policy = POLICY.model_copy(update={"session": SessionPolicy(auto_truncate=False)})
    grown = context(4000, policy)
    grown.request()
    grown.add_reply(reply(0))
    grown.add_outcomes(outcome(0, 20_000))
    with pytest.raises(ModelFailed, match="does not fit the context window of 4000 tokens"):
        grown.request()


@given(sizes=st.lists(st.integers(0, 5000), max_size=20), window=st.integers(4000, 40_000))
def test_what_is_sent_stays_within_the_estimate_of_the_window(sizes: list[int], window: int) -> None:
    grown = context(window)
    for number, size in enumerate(sizes):
        grown.add_reply(reply(number))
        grown.add_outcomes(outcome(number, size))
    try:
        request = grown.request()
    except ModelFailed:
        return
    sent = sum(
        len(turn.text) + sum(len(o.content) for o in turn.outcomes)
        for turn in request.turns
        if isinstance(turn, UserTurn)
    )
    assert sent // 2 + request.max_tokens <= window


def test_the_estimate_learns_from_reported_usage() -> None:
    grown = context(40_000)
    first = grown.request()
    size = len(first.system) + 4000
    grown.add_reply(reply(0, Usage(size // 4, 0, 0, 10)))
    grown.add_outcomes(outcome(0, 60_000))
    grown.add_reply(reply(1))
    grown.add_outcomes(outcome(1, 10))
    assert "[dropped" not in str(grown.request().turns)  # 60,000 bytes would not fit at the first estimate


def test_more_than_a_window_of_results_in_one_turn_is_cut_and_not_fatal() -> None:
    grown = context(8000)
    uses = tuple(ToolUse(f"c{n}", "read", {"path": "x"}, "{}") for n in range(10))
    grown.add_reply(ModelReply("model", None, "", uses, "tool_use", None))
    long = tuple(ToolOutcome(use.id, "read", f"head {'x' * 30_000} tail", False) for use in uses)
    short = ToolOutcome("c10", "read", "a short one", False)
    grown.add_outcomes((*long, short))
    newest = grown.request().turns[-1]
    assert isinstance(newest, UserTurn)
    assert newest.outcomes[-1] == short
    for outcome in newest.outcomes[:-1]:
        assert outcome.content.startswith("head ")
        assert outcome.content.endswith(" tail")
        assert "the middle is cut" in outcome.content


def test_one_result_of_long_characters_fits_too() -> None:
    grown = context(8000)
    grown.add_reply(reply(0))
    grown.add_outcomes((ToolOutcome("c0", "read", "漢" * 30_000, False),))
    newest = grown.request().turns[-1]
    assert isinstance(newest, UserTurn)
    assert len(newest.outcomes[0].content.encode()) < 12_000


def test_a_file_cannot_pass_itself_off_as_dropped() -> None:
    grown = context(8000)
    for number in range(8):
        grown.add_reply(reply(number))
        grown.add_outcomes((ToolOutcome(f"c{number}", "read", "[dropped" + "x" * 4000, False),))
    assert grown.request()


def test_what_can_not_be_shortened_ends_the_run() -> None:
    grown = context(4000)
    with pytest.raises(ModelFailed):
        Context(POLICY, "t" * 20_000, offered_tools(POLICY), 4000).request()
    assert grown.request()  # the control


def test_a_provider_that_reports_one_token_does_not_switch_the_estimate_off() -> None:
    grown = context(8000)
    grown.request()
    grown.add_reply(reply(0, Usage(1, 0, 0, 1)))
    grown.add_outcomes(outcome(0, 200_000))
    newest = grown.request().turns[-1]
    assert isinstance(newest, UserTurn)
    assert len(newest.outcomes[0].content) < 80_000


def test_the_model_is_told_what_the_policy_allows_and_no_more() -> None:
    entries = (HostEntry(host="a.test"), HostEntry(host="b.test", ports=(8443,)))
    policy = Policy(
        name="test",
        network=NetworkPolicy(allowlist=entries),
        shell=ShellPolicy(allowed_binaries=("make",), blocked_commands=("rm",), require_confirmation=True),
    )
    told = system_text(policy)
    assert "Reachable hosts: a.test, b.test (port 8443)." in told
    assert "Commands you may run: make. Blocked everywhere: rm." in told
    assert "A person is asked" in told
    assert "A person is asked" not in system_text(POLICY)
    assert "Reachable hosts: nothing." in system_text(POLICY)


def test_the_tools_name_the_pattern_of_the_action_schema_in_use(tmp_path: Path) -> None:
    def target(reader: ActionReader) -> str:
        (tool,) = [t for t in offered_tools(POLICY, reader.target_pattern) if t.name == "create_file"]
        return str(tool.input_schema["properties"]["target_path"]["description"])

    schema = tmp_path / "schema.json"
    schema.write_text('{"properties": {"target_path": {"pattern": "^docs/"}}}')
    assert target(ActionReader(schema)).endswith("^docs/")
    assert "src" in target(ActionReader(None))
    schema.write_text("true")
    assert target(ActionReader(schema)) == "Path relative to the workspace."
