"""Decide a command line before it is sent into the container. Pure: no I/O, no clock. D6

What this decision can mean: it is the agent's *tool surface*. It says which programs a line names, also
inside pipelines, substitutions, functions, here-documents and wrappers, and answers with a sentence the
agent can act on. A line that cannot be read to the last byte is refused.

What it cannot mean: an allowed interpreter, build tool or git runs other programs by itself, from files this
module never sees, and a shell evaluates data again in ways no reader can follow for certain. The boundary is
in the container: blocked programs are unreachable there for the whole process tree, files are hidden by
deny patterns, and the network has one door. Nothing here is a reason to loosen any of that.

Rules, as they appear in ``Decision.rule``:

- ``shell.allowed_binaries``, ``shell.blocked_commands``, ``shell.builtin``, ``shell.function``: by name
- ``shell.unparsable``, ``shell.hidden_command``, ``shell.empty``: the line cannot be read, or hides text
- ``shell.dynamic_program``: which program runs is only known when it runs
- ``shell.program_path``, ``shell.workspace_program``, ``shell.loader``: named by a path
- ``shell.environment``, ``shell.source``, ``shell.wrapper_option``, ``shell.exec_option``,
  ``shell.git_exec_option``, ``shell.network_redirect``: ways to run something else than what is named
- ``shell.require_confirmation``, ``shell.pre_approved``

Transparent wrappers (``env``, ``timeout``, ``nice``, ``nohup``, ``stdbuf``, ``setsid``, ``ionice``, ``time``,
``coproc``, ``command``, ``builtin``, ``exec``, ``eval``, ``trap``) need no listing, because they add nothing
to their payload. Every other wrapper (``sudo``, ``sh``, ``xargs``, ``find``, ``busybox`` ...) must be allowed
itself, and so must what it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from sandbox.policy.commands.environment import refused_variable
from sandbox.policy.commands.payload import Refused
from sandbox.policy.commands.programs import (
    HARMLESS_BUILTINS,
    NAMING_BUILTINS,
    RESERVED_WORDS,
    STANDARD_DIRECTORIES,
)
from sandbox.policy.commands.shell import Assignment, Command, Line, Unreadable, Word, read_line
from sandbox.policy.commands.unwrap import unwrap
from sandbox.policy.decide import Decision, allow, confirm, deny, strictest
from sandbox.policy.model import ShellPolicy

MAX_COMMANDS = 500
MAX_NESTING = 8
"""How deep ``sh -c`` inside ``sh -c`` is followed."""


@dataclass(frozen=True)
class SimpleCommand:
    """One command the line would run, and what was decided about it."""

    program: str | None
    """The name judged, without a standard directory; None when it is only known at run time."""
    argv: tuple[str | None, ...]
    """Wrappers removed. None stands for a word that is only known at run time."""
    wrappers: tuple[str, ...]
    """Wrappers that were peeled off, outermost first."""
    decision: Decision


@dataclass(frozen=True)
class CommandDecision:
    """The answer to a line: the strictest of its parts."""

    decision: Decision
    commands: tuple[SimpleCommand, ...]
    """In the order found; empty when the line could not be read."""


def decide_command(shell: ShellPolicy, line: str) -> CommandDecision:
    """Decide a whole command line. Never raises; whatever is not understood is denied."""
    judge = _Judge(shell)
    try:
        parsed = judge.judge_line(line, (), frozenset(), 0)
    except Unreadable as exc:
        refusal = deny(
            "shell.unparsable", f"The command line was refused because it was not understood: {exc}."
        )
        return CommandDecision(refusal, tuple(judge.found))
    except RecursionError:  # a line nested deeper than the stack; cannot be judged
        refusal = deny("shell.unparsable", "The command line was refused because it is nested too deeply.")
        return CommandDecision(refusal, ())
    judge.refuse_forgotten_functions()
    decisions = [command.decision for command in judge.found] + judge.line_decisions
    if not decisions:
        empty = deny("shell.empty", "The command line was refused because it holds no command.")
        return CommandDecision(empty, ())
    decision = strictest(decisions)
    if decision.is_allowed and shell.require_confirmation:
        decision = _confirmation(shell, line, parsed)
    return CommandDecision(decision, tuple(judge.found))


def _confirmation(shell: ShellPolicy, line: str, parsed: Line) -> Decision:
    """A pattern ending in `` *`` approves one static command only: ``git log *`` must not approve a list."""
    for pattern in shell.pre_approved:
        if line == pattern and not pattern.endswith(" *"):
            return allow("shell.pre_approved", f"Matches pre_approved {pattern!r}.")
        if pattern.endswith(" *") and line.startswith(pattern[:-1]) and parsed.is_single:
            return allow("shell.pre_approved", f"Matches pre_approved {pattern!r}.")
    return confirm("shell.require_confirmation", "This policy asks a person before each command runs.")


@dataclass
class _Judge:
    shell: ShellPolicy
    found: list[SimpleCommand] = field(default_factory=list)
    line_decisions: list[Decision] = field(default_factory=list)

    def judge_line(
        self, text: str, wrappers: tuple[str, ...], functions: frozenset[str], nesting: int
    ) -> Line:
        if nesting > MAX_NESTING:
            raise Unreadable("shells are nested too deeply")
        line = read_line(text)
        self._judge_whole(line)
        for command in line.commands:
            known = functions | command.functions
            for assignment in command.assignments:
                self._judge_variable(assignment)
            if command.words:
                self._judge_command(Command(command.words, (), known), wrappers, nesting)
            else:
                self.line_decisions.append(allow("shell.builtin", "Assignments run nothing."))
        if not line.commands and line.has_redirection:
            self.line_decisions.append(allow("shell.builtin", "A redirection alone runs nothing."))
        return line

    def refuse_forgotten_functions(self) -> None:
        """Refuse a line that calls a function and uses unset: the call would then run a program instead."""
        calls = any(command.decision.rule == "shell.function" for command in self.found)
        if calls and any(command.program == "unset" for command in self.found):
            self._refuse_line("shell.function", "it calls a function and uses unset, which can remove it")

    # -- the line as a whole ---------------------------------------------------------------------

    def _judge_whole(self, line: Line) -> None:
        for name in [*line.loop_names, *line.assigned_by_expansion]:
            self._judge_variable(Assignment(name, Word(None, "")))
        hidden = any(_HIDDEN.search(literal) for literal in line.literals)
        if hidden and (line.has_arithmetic or any(_evaluates_again(c) for c in line.commands)):
            self._refuse_line(
                "shell.hidden_command",
                "it quotes a substitution and evaluates text again, which would run it",
            )
        hides_network = any(
            _NETWORK.search(word.text or word.raw)
            for command in line.commands
            for word in _all_words(command)
        )
        for target in line.targets:
            known = target.text if target.text is not None else target.prefix
            if _NETWORK.match(known) or (
                target.text is None
                and (hides_network or known.startswith("/dev") or (known and "/dev/".startswith(known)))
            ):
                self._refuse_line(
                    "shell.network_redirect",
                    f"the redirection to {target.raw[:60]!r} can open a connection",
                )

    def _refuse_line(self, rule: str, reason: str) -> None:
        self.line_decisions.append(deny(rule, f"The command line was refused because {reason}."))

    def _judge_variable(self, assignment: Assignment) -> None:
        if _HIDDEN.search(assignment.value.text or ""):
            self._refuse_line(
                "shell.hidden_command", f"the value of {assignment.name} holds a substitution as text"
            )
        refusal = refused_variable(assignment.name, assignment.value)
        if refusal is not None:
            self._refuse_line("shell.environment", refusal)

    # -- one command -----------------------------------------------------------------------------

    def _judge_command(self, command: Command, wrappers: tuple[str, ...], nesting: int) -> None:
        if len(self.found) >= MAX_COMMANDS:
            raise Unreadable(f"it holds more than {MAX_COMMANDS} commands")
        if nesting > MAX_NESTING:
            raise Unreadable("wrappers are nested too deeply")
        program, *arguments = command.words
        if program.text is None:
            self._record(None, command, wrappers, self._refuse(
                program.raw[:60], "shell.dynamic_program",
                "which program it is would only be known when it runs; name the program itself",
            ))  # fmt: skip
            return
        if program.text in RESERVED_WORDS and program.is_bare:
            raise Unreadable(f"{program.text!r} stands where a program is expected")
        name, refusal = self._name_of(program.text)
        if refusal is not None:
            self._record(name, command, wrappers, refusal)
            return
        is_function = program.text in command.functions and "/" not in program.text
        unwrapped = unwrap(name, arguments)
        if isinstance(unwrapped, Refused):
            self._record(name, command, wrappers, self._refuse(name, unwrapped.rule, unwrapped.reason))
            return
        if unwrapped is None:
            self._record(
                name, command, wrappers, self._decide_name(program.text, name, arguments, is_function)
            )
            return
        inner = (*wrappers, name)
        for assignment in unwrapped.assignments:
            self._judge_variable(assignment)
        if not unwrapped.is_transparent or not (unwrapped.commands or unwrapped.scripts):
            self._record(name, command, wrappers, allow("shell.builtin", "Runs nothing by itself.")
                         if unwrapped.is_transparent
                         else self._decide_name(program.text, name, arguments, is_function))  # fmt: skip
        functions = command.functions if unwrapped.knows_functions else frozenset()
        for words in unwrapped.commands:
            self._judge_command(Command(words, (), functions), inner, nesting + 1)
        for script in unwrapped.scripts:
            before = len(self.found) + len(self.line_decisions)
            self.judge_line(script, inner, functions, nesting + 1)
            if len(self.found) + len(self.line_decisions) == before:
                self.line_decisions.append(allow("shell.builtin", "An empty script runs nothing."))
        for words in unwrapped.packages:
            self._judge_package(Command(words), inner)

    def _name_of(self, written: str) -> tuple[str, Decision | None]:
        """Return the name to judge; a refusal when the program is named by a path that is not one of bin."""
        directory, slash, name = written.rpartition("/")
        if name in self.shell.blocked_commands:
            return name, self._refuse(
                name, "shell.blocked_commands", "nothing in this sandbox can run it", shows_allowed=True
            )
        if not slash:
            if not written or not re.fullmatch(r"[^\s=\x00-\x1f]+", written):
                return written, self._refuse(written, "shell.program_path", "it is not the name of a program")
            return written, None
        if written in self.shell.allowed_binaries and not written.startswith("/"):
            return written, None
        normal = re.sub(r"/(\./|/)*", "/", directory + "/").rstrip("/")
        if normal in STANDARD_DIRECTORIES and name not in ("", ".", ".."):
            return name, None
        if written.startswith("/") or ".." in written.split("/"):
            return name, self._refuse(
                written, "shell.program_path", "programs are named by name, or by a path in a bin directory",
                shows_allowed=True,
            )  # fmt: skip
        return name, self._refuse(
            written, "shell.workspace_program",
            f"a program of the workspace runs only when allowed_binaries lists it as {written!r}",
            shows_allowed=True,
        )  # fmt: skip

    def _decide_name(self, written: str, name: str, arguments: Iterable[Word], is_function: bool) -> Decision:
        if name in self.shell.allowed_binaries:
            return allow("shell.allowed_binaries", f"{name} is listed in allowed_binaries.")
        if is_function:
            return allow("shell.function", f"{name} is a function of this line; its body is judged.")
        if name in HARMLESS_BUILTINS and "/" not in written:
            return self._decide_builtin(name, list(arguments))
        return self._refuse(
            name, "shell.allowed_binaries", "it is not an allowed program", shows_allowed=True
        )

    def _decide_builtin(self, name: str, arguments: list[Word]) -> Decision:
        names_variables = name in NAMING_BUILTINS and (name != "printf" or _has_v_option(arguments))
        for word in arguments if names_variables else []:
            if word.text is None and "=" not in word.prefix and name != "printf":
                return self._refuse(
                    name, "shell.environment", "the variable it sets must be named in the line"
                )
            known = word.text if word.text is not None else word.prefix
            if name == "unset" and known != "PATH" and not known.startswith("-"):
                continue
            if (
                known.startswith("-")
                and name not in ("read", "getopts", "printf")
                and set(known) & set("fni")
            ):
                return self._refuse(name, "shell.builtin", f"its option {known!r} changes what names mean")
            variable, _, value = known.partition("=")
            value_word = Word(value if word.text is not None else None, value)
            refusal = refused_variable(variable.rstrip("+").split("[")[0], value_word)
            if refusal is not None:
                return self._refuse(name, "shell.environment", refusal)
        if name == "set" and any(w.text is None and w.may_be_option for w in arguments[:1]):
            return self._refuse(name, "shell.dynamic_program", "its options must be written out")
        return allow("shell.builtin", f"{name} is a harmless shell builtin.")

    def _judge_package(self, command: Command, wrappers: tuple[str, ...]) -> None:
        """A package runner may run any package's program, but not a blocked one by name."""
        program = command.words[0]
        name = (program.text or "").rpartition("/")[2]
        if program.text is None or name in self.shell.blocked_commands:
            rule = "shell.dynamic_program" if program.text is None else "shell.blocked_commands"
            self._record(None if program.text is None else name, command, wrappers, self._refuse(
                program.raw[:60], rule, "nothing in this sandbox can run it", shows_allowed=True
            ))  # fmt: skip

    def _record(
        self, name: str | None, command: Command, wrappers: tuple[str, ...], decision: Decision
    ) -> None:
        argv = tuple(word.text for word in command.words)
        self.found.append(SimpleCommand(name, argv, wrappers, decision))

    def _refuse(self, name: str, rule: str, reason: str, *, shows_allowed: bool = False) -> Decision:
        sentence = f"`{name}` was refused by {rule}: {reason}"
        if shows_allowed:
            allowed = self.shell.allowed_binaries
            shown = ", ".join(allowed[:12]) + (", …" if len(allowed) > 12 else "")
            sentence += f"; allowed programs: {shown or 'none'}"
        return deny(rule, sentence + ".")


_HIDDEN = re.compile(r"\$\(|\$\{|`")
_NETWORK = re.compile(r"/+dev/+(tcp|udp)(/|$)")


def _all_words(command: Command) -> list[Word]:
    return [*command.words, *(assignment.value for assignment in command.assignments)]


def _has_v_option(arguments: list[Word]) -> bool:
    return bool(arguments) and (arguments[0].text is None or arguments[0].text.startswith("-v"))


def _evaluates_again(command: Command) -> bool:
    """Builtins that evaluate a subscript in a name they are given: ``read 'x[$(rm y)]'``."""
    if not command.words or command.words[0].text is None:
        return False
    name, arguments = command.words[0].text, list(command.words[1:])
    if name in ("test", "[", "wait"):
        return any(word.text in ("-v", "-p", None) for word in arguments)
    return name in NAMING_BUILTINS and (name != "printf" or _has_v_option(arguments))
