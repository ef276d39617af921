"""Say where a policy's list of programs promises less than it seems to: who else can do the work. Pure. D6"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.policy.commands.helper_programs import helpers_of
from sandbox.policy.commands.programs import LAUNCHERS, SHELLS, WORKS
from sandbox.policy.model import ShellPolicy

MOST_NAMED = 5

Remark = tuple[str, str, str]
"""Rule id, dotted key, message."""


def remark_on_shell(shell: ShellPolicy) -> Iterator[Remark]:
    """Yield what the author of these shell rules may not mean."""
    yield from _launchers(shell)
    yield from _same_work(shell)
    yield from _paths(shell)
    yield from _helpers(shell)
    if shell.mode == "closed":
        yield from _unlisted_work(shell)
        if shell.workspace_exec:
            yield (
                "built-programs-run",
                "shell.workspace_exec",
                "files made in the workspace may be executed, so a program that is not listed can be brought "
                "along; where nothing has to be built, workspace_exec: false closes that",
            )


def _launchers(shell: ShellPolicy) -> Iterator[Remark]:
    if not shell.blocked_commands:
        return
    for index, name in enumerate(shell.allowed_binaries):
        if name in LAUNCHERS and name not in shell.blocked_commands:
            yield (
                "launcher",
                f"shell.allowed_binaries.{index}",
                f"{name!r} runs {LAUNCHERS[name]}, which no command line shows; blocked programs stay "
                "unreachable for it too, but their work can be done without them",
            )


def _same_work(shell: ShellPolicy) -> Iterator[Remark]:
    runnable = _runnable(shell)
    for index, name in enumerate(shell.blocked_commands):
        for work in WORKS:
            able = [other for other in work.able if other in runnable and other != name]
            if name in work.programs and able:
                yield (
                    "same-work",
                    f"shell.blocked_commands.{index}",
                    f"{name!r} is blocked, but {_some(able)} can {work.what} too; the wall is {work.wall}",
                )


def _unlisted_work(shell: ShellPolicy) -> Iterator[Remark]:
    """In a closed shell whatever is not listed is as good as blocked: the same question, turned round."""
    runnable = _runnable(shell)
    for work in WORKS:
        missing = sorted(work.programs - runnable - set(shell.blocked_commands))
        able = [name for name in work.able if name in runnable]
        if missing and able and not work.programs & runnable:
            yield (
                "unlisted-work",
                "shell.allowed_binaries",
                f"{_some(missing)} cannot run, but {_some(able)} can {work.what} too; "
                f"the wall is {work.wall}",
            )


def _paths(shell: ShellPolicy) -> Iterator[Remark]:
    for index, name in enumerate(shell.allowed_binaries):
        if name.startswith("./") and not shell.workspace_exec:
            yield (
                "unrunnable-path",
                f"shell.allowed_binaries.{index}",
                f"{name!r} is in the workspace, where nothing can be executed (workspace_exec: false); "
                "list the interpreter it is for, or set workspace_exec: true",
            )


def _helpers(shell: ShellPolicy) -> Iterator[Remark]:
    if shell.helpers and shell.mode == "open":
        yield "helpers-unused", "shell.helpers", "helpers have a meaning in mode: closed only"
        return
    found = helpers_of(shell.allowed_binaries, shell.helpers)
    reached = {*shell.allowed_binaries, *(helper.program for helper in found)}
    for program, helpers in shell.helpers.items():
        where = f"shell.helpers.{program}"
        if program not in reached:
            yield "helpers-unused", where, f"{program!r} is neither listed nor a helper of what is"
        for helper in helpers:
            if "/" in helper and not helper.startswith("/"):
                yield (
                    "helpers-unused",
                    where,
                    f"{helper!r} names no program: give a name, or an absolute path",
                )
            elif helper in shell.blocked_commands:
                yield "helpers-unused", where, f"{helper!r} is blocked, and the block wins"


def _runnable(shell: ShellPolicy) -> set[str]:
    """Names that a command may run, as far as the policy tells; an open shell has the whole image besides."""
    names = set(shell.allowed_binaries)
    if shell.mode == "closed":
        # The shell that runs the command lines is there in any case.
        helpers = helpers_of(shell.allowed_binaries, shell.helpers)
        names |= {*(helper.program for helper in helpers), *SHELLS & {"sh", "bash"}}
    return names - set(shell.blocked_commands)


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
