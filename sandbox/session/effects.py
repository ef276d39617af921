"""Carry out what was allowed, through the guest, and say what came of it. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sandbox.container.spec import ClosedShell, ContainerSpec, Image
from sandbox.digest import blake3_hex
from sandbox.errors import GuestError
from sandbox.events import ToolResult, excerpt
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command, CommandResult, ExecSeen, FileContent, FileFailed, SpawnFailed
from sandbox.policy.commands.line import decide_command
from sandbox.policy.model import Limits, ShellPolicy
from sandbox.policy.paths import canonical_path
from sandbox.session.actions import (
    Action,
    CreateFile,
    ListFiles,
    ModifyFile,
    Outcome,
    ReadFile,
    RunCommand,
    SearchFiles,
    Unavailable,
)
from sandbox.session.execs import ActionExecs

MAX_FILE_BYTES = 8 * 1024 * 1024
MAX_TEXT_FOR_MODEL = 32_000
"""Characters of one tool result that the model sees; the middle is cut, the ends are kept."""
MAX_LISTED = 2_000
MAX_MATCHES = 200
TICKET = "AGENT_RUNNER_TICKET"
"""Known to images/guest/wrapper.c too."""

CLOSED_HINT = (
    "shell.mode closed: only the programs of shell.allowed_binaries and their helpers run here; any other, "
    "whatever starts it, gets 'Permission denied'"
)
_NOT_RUN = (126, 127)

Effect = tuple[ToolResult, Outcome]
"""What is recorded, and what the agent is told."""


@dataclass(frozen=True)
class Shell:
    """How a command line is run in this image."""

    path: str
    env: Mapping[str, str]
    blocked_paths: tuple[str, ...] = ()
    """Where the refusal program stands in for a blocked one."""
    closed: ClosedShell | None = None
    """Not None: only listed programs and their helpers run."""
    agents: frozenset[str] = frozenset()
    """Programs whose own shells are judged line by line."""
    unwrapped: str = ""
    """The shell itself, when ``path`` leads to one that asks first. An agent is started by this one: what
    it starts has no shell above it that was allowed, and is judged in full."""
    ticket: Callable[[], str] | None = None
    """Gives a word that lets the asking shell run a line that was judged already."""

    def command(self, line: str) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return arguments and environment that run a line that was allowed."""
        if self.ticket is None:
            return (self.path, "-c", line), dict(self.env)
        if self._starts_agent(line):
            return (self.unwrapped, "-c", line), dict(self.env)
        return (self.path, "-c", line), {**self.env, TICKET: self.ticket()}

    def _starts_agent(self, line: str) -> bool:
        found = decide_command(ShellPolicy(allowed_binaries=tuple(self.agents)), line).commands
        return any(command.program in self.agents for command in found)


def shell_of(
    image: Image, spec: ContainerSpec, agents: tuple[str, ...] = (), ticket: Callable[[], str] | None = None
) -> Shell:
    """Return how command lines run in a container made from this image.

    ``agents`` and ``ticket`` are for an image whose shells ask before they run anything.
    """
    asking = image.asking_shells
    return Shell(
        image.shell,
        dict(spec.env),
        image.blocked_paths,
        image.closed,
        agents=frozenset(agents),
        unwrapped=asking.original_shell if asking is not None else "",
        ticket=ticket if asking is not None else None,
    )


async def carry_out(
    guest: GuestChannel,
    action: Action,
    shell: Shell,
    limits: Limits,
    execs: ActionExecs,
) -> Effect:
    """Do one allowed action. Raises GuestError when the container is gone.

    ``execs`` is told of every program that a command starts, before this returns.
    """
    match action.operation:
        case ReadFile() as operation:
            return await _read(guest, action.id, operation)
        case ListFiles() as operation:
            return await _list(guest, action.id, operation)
        case SearchFiles() as operation:
            return await _search(guest, action.id, operation)
        case CreateFile(path=path, content=content):
            failed = await guest.write_file(_inside(path), content.encode(), must_create=True)
            return _written(action.id, failed, content, f"created {path}")
        case ModifyFile() as operation:
            return await _modify(guest, action.id, operation)
        case RunCommand(command=line, timeout_seconds=asked):
            argv, env = await asyncio.to_thread(shell.command, line)
            timeout = min(asked or limits.command_seconds, limits.command_seconds)
            command = Command(
                argv=argv,
                env=env,
                timeout_seconds=timeout,
                max_output_bytes=limits.output_bytes,
            )
            if guest.observes_execs:
                ran = await guest.run(command, on_exec=execs)
            else:  # Where the runtime cannot show them all, the first one is known.
                first = argv[0].encode(), tuple(word.encode("utf-8", "replace")[:256] for word in argv)
                ran = await guest.run(
                    command, on_started=lambda pid: execs(ExecSeen(pid, 0, *first, is_cut=len(line) > 256))
                )
            if isinstance(ran, SpawnFailed):
                return _failed(action.id, FileFailed(ran.errno_name, ran.message))
            return _command_result(action.id, ran, timeout, execs, is_closed=shell.closed is not None)
        case Unavailable():
            raise AssertionError("an unavailable tool is never allowed")


async def _read(guest: GuestChannel, action_id: str, operation: ReadFile) -> Effect:
    read = await guest.read_file(_inside(operation.path), MAX_FILE_BYTES, operation.offset)
    if isinstance(read, FileFailed):
        return _failed(action_id, read)
    text = read.content.decode("utf-8", "replace")
    result = ToolResult(
        action_id=action_id,
        ok=True,
        output_bytes=read.size,
        cut_bytes=max(0, read.size - operation.offset - len(read.content)),
        content_blake3=blake3_hex(read.content),
        excerpt=excerpt(text),
    )
    return result, Outcome("done", _shorten(text))


