"""The tools a model is offered, as the profile allows. Data only; what a call means is in ``actions``."""

from __future__ import annotations

from typing import Any

from sandbox.models.provider import ToolDefinition
from sandbox.policy.model import Policy

Schema = dict[str, Any]  # JSON Schema is open by nature

INTENTS = ("create_file", "modify_file", "run_command", "query_db")
"""Tools whose arguments, with the intent added, are an agent action in the sense of the action schema."""


def offered_tools(policy: Policy, target_pattern: str | None = None) -> tuple[ToolDefinition, ...]:
    """Return the tools for one session: a tool that every call of would be denied is not offered.

    ``target_pattern`` is what the action schema demands of a target path; None: nothing.
    """
    target = "Path relative to the workspace" + (
        f"; it must match the regular expression {target_pattern}" if target_pattern else "."
    )
    tools = [_READ, _LIST, _SEARCH, _create_file(target), _modify_file(target)]
    if policy.shell.allowed_binaries:
        tools.append(_run_command(target))
    tools.append(_FINISH)
    return tuple(tools)


def _object(properties: Schema, required: tuple[str, ...]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _action(payload: Schema, *, target: str, is_target_required: bool = True) -> Schema:
    properties = {
        "target_path": {"type": "string", "description": target},
        "payload": payload,
        "confidence": {"type": "number", "description": "0 to 1: how sure you are that this is right."},
        "requires_review": {"type": "boolean", "description": "True asks a person before it happens."},
    }
    required = ("payload", "confidence", "requires_review")
    return _object(properties, ("target_path", *required) if is_target_required else required)


_PATH = {"type": "string", "description": "Path relative to the workspace."}

_READ = ToolDefinition(
    "read",
    "Read a text file of the workspace.",
    _object({"path": _PATH, "offset": {"type": "integer", "description": "Bytes to skip."}}, ("path",)),
)
_LIST = ToolDefinition(
    "list",
    "List files beneath a directory of the workspace, with sizes.",
    _object({"path": _PATH, "recursive": {"type": "boolean"}}, ("path",)),
)
_SEARCH = ToolDefinition(
    "search",
    "Find lines that match a POSIX extended regular expression, like grep -rnE.",
    _object({"pattern": {"type": "string"}, "path": _PATH}, ("pattern",)),
)


def _create_file(target: str) -> ToolDefinition:
    return ToolDefinition(
        "create_file",
        "Create a new text file. Fails when it exists.",
        _action(_object({"content": {"type": "string"}}, ("content",)), target=target),
    )


def _modify_file(target: str) -> ToolDefinition:
    payload = _object({"old": {"type": "string"}, "new": {"type": "string"}}, ("old", "new"))
    description = "Replace one passage of a file. `old` must occur exactly once."
    return ToolDefinition("modify_file", description, _action(payload, target=target))


def _run_command(target: str) -> ToolDefinition:
    payload = _object({"command": {"type": "string"}, "timeout_seconds": {"type": "integer"}}, ("command",))
    return ToolDefinition(
        "run_command",
        "Run one shell command line in the workspace. A refusal says which rule and what is allowed.",
        _action(
            payload, target=f"The path that the command is about, if any. {target}", is_target_required=False
        ),
    )


_FINISH = ToolDefinition(
    "finish",
    "End the task. Call it once, when the work is done or cannot be done.",
    _object({"summary": {"type": "string", "description": "What was changed and why."}}, ("summary",)),
)
