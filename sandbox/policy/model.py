"""The policy as data: frozen, strict, every default written out. Decides nothing, reads nothing.

``Policy`` is the effective policy of one session. Both file shapes (a map of profiles; a full
document with ``tool_surface``) become this one type in ``load``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from sandbox.digest import Digest, digest_json


def _checked_program(name: str) -> str:
    """A program is named as it would be called. ``git push`` or ``r*`` would match nothing, silently."""
    if not re.fullmatch(r"[^\s/*?\[\]{}$`'\"\\;&|<>()=~#-][^\s/*?\[\]{}$`'\"\\;&|<>()=]*|\[", name):
        raise ValueError(f"{name!r} is not the name of one program (no spaces, options, paths or patterns)")
    return name


def _checked_allowed(name: str) -> str:
    if name.startswith("./") and re.fullmatch(r"\./[^\s*?\[\]{}$`'\"\\;&|<>()=]+", name):
        if ".." in name.split("/"):
            raise ValueError(f"{name!r} leaves the workspace; name a program inside it")
        return name
    return _checked_program(name)


def _as_entry(value: object) -> object:
    return {"host": value} if isinstance(value, str) else value


def _as_version(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
Program = Annotated[Text, AfterValidator(_checked_program)]
"""The name of a program, without directory."""
AllowedProgram = Annotated[Text, AfterValidator(_checked_allowed)]
"""The name of a program, or ``./path`` of one in the workspace."""
Version = Annotated[Text, BeforeValidator(_as_version, json_schema_input_type=Text | float)]
"""The format's version. A number is read as its text: ``2.1`` is what most people write."""
Port = Annotated[int, Field(ge=1, le=65535)]
MIB = 1024 * 1024
YEAR_SECONDS = 31_536_000
"""Longest time a policy may grant: milliseconds of it fit every format they are written in."""
MOST_PIDS = 4 * 1024 * 1024
MOST_FILES = 1024 * 1024
"""What a kernel can be told at most; more would be refused when the container starts."""


class Section(BaseModel):
    """One block of a policy: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RequestRule(Section):
    """One kind of request that a host with rules accepts; everything else on that host is denied."""

    methods: Annotated[tuple[Text, ...], Strict(False)]
    """Upper-case HTTP methods; at least one."""
    path: Text
    """A glob on the canonical path: ``*`` within a segment, ``**`` across segments."""
    websocket: bool = False
    """Whether a request it accepts may become a websocket; what that carries is not judged."""


class HostEntry(Section):
    """One allowed destination. A plain string in the policy is an entry with only ``host``.

    Its lists are not strict about being tuples: turning the string into an entry leaves JSON behind.
    """

    host: Text
    """An exact name, ``*.name`` (one more label) or ``**.name`` (one or more labels)."""
    ports: Annotated[tuple[Port, ...], Strict(False)] = (443,)
    inspect: bool = False
    """Terminate TLS with the session's own CA and judge each request. Needed for ``rules`` and ``inject``."""
    rules: Annotated[tuple[RequestRule, ...], Strict(False)] = ()
    """Empty means every request; given means these and nothing else."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes that a session may exchange with each host of this entry, both directions; None: no own limit."""


AllowedHost = Annotated[HostEntry, BeforeValidator(_as_entry, json_schema_input_type=Text | HostEntry)]
"""A plain string is an entry with only ``host``."""


class Injection(Section):
    """A credential the gateway puts on requests to one host; its value never enters the container."""

    host: Text
    """An exact name of the allowlist with ``inspect: true``."""
    header: Text
    value: Text
    """``${NAME}`` stands for the controller's variable,
    ``${file:/path}`` for the content of a file (less a last newline)."""
    mode: Literal["replace_always", "replace_placeholder"] = "replace_always"
    """``replace_always``: what the client sent in the header is dropped. ``replace_placeholder``: the value
    takes the place of ``placeholder`` where the header holds it, and is not sent otherwise."""
    placeholder: Text | None = None
    """A decoy that the sandbox may know; seen anywhere but in its header, the request is refused."""


class NetworkPolicy(Section):
    """Which destinations may be reached. Empty means none."""

    allowlist: tuple[AllowedHost, ...] = ()
    denylist: tuple[Text, ...] = ()
    """Host patterns that win over the allowlist."""
    enforce_tls: bool = True
    """No plain HTTP, and the first bytes of a tunnel must be a ClientHello naming the same host."""
    deny_all_others: Literal[True] = True
    """Stated for the reader; ``false`` is refused."""
    package_indexes: tuple[Literal["pip", "npm", "cargo", "apt"], ...] = ()
    """Clients whose own configured hosts are allowed, resolved when the session starts."""
    inject: tuple[Injection, ...] = ()
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes that a session may exchange with all hosts together, both directions; None: no such limit."""


class FilesystemPolicy(Section):
    """Which directory is the workspace, and which of its paths do not exist inside."""

    root: Text = "./workspace"
    """The host directory used when no workspace is named; relative to the current directory."""
    deny_patterns: tuple[Text, ...] = ()
    """gitignore-like globs, relative to the workspace; a match hides the path and all beneath it."""


class ShellPolicy(Section):
    """Which commands the agent may ask for, and which programs nothing in the container can run."""

    allowed_binaries: tuple[AllowedProgram, ...] = ()
    """Programs the agent may name in a command line; ``./path`` in the workspace. Empty means none."""
    blocked_commands: tuple[Program, ...] = ()
    """Programs that no process in the container can run. Wins over ``allowed_binaries``."""
    require_confirmation: bool = False
    """Each command needs a person's yes, or a match in ``pre_approved``."""
    pre_approved: tuple[Text, ...] = ()
    """Command lines that need no confirmation: exact bytes, or a prefix ending in `` *``."""
    mode: Literal["open", "closed"] = "open"
    """``open``: the tree may run anything in the image but the blocked. ``closed``: only the listed, their
    helpers, and the shell that runs the command lines."""
    helpers: dict[Text, tuple[Text, ...]] = Field(default_factory=dict)
    """For ``closed``: programs that an allowed binary needs, by binary: names or absolute paths, where ``*``
    stands for part of one name. An entry replaces the shipped one of the same binary."""
    workspace_exec: bool = True
    """Whether files in the workspace may be executed."""
    agents: tuple[AllowedProgram, ...] = ()
    """Programs that are agents of their own. Given, ``sh`` and ``bash`` in the container ask before they run
    anything, and what an agent's shells run is judged line by line like our own agent's lines. A refusal is
    guidance on stderr and exit code 126."""


