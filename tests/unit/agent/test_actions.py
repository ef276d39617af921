import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agent.actions import ActionReader, Finished, Invalid, Proposed
from sandbox.errors import PolicyError
from sandbox.models.provider import ToolUse
from sandbox.session.actions import CreateFile, ModifyFile, ReadFile, RunCommand, Unavailable

READER = ActionReader(None)
CLAIMS = {"confidence": 0.5, "requires_review": False}


def read(tool: str, arguments: Any) -> Proposed | Finished | Invalid:
    return READER.read(ToolUse("call_1", tool, arguments, json.dumps(arguments)), "a1")


def create(target: str) -> Proposed | Finished | Invalid:
    return read("create_file", {"target_path": target, "payload": {"content": "x"}, **CLAIMS})


def proposed(answer: object) -> Proposed:
    assert isinstance(answer, Proposed), answer
    return answer


def test_each_tool_becomes_its_operation() -> None:
    assert proposed(read("read", {"path": "src/a"})).action.operation == ReadFile("src/a")
    assert proposed(create("./src/a")).action.operation == CreateFile("./src/a", "x")
    edit = {"target_path": "./src/a", "payload": {"old": "x", "new": "y"}, **CLAIMS}
    assert proposed(read("modify_file", edit)).action.operation == ModifyFile("./src/a", "x", "y")
    run = proposed(read("run_command", {"payload": {"command": "make test"}, **CLAIMS}))
    assert run.action.operation == RunCommand("make test")
    assert run.action.scrutiny.confidence == 0.5
    assert read("finish", {"summary": "done"}) == Finished("done")


@pytest.mark.parametrize(
    "target",
    [
        "./docs/x",
        "src/x",
        "/etc/passwd",
        "./.git/hooks/pre-commit",
        "./src/../../etc/passwd",
        "./src/../docs/x",
        "./src/a/../../x",
        "./src/..",
    ],
)
def test_a_target_outside_src_is_objected_to_however_it_is_spelt(target: str) -> None:
    objection = proposed(create(target)).objection
    assert objection is not None
    assert (objection.verdict, objection.rule) == ("deny", "action.target_path")


@pytest.mark.parametrize("target", ["./src/a", "./src/deep/er/a.py", "./src/b/../a"])
def test_a_target_inside_src_is_not_objected_to(target: str) -> None:
    assert proposed(create(target)).objection is None


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("no_such_tool", {}),
        ("read", {}),
        ("read", {"path": 5}),
        ("read", {"path": "x", "extra": 1}),
        ("read", {"path": "x", "offset": -1}),
        ("create_file", {"payload": {"content": "x"}, **CLAIMS}),
        ("create_file", {"target_path": "./src/a", "payload": {}, **CLAIMS}),
        ("create_file", {"target_path": "./src/a", "payload": {"content": 1}, **CLAIMS}),
        ("create_file", {"target_path": "./src/a", "payload": {"content": "x"}, "confidence": 2}),
        ("run_command", {"payload": {"command": ""}, **CLAIMS}),
        ("run_command", {"payload": "make test", **CLAIMS}),
        ("run_command", {"intent": "query_db", "payload": {"command": "ls"}, **CLAIMS}),
        ("finish", {"summary": 1}),
        ("read", {"path": "lone \udc80"}),
        ("read", {"path": "x", "offset": 2**60}),
    ],
)
def test_what_is_no_action_is_told_to_the_model(tool: str, arguments: dict[str, Any]) -> None:
    answer = read(tool, arguments)
    assert isinstance(answer, Invalid)
    assert answer.problem


def test_arguments_that_were_no_json_are_invalid() -> None:
    answer = READER.read(ToolUse("call_1", "read", None, '{"path": '), "a1")
    assert isinstance(answer, Invalid)
    assert "not valid JSON" in answer.problem


def test_a_database_query_is_refused_by_name() -> None:
    operation = proposed(read("query_db", {"payload": {"sql": "select 1"}, **CLAIMS})).action.operation
    assert isinstance(operation, Unavailable)
    assert operation.rule == "action.query_db"


def test_a_policys_own_schema_is_enforced_beside_the_built_in_models(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"confidence": {"minimum": 0.9}}}')
    reader = ActionReader(path)
    arguments = {"payload": {"command": "make"}, **CLAIMS}
    assert isinstance(reader.read(ToolUse("c", "run_command", arguments, ""), "a1"), Invalid)
    arguments["confidence"] = 0.95
    assert isinstance(reader.read(ToolUse("c", "run_command", arguments, ""), "a1"), Proposed)


@pytest.mark.parametrize("text", ["{", '{"type": "no-such-type"}', "[1]"])
def test_a_schema_that_is_none_is_a_policy_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match="cannot use action schema"):
        ActionReader(path)


def test_a_schema_that_refers_elsewhere_accepts_nothing_and_asks_no_network(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    answer = ActionReader(path).read(
        ToolUse("c", "run_command", {"payload": {"command": "make"}, **CLAIMS}, ""), "a1"
    )
    assert isinstance(answer, Invalid)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    tool=st.sampled_from(["read", "list", "search", "create_file", "modify_file", "run_command", "finish"]),
    arguments=st.dictionaries(
        st.sampled_from(["path", "pattern", "target_path", "payload", "confidence", "summary"]) | st.text(),
        JSON,
        max_size=5,
    ),
)
def test_no_json_makes_the_reader_raise(tool: str, arguments: dict[str, Any]) -> None:
    answer = READER.read(ToolUse("c", tool, arguments, "raw"), "a1")
    assert isinstance(answer, Proposed | Finished | Invalid)