async def _list(guest: GuestChannel, action_id: str, operation: ListFiles) -> Effect:
    listing = await guest.list_files(
        _inside(operation.path), is_recursive=operation.is_recursive, max_entries=MAX_LISTED
    )
    if isinstance(listing, FileFailed):
        return _failed(action_id, listing)
    marks = {"directory": "/", "symlink": "@", "other": "?", "file": ""}
    lines = [
        f"{entry.path.decode('utf-8', 'replace')}{marks[entry.kind]}"
        + (f"  {entry.size}" if entry.kind == "file" else "")
        for entry in listing.entries
    ]
    if listing.is_cut:
        lines.append(f"… only the first {MAX_LISTED} names are shown")
    return _text(action_id, "\n".join(lines) or "(empty)")


async def _search(guest: GuestChannel, action_id: str, operation: SearchFiles) -> Effect:
    found = await guest.search(operation.pattern, _inside(operation.path), max_matches=MAX_MATCHES)
    if isinstance(found, FileFailed):
        return _failed(action_id, found)
    lines = [
        f"{match.path.decode('utf-8', 'replace')}:{match.line}: {match.text.decode('utf-8', 'replace')}"
        for match in found.matches
    ]
    if found.is_cut:
        lines.append(f"… only the first {MAX_MATCHES} matches are shown")
    return _text(action_id, "\n".join(lines) or "(no match)")


async def _modify(guest: GuestChannel, action_id: str, operation: ModifyFile) -> Effect:
    path = _inside(operation.path)
    read = await guest.read_file(path, MAX_FILE_BYTES)
    if isinstance(read, FileFailed):
        return _failed(action_id, read)
    changed = _replace_once(read, operation)
    if isinstance(changed, FileFailed):
        return _failed(action_id, changed)
    failed = await guest.write_file(path, changed, must_create=False)
    return _written(action_id, failed, operation.new, f"modified {operation.path}")


def _replace_once(read: FileContent, operation: ModifyFile) -> bytes | FileFailed:
    if read.size > len(read.content):
        return FileFailed("EFBIG", f"files over {MAX_FILE_BYTES} bytes are not edited")
    old = operation.old.encode()
    if not old:
        return FileFailed("EINVAL", "the passage to replace is empty; quote the exact text of the file")
    count = read.content.count(old)
    if count != 1:
        found = "does not occur" if count == 0 else f"occurs {count} times"
        return FileFailed("EINVAL", f"the passage to replace {found}; quote it exactly, with enough context")
    return read.content.replace(old, operation.new.encode())


def _inside(path: str) -> bytes:
    """Return the workspace-relative path that was decided; the guest gets these bytes and no others."""
    canonical = canonical_path(path)
    if canonical is None:
        raise GuestError(f"cannot use path {path!r}: decide_path lets no such path through")
    return canonical or b"."


def _command_result(
    action_id: str, ran: CommandResult, timeout: float, execs: ActionExecs, *, is_closed: bool
) -> Effect:
    stdout, stderr = (part.decode("utf-8", "replace") for part in (ran.stdout, ran.stderr))
    if ran.timed_out:
        ending = f"timed out after {timeout:g} s; its whole process tree was killed"
    elif ran.signal is not None:
        ending = f"ended by signal {ran.signal}"
    else:
        ending = f"exit code {ran.exit_code}"
    parts = [ending]
    if stdout:
        parts.append(f"--- stdout\n{_shorten(stdout)}")
    if stderr:
        parts.append(f"--- stderr\n{_shorten(stderr)}")
    if ran.cut_bytes:
        parts.append(f"--- {ran.cut_bytes} bytes of output were cut")
    if is_closed and (ran.exit_code in _NOT_RUN or b"Permission denied" in ran.stderr):
        parts.append(f"--- {CLOSED_HINT}")
    parts += [f"--- {line}" for line in execs.guidance(stdout + stderr)]
    result = ToolResult(
        action_id=action_id,
        ok=not ran.timed_out,
        exit_code=ran.exit_code,
        signal=ran.signal,
        timed_out=ran.timed_out,
        wall_ms=ran.wall_ms,
        cpu_ms=ran.cpu_ms,
        output_bytes=ran.stdout_bytes + ran.stderr_bytes,
        cut_bytes=ran.cut_bytes,
        content_blake3=blake3_hex(ran.stdout + b"\0" + ran.stderr),
        excerpt=excerpt((stderr or stdout).strip()[-400:]),
        execs_unrecorded=ran.execs_left_out + execs.unrecorded,
    )
    return result, Outcome("done", "\n".join(parts))


def _text(action_id: str, text: str) -> Effect:
    encoded = text.encode()
    result = ToolResult(
        action_id=action_id,
        ok=True,
        output_bytes=len(encoded),
        content_blake3=blake3_hex(encoded),
        excerpt=excerpt(text),
    )
    return result, Outcome("done", _shorten(text))


def _written(action_id: str, failed: FileFailed | None, content: str, message: str) -> Effect:
    if failed is not None:
        return _failed(action_id, failed)
    encoded = content.encode()
    result = ToolResult(
        action_id=action_id,
        ok=True,
        output_bytes=len(encoded),
        content_blake3=blake3_hex(encoded),
        excerpt=excerpt(message),
    )
    return result, Outcome("done", message)


def _failed(action_id: str, failure: FileFailed) -> Effect:
    text = f"{failure.errno_name}: {failure.message}"
    return ToolResult(action_id=action_id, ok=False, excerpt=excerpt(text)), Outcome("failed", text)


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT_FOR_MODEL:
        return text
    half = MAX_TEXT_FOR_MODEL // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters cut …\n{text[-half:]}"