class RoutingPolicy(Section):
    """Which models are asked, and how much a session may spend."""

    default_model: Text | None = None
    fallback_model: Text | None = None
    max_budget_usd: Annotated[float, Field(ge=0, le=9_007_199)] | None = None
    """Dollars a session may spend on models; missing means the shipped default of 5.00."""
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    """Tool calls a session may make; missing means the shipped default of 200."""


class OutputPolicy(Section):
    """How agent actions are checked."""

    format: Literal["json"] = "json"
    schema_path: Text | None = None
    """JSON Schema file for actions, relative to the policy file, else to the working directory; missing
    means the shipped schema."""
    validate_before_dispatch: Literal[True] = True


class SessionPolicy(Section):
    """The conversation's limits and its record."""

    max_tokens: Annotated[int, Field(ge=1)] = 64_000
    """Context window in tokens, by the provider's own count."""
    auto_truncate: bool = True
    provenance_tracking: Literal[True] = True
    replay_baseline_dir: Text | None = None


class Limits(Section):
    """Resources of one session. All are enforced; none is optional."""

    memory_bytes: Annotated[int, Field(ge=32 * MIB)] = 2048 * MIB
    cpus: Annotated[float, Field(ge=0.01)] = 2.0
    pids: Annotated[int, Field(ge=8, le=MOST_PIDS)] = 256
    nofile: Annotated[int, Field(ge=1024, le=MOST_FILES)] = 1024
    """Open files per process. The guest itself needs 1024 to serve overlapping commands and relays."""
    tmpfs_bytes: Annotated[int, Field(ge=MIB)] = 256 * MIB
    """Size of the writable, noexec ``/tmp``."""
    wall_seconds: Annotated[int, Field(ge=1, le=YEAR_SECONDS)] = 3600
    """A whole session."""
    command_seconds: Annotated[int, Field(ge=1, le=YEAR_SECONDS)] = 300
    """One command; its whole process tree is killed then."""
    workspace_bytes: Annotated[int, Field(ge=16 * MIB)] = 4096 * MIB
    """What a session may write to the workspace; then writes fail with ENOSPC and the session ends."""
    workspace_files: Annotated[int, Field(ge=1024)] = 262_144
    """How many files and directories a session may make in the workspace."""
    workspace_quota: Literal["filesystem", "watched"] = "watched"
    """The weakest way to hold both that will do. ``filesystem``: the kernel refuses the write, or nothing
    runs. ``watched``: where the kernel cannot be asked (no root, no loop devices), what is used is measured
    while the session runs, and the result says so."""
    output_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024
    """What is kept of one command's stdout, and as much of its stderr; the rest is counted."""


class PriceEntry(Section):
    """What a model costs, when the price table does not know it or is to be overruled."""

    input_usd_per_million: Annotated[float, Field(ge=0)]
    output_usd_per_million: Annotated[float, Field(ge=0)]


class PolicyTest(Section):
    """A statement about the policy, checked every time it is loaded. Exactly one subject is given."""

    expect: Literal["allow", "deny", "confirm"]
    command: str | None = None
    """A command line, as the agent would write it."""
    path: str | None = None
    """A path relative to the workspace, as the agent would name it."""
    host: str | None = None
    """``name`` (port 443) or ``name:port``."""

    @model_validator(mode="after")
    def _has_one_subject(self) -> Self:
        if sum(subject is not None for subject in (self.command, self.path, self.host)) != 1:
            raise ValueError("a test has exactly one of command, path and host")
        return self


class Policy(Section):
    """Everything one session may do. Built by ``sandbox.policy.load``; never edited afterwards."""

    name: Text
    """The profile's name, e.g. ``production``."""
    version: Version = "2.1"
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Free text of the author; never read by a decision."""
    routing: RoutingPolicy = RoutingPolicy()
    network: NetworkPolicy = NetworkPolicy()
    filesystem: FilesystemPolicy = FilesystemPolicy()
    shell: ShellPolicy = ShellPolicy()
    output: OutputPolicy = OutputPolicy()
    session: SessionPolicy = SessionPolicy()
    limits: Limits = Limits()
    runtime: Literal["runc", "runsc"] = "runc"
    seccomp: Text = "agent"
    """Name of a shipped profile (``seccomp/NAME.json``), or a path relative to the policy file."""
    prices: dict[Text, PriceEntry] = Field(default_factory=dict)
    """Prices by full model id, e.g. ``anthropic:some-model``."""
    tests: tuple[PolicyTest, ...] = ()

    def digest(self) -> Digest:
        """Digest the effective policy: equal policies have equal digests, however they were written."""
        return digest_json(self.model_dump(mode="json"))
