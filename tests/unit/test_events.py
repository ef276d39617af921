"""Events: strict, frozen, canonical JSON without floats, and cut where the text is untrusted."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sandbox.digest import canonical_json
from sandbox.events import EVENT, EXCERPT_CHARS, Event, EventBase, PhaseStarted, excerpt
from tests.unit.provenance.recorded import events

CLASSES: tuple[type[EventBase], ...] = get_args(get_args(Event)[0])


def test_every_recorded_event_survives_json() -> None:
    for event in events():
        data = json.loads(canonical_json(event.model_dump(mode="json")))
        assert EVENT.validate_python(data) == event


def test_types_are_unique_and_the_union_holds_every_event() -> None:
    tags = [cls.model_fields["type"].default for cls in CLASSES]
    assert len(set(tags)) == len(tags)
    assert set(EventBase.__subclasses__()) == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_event_can_hold_a_float(cls: type[EventBase]) -> None:
    """A float has no one spelling: two verifiers could disagree about a digest."""

    def kinds(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            own = {schema["type"]} if isinstance(schema.get("type"), str) else set()
            return own.union(*(kinds(value) for value in schema.values()))
        return set().union(*(kinds(value) for value in schema)) if isinstance(schema, list) else set()

    assert "number" not in kinds(cls.model_json_schema())


@pytest.mark.parametrize(
    "changes",
    [{"phase": 1}, {"phase": None}, {"more": 1}, {"type": "Phase"}, {"type": None}],
)
def test_a_wrong_type_or_an_unknown_field_is_refused(changes: dict[str, object]) -> None:
    honest = {"type": "PhaseStarted", "phase": "design"}
    assert EVENT.validate_python(honest) == PhaseStarted(phase="design")
    with pytest.raises(ValidationError):
        EVENT.validate_python(honest | changes)
    with pytest.raises(ValidationError):
        EVENT.validate_python({"type": "PhaseStarted"})


def test_an_event_cannot_be_edited() -> None:
    event = PhaseStarted(phase="design")
    with pytest.raises(ValidationError):
        event.phase = "implement"  # type: ignore[misc]


@given(st.text(st.characters(exclude_categories=()), max_size=900), st.integers(1, 500))
def test_an_excerpt_is_short_enough_and_can_always_be_written(text: str, limit: int) -> None:
    cut = excerpt(text, limit)
    assert len(cut) <= limit
    assert json.loads(canonical_json(cut)) == cut
    if len(text) <= limit and text.isascii():
        assert cut == text


def test_an_excerpt_marks_what_it_cut_and_replaces_what_is_no_text() -> None:
    assert excerpt("x" * EXCERPT_CHARS) == "x" * EXCERPT_CHARS
    assert excerpt("x" * (EXCERPT_CHARS + 1)) == "x" * (EXCERPT_CHARS - 1) + "…"
    assert excerpt("a\ud800b") == "a?b"
