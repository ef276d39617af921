"""The tools a model is offered, as the profile allows. Data only; what a call means is in ``actions``."""

from __future__ import annotations

from typing import Any

from sandbox.models.provider import ToolDefinition
from sandbox.policy.model import Policy

Schema = dict[str, Any]  # JSON Schema is open by nature

INTENTS = ("create_file", "modify_file", "run_command", "query_db")
"""Tools whose arguments, with the intent added, are an agent action in the sense of the action schema."""


def offered_tools(policy: Policy) -> tuple[ToolDefinition, ...]:
    """Return the tools for one session: a tool that every call of would be denied is not offered."""
    tools = [_READ, _LIST, _SEARCH, _CREATE_FILE, _MODIFY_FILE]
    if policy.shell.allowed_binaries:
        tools.append(_RUN_COMMAND)
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
_CREATE_FILE = ToolDefinition(
    "create_file",
    "Create a new text file. Fails when it exists.",
    _action(_object({"content": {"type": "string"}}, ("content",)), target="Path beneath ./src/."),
)
_MODIFY_FILE = ToolDefinition(
    "modify_file",
    "Replace one passage of a file. `old` must occur exactly once.",
    _action(
        _object({"old": {"type": "string"}, "new": {"type": "string"}}, ("old", "new")),
        target="Path beneath ./src/.",
    ),
)
_RUN_COMMAND = ToolDefinition(
    "run_command",
    "Run one shell command line in the workspace. A refusal says which rule and what is allowed.",
    _action(
        _object({"command": {"type": "string"}, "timeout_seconds": {"type": "integer"}}, ("command",)),
        target="The path beneath ./src/ that the command is about, if any.",
        is_target_required=False,
    ),
)
_FINISH = ToolDefinition(
    "finish",
    "End the task. Call it once, when the work is done or cannot be done.",
    _object({"summary": {"type": "string", "description": "What was changed and why."}}, ("summary",)),
)
