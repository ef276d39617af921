"""Say in one line what is wrong with the shape of a policy file, and where. Pure."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel

from sandbox.policy.source import Place, Problem, Source

_REASONS = {
    "deny_all_others": "what is not listed is always denied; leave the key out or say true",
    "validate_before_dispatch": "every action is validated before it runs; leave the key out or say true",
    "provenance_tracking": "a run without a record is not started; leave the key out or say true",
}
_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "nothing",
}
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_SURFACE = ("network", "filesystem", "shell")


def describe_error(
    model: type[BaseModel], source: Source, location: Place, kind: str, context: dict[str, Any], given: object
) -> Problem:
    """Turn one validation error into a problem; ``context`` and ``given`` are what pydantic reported."""
    where = _dotted(location)
    name = str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        return Problem(*source.key_position(location), _unknown_key(model, location))
    if kind == "missing":
        parent = location[:-1]
        inside = f" in {_dotted(parent)}" if parent else ""
        return Problem(*source.key_position(parent), f"missing key {name!r}{inside}")
    position = source.value_position(location)
    if kind == "literal_error" and name in _REASONS:
        return Problem(*position, f"{where} cannot be {_shown(given)}: {_REASONS[name]}")
    if kind == "literal_error":
        return Problem(
            *position, f"{where} is {_shown(given)}; accepted: {context.get('expected', 'other values')}"
        )
    if kind in _EXPECTED:
        return Problem(
            *position, f"{where} must be {_EXPECTED[kind]}, not {_shown(given)}{_quote_hint(kind, given)}"
        )
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        limits = " and ".join(f"{words[key]} {value}" for key, value in context.items() if key in words)
        return Problem(*position, f"{where} must be {limits}, not {_shown(given)}")
    if kind in ("string_too_short", "too_short"):
        return Problem(*position, f"{where} must not be empty")
    if kind == "value_error":
        return Problem(*position, f"{where}: {context.get('error')}")
    return Problem(*position, f"{where} is not valid ({kind.replace('_', ' ')})")


def _unknown_key(model: type[BaseModel], location: Place) -> str:
    key, parent = str(location[-1]), location[:-1]
    known = known_keys(model, parent)
    inside = f" in {_dotted(parent)}" if parent else ""
    if not parent and key in _SURFACE and "tool_surface" in known:
        return f"unknown key {key!r}; it belongs under tool_surface (or under profiles.NAME)"
    if not parent and key == "tool_surface" and "profiles" in known:
        return "unknown key 'tool_surface'; a file has either profiles or tool_surface, not both"
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}{inside}; {hint}"


def known_keys(model: type[BaseModel], place: Place) -> list[str]:
    """Return the keys of the mapping at a place, in the order of the model; empty when it takes any."""
    current: Any = model  # a type annotation, of any form
    for key in place:
        current = _inner(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(key))
            if field is None:
                return []
            current = field.annotation
        else:
            arguments = [a for a in typing.get_args(current) if a is not Ellipsis]
            if not arguments:
                return []
            current = arguments[-1]
    current = _inner(current)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _inner(annotation: Any) -> Any:  # a type annotation, of any form
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin in (typing.Union, types.UnionType):
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        else:
            return annotation


def _dotted(location: Place) -> str:
    text = ""
    for key in location:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text or "the document"


def _shown(given: object) -> str:
    if isinstance(given, bool):
        return "true" if given else "false"
    if isinstance(given, str | int | float):
        return repr(given)[:80]
    return _KINDS.get(type(given), "something else")


def _quote_hint(kind: str, given: object) -> str:
    if kind == "string_type" and isinstance(given, bool | int | float):
        return "; put it in quotes"
    if kind in ("tuple_type", "list_type") and isinstance(given, str):
        return "; write [" + given[:40] + "]"
    if given is None:
        return "; give a value or leave the key out"
    return ""
