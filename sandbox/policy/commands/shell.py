"""Read one shell line into the simple commands it can run. Pure: no decision, no I/O.

The grammar is tree-sitter-bash; a node, token or gap this module does not know makes the whole line
``Unreadable``, because what cannot be read cannot be judged. tree-sitter and the shells disagree in
places, and each disagreement is a way to hide a command, so the tree is never believed alone:

- words that touch, line continuations inside words, and substitutions left inside literal text are refused;
- forms that ``sh`` and ``bash`` read differently (``[[ a && b ]]``, ``((...))``, ``$'\\''``) are refused, so
  that the answer holds whichever of the two runs the line;
- here-documents are measured a second time, by line.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import tree_sitter
import tree_sitter_bash

MAX_LINE_BYTES = 64 * 1024
MAX_OF_A_MARK = 2500
"""How often one of the marks ``(){}[]<>|$`` and the backquote may stand in a line: on lines full of them the
parser's time grows with their square, and one line must not hold up every other session."""
MAX_DEPTH = 120
"""Deepest nesting of the syntax tree that is read."""


class Unreadable(Exception):
    """The line cannot be read with certainty. ``str()`` continues "the line was not understood: "."""


@dataclass(frozen=True)
class Word:
    """One word of a command, as far as it is known before it runs."""

    text: str | None
    """After unquoting; None when it depends on what happens at run time (expansion, glob, braces)."""
    raw: str
    prefix: str = ""
    """For a dynamic word: what it certainly begins with."""
    may_split: bool = False
    """A dynamic word that can become several words, or none."""
    is_bare: bool = False
    """Written without any quoting; only then can it be a reserved word."""

    @property
    def may_be_option(self) -> bool:
        """True when a dynamic word could turn out to be an option, or bring one along."""
        return self.text is None and (self.may_split or not self.prefix or self.prefix[0] in "-+")


@dataclass(frozen=True)
class Assignment:
    """``NAME=value``: before a command, in ``export`` and its kin, or alone."""

    name: str
    value: Word


@dataclass(frozen=True)
class Command:
    """One simple command as written. ``words`` is empty when there are only assignments."""

    words: tuple[Word, ...]
    assignments: tuple[Assignment, ...] = ()
    functions: frozenset[str] = frozenset()
    """Functions that are certainly defined when this command runs."""


@dataclass
class Line:
    """Everything found in one line, substitutions and function bodies included."""

    commands: list[Command] = field(default_factory=list)
    targets: list[Word] = field(default_factory=list)
    """Of redirections to and from files."""
    has_redirection: bool = False
    literals: list[str] = field(default_factory=list)
    """Quoted text in which nothing is expanded now, but which a later evaluation could expand."""
    loop_names: list[str] = field(default_factory=list)
    assigned_by_expansion: list[str] = field(default_factory=list)
    """Names that ``${NAME:=value}`` can set."""
    has_arithmetic: bool = False
    """Somewhere a variable's value is evaluated as an expression."""
    is_single: bool = False
    """One simple command: no list, pipeline, redirection, assignment, substitution or function."""


def read_line(source: str) -> Line:
    """Read a line; raises Unreadable for anything not understood to the last byte."""
    raw = _checked_bytes(source)
    root = _parser().parse(raw).root_node
    if root.has_error:
        raise Unreadable("it is not complete, valid shell syntax")
    reader = _Reader(raw)
    reader.visit(root, 0, frozenset())
    line = reader.line
    line.is_single = (
        len(line.commands) == 1
        and root.named_child_count == 1
        and root.named_children[0].type == "command"
        and root.child_count == 1
        and not line.commands[0].assignments
        and not line.has_redirection
        and all(word.text is not None for word in line.commands[0].words)
    )
    return line


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD_TYPES = _names(
    "word number string raw_string ansi_c_string translated_string concatenation simple_expansion expansion "
    "arithmetic_expansion command_substitution process_substitution brace_expression"
)
_KNOWN_TYPES = _WORD_TYPES | _names(
    "program redirected_statement for_statement c_style_for_statement variable_assignment "
    "variable_assignments unary_expression binary_expression ternary_expression postfix_expression "
    "parenthesized_expression while_statement do_group if_statement elif_clause else_clause "
    "case_statement case_item function_definition compound_statement subshell pipeline list "
    "negated_command test_command declaration_command unset_command command command_name subscript "
    "file_redirect heredoc_redirect herestring_redirect heredoc_start heredoc_body heredoc_content "
    "heredoc_end file_descriptor variable_name special_variable_name test_operator regex "
    "extglob_pattern string_content comment array"
)
_COMMAND_TYPES = frozenset({"command", "declaration_command", "unset_command"})
_ONE_LINE_TYPES = _COMMAND_TYPES | _names(
    "redirected_statement file_redirect herestring_redirect variable_assignment command_name test_command "
    "simple_expansion expansion subscript negated_command"
)
_KEYWORDS = _names("export declare typeset readonly local unset unsetenv")
_ARITHMETIC_TYPES = frozenset({"arithmetic_expansion", "c_style_for_statement", "subscript"})
_LATER_EXPANDED = re.compile(r"\$\(|\$\{|`")
_BRACE_LIST = re.compile(r",|\.\.")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


