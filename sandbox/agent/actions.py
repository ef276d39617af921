"""Read what a model asked for into a validated action, or say what is wrong with it. D9

Two checks, on every provider (structured-output modes drop ``minimum`` and ``pattern``): the action
schema, a JSON Schema file that the policy may replace, and the built-in models below, which it may not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as ModelError
from referencing import Registry

from sandbox.agent.tools import INTENTS
from sandbox.digest import canonical_json
from sandbox.errors import PolicyError
from sandbox.models.provider import ToolUse
from sandbox.policy.decide import Decision, deny
from sandbox.policy.paths import canonical_path
from sandbox.resources import shipped
from sandbox.session.actions import (
    Action,
    CreateFile,
    ListFiles,
    ModifyFile,
    Operation,
    ReadFile,
    RunCommand,
    Scrutiny,
    SearchFiles,
    Unavailable,
)

MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Proposed:
    """A well-formed action, and what the action schema has against its target, if anything."""

    action: Action
    objection: Decision | None


@dataclass(frozen=True)
class Finished:
    """The agent says it is done."""

    summary: str


@dataclass(frozen=True)
class Invalid:
    """Not an action. ``problem`` is told to the model in a repair turn."""

    problem: str


class ActionReader:
    """Holds a compiled action schema."""

    def __init__(self, schema_path: Path | None) -> None:
        """Load the schema; None takes the shipped one. Raises PolicyError for a file that is no schema."""
        path = schema_path or shipped("policy/schemas/agent-action.json")
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))
            Draft202012Validator.check_schema(schema)
        except FileNotFoundError as exc:
            raise PolicyError(
                f"cannot use action schema {path}: there is no such file; "
                "create it, or drop output.schema_path to use the shipped schema"
            ) from exc
        except (OSError, ValueError, SchemaError) as exc:
            problem = exc.message if isinstance(exc, SchemaError) else str(exc)
            raise PolicyError(f"cannot use action schema {path}: {problem}") from exc
        # An empty registry: a $ref to another document is an error, never a request on the network.
        self._validator = Draft202012Validator(schema, registry=Registry())
        self.target_pattern = _pattern_of(schema)
        """What the schema plainly demands of ``target_path``, for the model to be told; None: nothing."""

    def read(self, use: ToolUse, action_id: str) -> Proposed | Finished | Invalid:
        """Validate one tool call. Never raises for what a model sent."""
        if use.arguments is None:
            return Invalid(f"the arguments of {use.name} are not valid JSON: {use.raw[:200]!r}")
        try:
            arguments = canonical_json(use.arguments)
        except (ValueError, RecursionError) as exc:
            return Invalid(f"the arguments of {use.name} cannot be read: {exc}")
        if use.name == "finish":
            return _read_finish(use.arguments)
        if use.name in INTENTS:
            return self._read_intent(use, action_id, arguments)
        model = _SIMPLE.get(use.name)
        if model is None:
            known = ", ".join([*_SIMPLE, *INTENTS, "finish"])
            return Invalid(f"there is no tool {use.name[:80]!r}; the tools are {known}")
        try:
            parsed = model.model_validate(use.arguments)
        except ModelError as exc:
            return Invalid(_model_problem(use.name, exc))
        return Proposed(Action(action_id, use.name, parsed.operation(), arguments), None)

    def _read_intent(self, use: ToolUse, action_id: str, arguments: bytes) -> Proposed | Invalid:
        assert use.arguments is not None  # noqa: S101  # read() returned already
        if "intent" in use.arguments:
            return Invalid(f"{use.name} takes no 'intent': the tool's name is the intent")
        document = {"intent": use.name, **use.arguments}
        try:
            errors = list(self._validator.iter_errors(document))
        except Exception as exc:  # a schema that cannot be evaluated (unresolvable $ref) accepts nothing
            return Invalid(f"the action schema cannot be evaluated: {type(exc).__name__}")
        objection = None
        if errors:
            if not all(_is_about_target(error) for error in errors):
                return Invalid(_schema_problem(use.name, errors))
            objection = _target_refused(document["target_path"], errors[0].validator_value)
        operation = _intent_operation(use.name, use.arguments)
        if isinstance(operation, Invalid):
            return operation
        parsed, scrutiny = operation
        objection = objection or self._resolved_objection(document)
        return Proposed(Action(action_id, use.name, parsed, arguments, scrutiny), objection)

    def _resolved_objection(self, document: dict[str, Any]) -> Decision | None:
        """Ask the schema again about the path as it resolves: ``./src/../x`` matches ``^\\./src/`` too."""
        target = document.get("target_path")
        if not isinstance(target, str):
            return None
        resolved = canonical_path(target)
        if resolved is None:
            return deny("action.target_path", f"target_path {target!r} leaves the workspace")
        plain = "./" + resolved.decode("utf-8", "surrogateescape")
        for error in self._validator.iter_errors({**document, "target_path": plain}):
            if _is_about_target(error):
                return _target_refused(f"{target} (resolved: {plain})", error.validator_value)
        return None


def _pattern_of(schema: object) -> str | None:
    for name in ("properties", "target_path", "pattern"):
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema if isinstance(schema, str) else None


def _is_about_target(error: ValidationError) -> bool:
    return error.validator == "pattern" and list(error.absolute_path) == ["target_path"]


def _target_refused(target: object, pattern: object) -> Decision:
    return deny("action.target_path", f"target_path {target} is outside what the schema accepts: {pattern}")


def _schema_problem(tool: str, errors: list[ValidationError]) -> str:
    lines = [f"{'.'.join(map(str, error.absolute_path)) or tool}: {error.message[:200]}" for error in errors]
    return f"{tool} does not follow the action schema: " + "; ".join(lines[:MAX_PROBLEMS])


def _model_problem(tool: str, exc: ModelError) -> str:
    lines = [f"{'.'.join(map(str, e['loc'])) or tool}: {e['msg']}" for e in exc.errors()[:MAX_PROBLEMS]]
    return f"{tool} has wrong arguments: " + "; ".join(lines)


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Read(_Arguments):
    path: str
    offset: Annotated[int, Field(ge=0, lt=2**53)] = 0

    def operation(self) -> Operation:
        return ReadFile(self.path, self.offset)


class _List(_Arguments):
    path: str = "."
    recursive: bool = True

    def operation(self) -> Operation:
        return ListFiles(self.path, self.recursive)


class _Search(_Arguments):
    pattern: Annotated[str, Field(min_length=1, max_length=1000)]
    path: str = "."

    def operation(self) -> Operation:
        return SearchFiles(self.pattern, self.path)


_SIMPLE: dict[str, type[_Read] | type[_List] | type[_Search]] = {
    "read": _Read,
    "list": _List,
    "search": _Search,
}


class _Create(_Arguments):
    content: str


class _Modify(_Arguments):
    old: str
    new: str


class _Run(_Arguments):
    command: Annotated[str, Field(min_length=1)]
    timeout_seconds: Annotated[int, Field(ge=1)] | None = None


class _Intent(_Arguments):
    target_path: str | None = None
    payload: dict[str, Any]  # checked by the intent's own model
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    requires_review: bool = False


class _FinishArguments(_Arguments):
    summary: str = ""


def _read_finish(arguments: dict[str, Any]) -> Finished | Invalid:
    try:
        return Finished(_FinishArguments.model_validate(arguments).summary)
    except ModelError as exc:
        return Invalid(_model_problem("finish", exc))


def _intent_operation(tool: str, arguments: dict[str, Any]) -> tuple[Operation, Scrutiny] | Invalid:
    try:
        intent = _Intent.model_validate(arguments)
        operation: Operation
        match tool:
            case "create_file":
                create = _Create.model_validate(intent.payload)
                operation = CreateFile(_target(intent), create.content)
            case "modify_file":
                modify = _Modify.model_validate(intent.payload)
                operation = ModifyFile(_target(intent), modify.old, modify.new)
            case "run_command":
                run = _Run.model_validate(intent.payload)
                operation = RunCommand(run.command, run.timeout_seconds)
            case _:
                operation = Unavailable(
                    tool,
                    "action.query_db",
                    "database queries are not available in this version",
                    json.dumps(intent.payload)[:200],
                )
    except ModelError as exc:
        return Invalid(_model_problem(tool, exc))
    except _MissingTarget:
        return Invalid(f"{tool} needs target_path")
    return operation, Scrutiny(intent.confidence, intent.requires_review)


class _MissingTarget(Exception):
    pass


def _target(intent: _Intent) -> str:
    if intent.target_path is None:
        raise _MissingTarget
    return intent.target_path
