"""Read YAML text into JSON-like data and remember where everything stood. Pure.

YAML is larger than a policy needs, and each extra is a way to mislead a reader: duplicate keys (the last
one silently wins), tags, several documents, and aliases that grow without end are refused. What YAML would
turn into dates stays text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
"""After aliases are expanded: ten lines of aliases can stand for billions of values."""
MAX_DEPTH = 40
_MAX_INTEGER = 2**53 - 1

Place = tuple[str | int, ...]
"""Keys and indices from the top of the document."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a policy file."""

    line: int
    """Counted from 1; 0 when the problem is the file as a whole."""
    column: int
    message: str

    def located(self, name: str) -> str:
        """Return ``FILE:LINE:COLUMN: MESSAGE``."""
        return f"{name}:{self.line}:{self.column}: {self.message}" if self.line else f"{name}: {self.message}"


@dataclass
class Source:
    """A policy file's data, its places, and what was wrong with its YAML."""

    data: Any = None  # any JSON value, until a model has judged it
    keys: dict[Place, tuple[int, int]] = field(default_factory=dict)
    """Where each key stands (for list items: where the item begins)."""
    values: dict[Place, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def key_position(self, place: Place) -> tuple[int, int]:
        """Return line and column of a key, or of the nearest thing around it."""
        return self._nearest(self.keys, place)

    def value_position(self, place: Place) -> tuple[int, int]:
        """Return line and column of a value, or of the nearest thing around it."""
        return self._nearest(self.values, place)

    def _nearest(self, positions: dict[Place, tuple[int, int]], place: Place) -> tuple[int, int]:
        while place:
            if place in positions:
                return positions[place]
            if place in self.keys:
                return self.keys[place]
            place = place[:-1]
        return (1, 1)


def read_source(raw: bytes) -> Source:
    """Read a document; ``problems`` is not empty when it cannot be used."""
    source = Source()
    if len(raw) > MAX_BYTES:
        source.problems.append(Problem(0, 0, f"the file is larger than {MAX_BYTES} bytes"))
        return source
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        column = exc.start - raw.rfind(b"\n", 0, exc.start)
        source.problems.append(Problem(line, column, "not UTF-8 text; save the file as UTF-8"))
        return source
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        source.problems.append(_yaml_problem(exc))
        return source
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        column = exc.position - text.rfind("\n", 0, exc.position)
        source.problems.append(Problem(line, column, "a control character has no place in a policy"))
        return source
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        source.problems.append(Problem(0, 0, f"not readable as YAML: {type(exc).__name__}"))
        return source
    if root is None:
        source.problems.append(
            Problem(0, 0, "the file is empty; a policy starts with 'profiles:' or 'version:'")
        )
        return source
    builder = _Builder(source)
    try:
        source.data = builder.build(root, ())
    except _TooMuch as exc:
        source.problems.append(exc.problem)
    return source


class _TooMuch(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _Builder:
    """Turns nodes into data, one pass, every value counted."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.count = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, place: Place) -> Any:  # any JSON value
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooMuch(_problem(node, f"more than {MAX_NODES} values once aliases are expanded"))
        if len(place) > MAX_DEPTH:
            raise _TooMuch(_problem(node, f"nested more than {MAX_DEPTH} levels deep, or within itself"))
        self.source.values[place] = _position(node)
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                self._complain(node, f"the tag {_short_tag(node.tag)} is not accepted; write plain values")
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                self._complain(node, f"the tag {_short_tag(node.tag)} is not accepted; write plain values")
            items = []
            for index, child in enumerate(node.value):
                self.source.keys[(*place, index)] = _position(child)
                items.append(self.build(child, (*place, index)))
            return items
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        raise _TooMuch(_problem(node, "this kind of value is not accepted"))

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._merge(value_node, place, merged)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_node, "a key must be plain text")
                continue
            if key_node.tag not in _PLAIN_KEY_TAGS:
                self._complain(key_node, f"the key {key_node.value!r} is not text to YAML; put it in quotes")
                continue
            key = key_node.value
            if key in data:
                first = self.source.keys[(*place, key)][0]
                self._complain(key_node, f"duplicate key {key!r}; it is already given on line {first}")
                continue
            self.source.keys[(*place, key)] = _position(key_node)
            data[key] = self.build(value_node, (*place, key))
        return merged | data

    def _merge(self, node: yaml.Node, place: Place, merged: dict[str, Any]) -> None:
        """``<<: *name``: the mapping's keys, unless given here; earlier mappings win over later ones."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for one in nodes:
            if not isinstance(one, yaml.MappingNode):
                self._complain(one, "<< takes a mapping")
                continue
            for key, value in self.build(one, place).items():
                merged.setdefault(key, value)

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:  # any JSON scalar
        text = str(node.value)
        if place == ("version",):
            return text  # 2.10 is not 2.1
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str" | "timestamp" | "value":
                if any(0xD800 <= ord(character) <= 0xDFFF or character == "\0" for character in text):
                    self._complain(node, "the text holds a character that no policy can use")
                    return ""
                return text
            case "null":
                return None
            case "bool":
                return bool(self.scalars.construct_yaml_bool(node))
            case "int" if ":" not in text:
                return self._number(node, self.scalars.construct_yaml_int)
            case "float" if ":" not in text:
                return self._number(node, self.scalars.construct_yaml_float)
            case "int" | "float":
                return text  # YAML 1.1 would read 1:30 as 90
            case _:
                self._complain(node, f"the tag {_short_tag(node.tag)} is not accepted; write plain values")
                return None

    def _number(self, node: yaml.ScalarNode, construct: Any) -> Any:  # PyYAML's constructors are untyped
        try:
            number = construct(node)
        except (ValueError, OverflowError):
            self._complain(node, f"{str(node.value)[:40]!r} is not a number")
            return None
        if not math.isfinite(number) or abs(number) > _MAX_INTEGER:
            self._complain(node, f"{str(node.value)[:40]!r} is too large for a policy")
            return None
        return number

    def _complain(self, node: yaml.Node, message: str) -> None:
        self.source.problems.append(_problem(node, message))


_PLAIN_KEY_TAGS = frozenset(
    {"tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
)


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _problem(node: yaml.Node, message: str) -> Problem:
    return Problem(*_position(node), message)


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml.org,2002:") else tag


def _yaml_problem(exc: yaml.MarkedYAMLError) -> Problem:
    mark = exc.problem_mark or exc.context_mark
    what = " ".join(part for part in (exc.problem, f"({exc.context})" if exc.context else "") if part)
    if isinstance(exc, yaml.composer.ComposerError) and "single document" in (exc.context or ""):
        what = "a second document begins here; one file holds one policy document"
    message = f"not readable as YAML: {' '.join(what.split())}"
    return Problem(mark.line + 1, mark.column + 1, message) if mark else Problem(0, 0, message)