@functools.cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


def _checked_bytes(source: str) -> bytes:
    try:
        raw = source.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable("it is not valid UTF-8 text") from None
    if len(raw) > MAX_LINE_BYTES:
        raise Unreadable(f"it is longer than {MAX_LINE_BYTES} bytes")
    for mark in "(){}[]<>|$`":
        if source.count(mark) > MAX_OF_A_MARK:
            raise Unreadable(f"it holds {mark!r} more than {MAX_OF_A_MARK} times; put the text into a file")
    if "$\\\n" in source:
        # Every shell joins the two and sees one expansion; the grammar sees literal text.
        raise Unreadable("a line continuation follows a dollar sign")
    for character in source:
        if character in "\n\t ":
            continue
        # Unicode blanks separate words in one grammar only; bidi marks reorder what a person reads.
        if unicodedata.category(character) in ("Cc", "Zs", "Zl", "Zp") or character in _BIDI:
            raise Unreadable(
                f"it holds the character U+{ord(character):04X}, which has no place in a command"
            )
    return raw


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.line = Line()

    def visit(self, node: tree_sitter.Node, depth: int, functions: frozenset[str]) -> None:
        """Collect what is in this node; ``functions`` are those certainly defined here."""
        if depth > MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        if node.is_named and node.type not in _KNOWN_TYPES:
            raise Unreadable(f"it uses a form that is not supported ({node.type})")
        self._check_gaps(node)
        self._check_form(node)
        extra: tuple[Word, ...] = ()
        if node.type == "redirected_statement":
            extra = tuple(self._words_after_redirects(node))
            if extra and node.children[0].type not in _COMMAND_TYPES:
                raise Unreadable("words follow a redirection; put the redirection last")
        if node.type in _COMMAND_TYPES:
            self._add_command(node, (), functions)
        elif node.type == "variable_assignment" and self._is_alone(node):
            self.line.commands.append(Command((), (self._assignment(node),), functions))
        elif node.type == "test_command":
            self.line.commands.append(Command((Word("[", "[", is_bare=True),), (), functions))
        elif node.type in ("file_redirect", "herestring_redirect", "heredoc_redirect"):
            self.line.has_redirection = True
            if node.type == "file_redirect":
                self.line.targets.extend(self._destinations(node)[:1])
        elif node.type == "for_statement":
            self.line.loop_names.extend(self._text(c) for c in node.children if c.type == "variable_name")
        if node.type == "expansion":
            self._note_expansion(node)
        if node.type in _ARITHMETIC_TYPES:
            self.line.has_arithmetic = True
        self._visit_children(node, depth, functions, extra)

    def _visit_children(
        self, node: tree_sitter.Node, depth: int, functions: frozenset[str], extra: tuple[Word, ...]
    ) -> None:
        inside = functions
        siblings = node.children
        for index, child in enumerate(siblings):
            if extra and child.type in _COMMAND_TYPES:
                # `env >f rm x` runs `env rm x`: the grammar files the later words under the redirection.
                self._add_command(child, extra, inside)
                extra = ()
                for grandchild in child.children:
                    self.visit(grandchild, depth + 2, inside)
                continue
            self.visit(child, depth + 1, inside)
            if child.type == "function_definition" and node.type == "program":
                # Only a definition that runs unconditionally, in this shell and before the call, counts.
                name = child.child_by_field_name("name")
                in_background = index + 1 < len(siblings) and siblings[index + 1].type == "&"
                if name is not None and not in_background:
                    inside = inside | {self._text(name)}

    def _add_command(
        self, node: tree_sitter.Node, extra: tuple[Word, ...], functions: frozenset[str]
    ) -> None:
        words: list[Word] = []
        assignments: list[Assignment] = []
        previous_end = -1
        for child in node.children:
            if child.type == "variable_assignment":
                assignments.append(self._assignment(child))
                if words:
                    words.append(Word(None, self._text(child), prefix=self._text(child).split("=")[0] + "="))
            elif child.type == "file_redirect":
                destinations = self._destinations(child)
                if len(destinations) > 1 and not words:
                    raise Unreadable("words follow a redirection; put the redirection last")
                words.extend(destinations[1:])
            elif child.type in ("herestring_redirect", "comment"):
                pass
            else:
                if child.start_byte == previous_end and previous_end > 0:
                    raise Unreadable("two words touch")
                words.append(self._word(child))
                previous_end = child.end_byte
        self.line.commands.append(Command((*words, *extra), tuple(assignments), functions))

    def _is_alone(self, node: tree_sitter.Node) -> bool:
        return node.parent is None or node.parent.type not in ("command", "declaration_command")

    def _assignment(self, node: tree_sitter.Node) -> Assignment:
        name_node = node.child_by_field_name("name")
        value_node = node.child_by_field_name("value")
        if name_node is None:
            raise Unreadable("an assignment has no name")
        name = self._text(name_node).split("[")[0]
        if value_node is None:
            return Assignment(name, Word("", ""))
        if value_node.type == "array":
            return Assignment(name, Word(None, self._text(value_node)))
        return Assignment(name, self._word(value_node))

    def _destinations(self, redirect: tree_sitter.Node) -> list[Word]:
        return [self._word(child) for child in redirect.children if child.type in _WORD_TYPES]

    def _words_after_redirects(self, node: tree_sitter.Node) -> Iterator[Word]:
        for previous, child in pairwise(node.children):
            if _is_lost_dash(node, child) and b"-" in self.raw[previous.end_byte : child.start_byte]:
                yield Word("-", "-", is_bare=True)
            if child.type == "file_redirect":
                yield from self._destinations(child)[1:]
            elif child.type == "heredoc_redirect":
                for part in child.children:
                    if part.type in _WORD_TYPES:
                        yield self._word(part)
                    elif part.type == "file_redirect":
                        yield from self._destinations(part)[1:]

    def _note_expansion(self, node: tree_sitter.Node) -> None:
        operators = [self._text(child) for child in node.children if not child.is_named]
        if "@" in operators and self._text(node).rstrip("}").endswith("@P"):
            raise Unreadable("${...@P} runs the commands in a variable's value")
        if "!" in operators:
            raise Unreadable("${!...} names a variable indirectly; name it directly")
        if ":" in operators:
            self.line.has_arithmetic = True  # ${x:expression}
        if "=" in operators or ":=" in operators:
            names = [self._text(child) for child in node.children if child.type == "variable_name"]
            self.line.assigned_by_expansion.extend(names[:1])

    # -- integrity -------------------------------------------------------------------------------

    def _check_gaps(self, node: tree_sitter.Node) -> None:
        """Refuse bytes that belong to no child: a shell may see something there that the tree does not."""
        if node.child_count == 0 or node.type in ("string", "heredoc_body"):
            return
        position = node.start_byte
        for child in node.children:
            self._check_gap(self.raw[position : child.start_byte], node, child)
            position = child.end_byte
        self._check_gap(self.raw[position : node.end_byte], node, None)

    def _check_gap(self, gap: bytes, node: tree_sitter.Node, child: tree_sitter.Node | None) -> None:
        if not gap:
            return
        if node.type == "concatenation":
            raise Unreadable("two words touch")
        if gap.strip(b" \t") == b"-" and gap[:1] in (b" ", b"\t") and _is_lost_dash(node, child):
            return  # `python3 - <<EOF`: the grammar drops the dash; _words_after_redirects puts it back
        if gap.replace(b"\\\n", b"").strip(b" \t\n"):
            raise Unreadable(f"there is text the grammar does not account for: {gap[:20]!r}")
        if node.type in _ONE_LINE_TYPES and b"\n" in gap.replace(b"\\\n", b""):
            raise Unreadable("a command goes on after the end of its line")
        if b"\\\n" in gap and gap[:1] not in (b" ", b"\t"):
            raise Unreadable("a line continuation joins two words; put a space before the backslash")

    def _check_form(self, node: tree_sitter.Node) -> None:
        text = self._text(node)
        match node.type:
            case "comment":
                before = self.raw[node.start_byte - 1 : node.start_byte] if node.start_byte else b"\n"
                if before not in (b" ", b"\t", b"\n", b";", b"&", b"|", b"(", b")"):
                    raise Unreadable("a # inside a word is not a comment")
            case "compound_statement" if node.child_count and node.children[0].type == "((":
                raise Unreadable("((...)) is read differently by sh and bash; use $((...)) or [ ]")
            case "command_substitution" if text.startswith("`"):
                # Inside backquotes every shell strips backslashes and pairs quotes in its own way.
                if re.search(r"[\\'\"`#]", text[1:-1]):
                    raise Unreadable("backquotes around quotes, comments or backslashes; use $(...)")
            case "ansi_c_string":
                if "\\'" in text or "\\\\" in text:
                    raise Unreadable("$'...' with an escaped quote is read differently by sh and bash")
            case "test_command":
                self._check_test(node)
            case "file_redirect" if any(child.type in ("&>", "&>>") for child in node.children):
                # A POSIX shell reads `a &>f b` as `a & >f b`, which runs b.
                parent = node.parent
                is_last = parent is not None and parent.children[-1].end_byte == node.end_byte
                if parent is None or parent.type != "redirected_statement" or not is_last:
                    raise Unreadable("&> is read differently by sh and bash; use > FILE 2>&1")
                if len(self._destinations(node)) != 1:
                    raise Unreadable("&> is read differently by sh and bash; use > FILE 2>&1")
            case "heredoc_redirect":
                self._check_heredoc(node)
            case "word" | "regex" | "extglob_pattern" | "string_content" | "heredoc_content":
                if "\\\n" in text and node.type != "string_content":
                    raise Unreadable("a line continuation joins two words; put a space before the backslash")
                self._check_literal(text)
            case "raw_string":
                self.line.literals.append(text)

    def _check_literal(self, text: str) -> None:
        if _LATER_EXPANDED.search(re.sub(r"\\.", "", text, flags=re.DOTALL)):
            raise Unreadable("there is a substitution the grammar did not resolve")
        if _LATER_EXPANDED.search(text):
            self.line.literals.append(text)

    def _check_test(self, node: tree_sitter.Node) -> None:
        """``[ a && b ]`` runs ``b ]``; so does ``[[ a && b ]]`` in a POSIX shell."""
        text = self._text(node)
        if text.startswith("[[") or re.search(r"\s-v\s", text):
            self.line.has_arithmetic = True
        pending = list(node.children)
        while pending:
            child = pending.pop()
            if child.type in ("string", "raw_string", "command_substitution", "arithmetic_expansion"):
                continue
            if child.type in ("expansion", "simple_expansion", "ansi_c_string", "process_substitution"):
                continue
            if child.child_count:
                pending.extend(child.children)
            elif re.search(r"[&|;()<>\n`]", re.sub(r"\\.", "", self._text(child))):
                raise Unreadable("inside [ ] and [[ ]] only words are read; use [ a ] && [ b ]")
        if b"\n" in self.raw[node.start_byte : node.end_byte]:
            raise Unreadable("a test spans several lines")

    def _check_heredoc(self, node: tree_sitter.Node) -> None:
        """Find the end of a here-document by line, as a shell does, and compare."""
        by_type = {child.type: child for child in node.children}
        start, body, end = (by_type.get(f"heredoc_{part}") for part in ("start", "body", "end"))
        if start is None or body is None or end is None:
            raise Unreadable("a here-document has no end")
        delimiter = re.fullmatch(r"(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\1", self._text(start))
        if delimiter is None:
            raise Unreadable("a here-document's delimiter must be a plain or wholly quoted name")
        head = self.raw[start.end_byte : self.raw.find(b"\n", start.end_byte) + 1]
        position = start.end_byte + len(head)
        if b"\\\n" in head or head.count(b'"') % 2 or head.count(b"'") % 2 or b"<<" in head or b"#" in head:
            raise Unreadable("the line that opens a here-document is too involved")
        strips_tabs = self.raw[node.start_byte : start.start_byte].strip().endswith(b"-")
        content_start = position
        for line in self.raw[position:].split(b"\n"):
            compared = line.lstrip(b"\t") if strips_tabs else line
            if compared == delimiter[2].encode():
                break
            position += len(line) + 1
        if end.end_byte != position + len(line) or body.start_byte < content_start:
            raise Unreadable("a here-document ends elsewhere than the grammar says")
        content = self.raw[content_start:position].decode()
        if delimiter[1]:
            self.line.literals.append(content)
            if body.named_child_count:
                raise Unreadable("a quoted here-document was read as an open one")
        else:
            rest = bytearray(self.raw[content_start:position])
            for child in body.children:
                if child.type != "heredoc_content":
                    first, last = child.start_byte - content_start, child.end_byte - content_start
                    rest[first:last] = b" " * (last - first)
            self._check_literal(rest.decode("utf-8", "replace"))

    # -- words -----------------------------------------------------------------------------------

    def _text(self, node: tree_sitter.Node) -> str:
        return self.raw[node.start_byte : node.end_byte].decode("utf-8", "replace")

    def _word(self, node: tree_sitter.Node) -> Word:
        raw = self._text(node)
        if node.type == "command_name" and node.child_count == 1:
            node = node.children[0]
        parts = node.children if node.type == "concatenation" else [node]
        text: str | None = ""
        prefix, may_split = "", False
        for part in parts:
            piece, piece_prefix, piece_splits = self._piece(part)
            may_split = may_split or piece_splits
            if text is not None:
                prefix += piece_prefix
            text = None if text is None or piece is None else text + piece
        unquoted = "".join(re.sub(r"\\.", "", self._text(p)) for p in parts if p.type in ("word", "number"))
        if _BRACE_LIST.search(unquoted.partition("{")[2]):
            text, may_split = None, True
            prefix = prefix.split("{")[0]
        if parts[0].type == "word" and self._text(parts[0]).startswith("~"):
            text, prefix = None, "~"
        is_bare = all(part.type in ("word", "number") for part in parts) and "\\" not in raw
        return Word(text, raw, "" if text is not None else prefix, may_split and text is None, is_bare)

    def _piece(self, node: tree_sitter.Node) -> tuple[str | None, str, bool]:
        """Return the static text (or None), the certain beginning, and whether it can split."""
        raw = self._text(node)
        match node.type:
            case "word" | "number" if node.child_count == 0:
                known = re.match(r"(?:\\.|[^*?\[\\])*", raw, flags=re.DOTALL)
                text = re.sub(r"\\(.)", r"\1", known[0] if known else "", flags=re.DOTALL)
                is_glob = known is None or known.end() != len(raw)
                return (None if is_glob else text), text, is_glob
            case "variable_name" | "special_variable_name" | "test_operator":
                return raw, raw, False
            case "raw_string":
                return raw[1:-1], raw[1:-1], False
            case "string":
                return self._string(node)
            case "ansi_c_string" | "translated_string" | "arithmetic_expansion" | "process_substitution":
                return None, "", False
            case "simple_expansion" | "expansion" | "command_substitution" | "brace_expression":
                return None, "", True
            case "number":  # base#$(...) forms
                return None, "", True
            case _ if not node.is_named and node.type in _KEYWORDS:
                return raw, raw, False
            case _ if not node.is_named and raw in ("$", "{", "}", "[", "]", "!", "=", "==", "=~"):
                return (None, "", True) if raw == "$" else (raw, raw, False)
            case _:
                raise Unreadable(f"it uses a form that is not supported here ({node.type})")

    def _string(self, node: tree_sitter.Node) -> tuple[str | None, str, bool]:
        text, is_static = "", True
        position = node.start_byte + 1
        for child in [*node.children[1:-1], None]:
            stop = node.end_byte - 1 if child is None else child.start_byte
            text += self._string_literal(position, stop) if is_static else ""
            if child is None:
                break
            position = child.end_byte
            if child.type == "string_content" or not child.is_named:
                text += self._string_literal(child.start_byte, child.end_byte) if is_static else ""
            else:
                is_static = False
        may_split = "$@" in self._text(node) or "[@]" in self._text(node) or "@}" in self._text(node)
        return (text if is_static else None), text, may_split and not is_static

    def _string_literal(self, start: int, stop: int) -> str:
        raw = self.raw[start:stop].decode("utf-8", "replace")
        self._check_literal(raw)
        return re.sub(r"\\([$`\"\\]|\n)", lambda m: "" if m[1] == "\n" else m[1], raw)


def _is_lost_dash(node: tree_sitter.Node, child: tree_sitter.Node | None) -> bool:
    return node.type == "redirected_statement" and child is not None and child.type == "heredoc_redirect"
