"""What host and guest say to each other, as values. No bytes, no I/O: see ``codec`` and ``channel``.

Everything the guest sends is a claim. The host bounds it, never trusts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Relay:
    """One loopback listener in the container that leads to the egress socket."""

    address: str
    """IPv4 loopback address, e.g. ``127.0.0.1`` or ``127.77.0.2``."""
    port: int
    connect: str | None
    """None: bytes are relayed as they are (the proxy port). ``name:port``: the guest first asks the
    gateway to ``CONNECT`` there and relays only after its 200 (for clients that ignore proxy variables)."""


@dataclass(frozen=True)
class ExecRules:
    """``shell.mode: closed`` for the kernel: absolute paths in the container, links resolved. D6

    A directory stands for everything beneath it. What no list names can be neither read nor run; names of
    files are no secret, so every directory can be listed. A path that is missing stops the guest.
    """

    executable: tuple[str, ...]
    """Files that may be executed (and read); also the ELF interpreters they need."""
    readable: tuple[str, ...]
    """Files and directories that may be read."""
    writable: tuple[str, ...]
    """Directories in which files may be read, written, made and removed; executed only if listed as such."""


@dataclass(frozen=True)
class ExecSeen:
    """One execve in a command's tree, as the guest read it from the caller's memory: a claim. D6"""

    pid: int
    """Of the process, in the container; also when one of its threads asked."""
    parent: int
    """0: not known."""
    path: bytes
    """As the caller wrote it, cut to 1,024 bytes; empty when the caller could not be read."""
    argv: tuple[bytes, ...]
    """At most 32 arguments, each cut to 256 bytes."""
    is_cut: bool
    """True when arguments were left out or cut, or could not be read."""
    found: bytes = b""
    """The absolute path that ``path`` led to, links resolved, cut like it; empty when that is ``path``
    itself, or unknown."""


@dataclass(frozen=True)
class GuestConfig:
    """First message after the handshake; sent once."""

    workspace: str = "/workspace"
    egress_socket: str | None = None
    """Path of the gateway's Unix socket inside the container; None: no relays may be given."""
    relays: tuple[Relay, ...] = ()
    exec_rules: ExecRules | None = None
    """None: everything in the image that is not masked may run."""
    observe_execs: bool = True
    """Report every execve of every command's tree. Where the kernel cannot, the guest does not start."""


@dataclass(frozen=True)
class Ready:
    """The guest is configured. All fields are claims."""

    version: str
    landlock_abi: int
    """0: the kernel or runtime has none."""
    uid: int


@dataclass(frozen=True)
class Command:
    """One process tree to run."""

    argv: tuple[str | bytes, ...]
    cwd: str | bytes = "."
    """Relative to the workspace, resolved beneath it."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment; nothing is inherited."""
    stdin: bytes = b""
    timeout_seconds: float = 300.0
    """Then the whole tree is killed."""
    max_output_bytes: int = 256 * 1024
    """Kept of stdout, and as much of stderr; the rest is read, counted and dropped."""


ExecListener = Callable[[ExecSeen], None]
"""Called for each exec, soon after it, and before the command's result is returned."""

OutputListener = Callable[[Literal["stdout", "stderr"], bytes], None]
"""Called with each piece of kept output as it arrives."""


@dataclass(frozen=True)
class CommandResult:
    """How a command ended. A non-zero exit is a result, not an error."""

    exit_code: int | None
    """None when a signal ended it."""
    signal: int | None
    timed_out: bool
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    """All that was written, kept or not."""
    stderr_bytes: int
    wall_ms: int
    cpu_ms: int
    max_rss_bytes: int
    claimed_pid: int
    execs_left_out: int = 0
    """Programs started of which no ExecSeen came: more than the guest reports, or than the host took."""

    @property
    def cut_bytes(self) -> int:
        """Output that was dropped."""
        return self.stdout_bytes + self.stderr_bytes - len(self.stdout) - len(self.stderr)


@dataclass(frozen=True)
class SpawnFailed:
    """The command could not be started; ``errno_name`` e.g. ``ENOENT``."""

    errno_name: str
    message: str


@dataclass(frozen=True)
class FileContent:
    """A file's bytes, at most what was asked for."""

    content: bytes
    size: int
    """The file's full size when it was opened."""


@dataclass(frozen=True)
class FileEntry:
    """One name in the workspace."""

    path: bytes
    """Relative to the workspace; any bytes but NUL."""
    kind: Literal["file", "directory", "symlink", "other"]
    size: int


@dataclass(frozen=True)
class Listing:
    """Names beneath a directory, sorted by path."""

    entries: tuple[FileEntry, ...]
    is_cut: bool
    """True when there were more than ``max_entries``."""


@dataclass(frozen=True)
class SearchMatch:
    """One line that matched."""

    path: bytes
    line: int
    text: bytes
    """The line, cut to 400 bytes."""


@dataclass(frozen=True)
class SearchResult:
    """Matches in path order."""

    matches: tuple[SearchMatch, ...]
    is_cut: bool


@dataclass(frozen=True)
class FileFailed:
    """A file operation the guest refused or the kernel did; nothing was changed."""

    errno_name: str
    message: str
