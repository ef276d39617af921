"""Everything the host vouches for, as one tagged union. Pure data: no clock, no I/O.

What the container says is a *claim*; fields that carry one start with ``claimed_``. Attribute names
follow OpenTelemetry GenAI where one exists (``gen_ai.*`` is mapped in ``provenance``, not spelt here).
Money is whole nano-dollars (10**-9 USD), time whole milliseconds, size bytes: a ledger holds no floats.
Optional text is cut to a stated length by whoever builds the event; full content is named by digest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

EXCERPT_CHARS = 400
"""Longest excerpt of untrusted text in an event; the digest beside it names the whole."""


class EventBase(BaseModel):
    """Frozen, strict, and no key beyond the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SessionStarted(EventBase):
    """First line of every ledger: all inputs that decide what may happen, by digest."""

    type: Literal["SessionStarted"] = "SessionStarted"
    session_id: str
    task: str
    task_blake3: str
    profile: str
    policy_blake3: str
    spec_blake3: str
    """Digest of the container spec."""
    image: str
    image_id: str
    seccomp_blake3: str
    base_tree_blake3: str
    """Digest of the workspace as the sandbox sees it: names, modes, sizes, and mtimes or content."""
    workspace: str
    model: str
    fallback_model: str | None
    limits: dict[str, int]


class ContainerStarted(EventBase):
    """The container runs and its guest has answered."""

    type: Literal["ContainerStarted"] = "ContainerStarted"
    container_id: str
    runtime: str
    guest_version: str
    started_ms: int
    """From the request to create the container until the guest answered."""


class ModelCall(EventBase):
    """One attempt at a model, written before the request leaves."""

    type: Literal["ModelCall"] = "ModelCall"
    call_id: str
    attempt: int
    model: str
    request_blake3: str
    input_tokens_bound: int
    max_tokens: int
    reservation: str | None = None
    """The ``BudgetReserved`` that covers it. None: whichever reservation of money or tokens is open."""


class ModelReply(EventBase):
    """The answer to a ``ModelCall``. ``usage_reported`` false means the reservation was kept."""

    type: Literal["ModelReply"] = "ModelReply"
    call_id: str
    attempt: int
    response_model: str
    response_id: str | None
    finish_reason: str
    input_tokens: int
    """Including cached ones."""
    cached_input_tokens: int
    output_tokens: int
    usage_reported: bool
    text_blake3: str
    text_excerpt: str
    tool_calls: int


class ModelCallFailed(EventBase):
    """An attempt that gave no answer; a retry, a fallback or the end follows."""

    type: Literal["ModelCallFailed"] = "ModelCallFailed"
    call_id: str
    attempt: int
    kind: str
    http_status: int | None
    message: str
    retry_in_ms: int | None
    """None: not tried again."""


class ModelFallback(EventBase):
    """The fallback model takes over for the rest of the session."""

    type: Literal["ModelFallback"] = "ModelFallback"
    from_model: str
    to_model: str
    reason: str


class ToolCall(EventBase):
    """The agent asked for something; written before it is decided."""

    type: Literal["ToolCall"] = "ToolCall"
    action_id: str
    tool: str
    arguments_blake3: str
    summary: str
    """What a reader needs to recognise it: the command line, or the path."""
    claimed_confidence: str | None = None
    """As the model wrote it; may only raise scrutiny."""
    claimed_requires_review: bool | None = None


class DecisionMade(EventBase):
    """What was decided about an action, by which rule; written before the effect."""

    type: Literal["Decision"] = "Decision"
    action_id: str
    verdict: Literal["allow", "deny", "confirm"]
    rule: str
    reason: str


class ConfirmationGiven(EventBase):
    """A person, ``--yes`` or a ``pre_approved`` pattern answered; bound to the exact bytes."""

    type: Literal["ConfirmationGiven"] = "ConfirmationGiven"
    action_id: str
    approved: bool
    by: Literal["terminal", "yes_flag", "pre_approved", "no_terminal"]
    arguments_blake3: str


class ShellJudged(EventBase):
    """A shell in the container asked before it ran something (``shell.wrapper``). The words are claims."""

    type: Literal["ShellJudged"] = "ShellJudged"
    claimed_pid: int
    """On the host, as the kernel saw it when the shell asked."""
    claimed_line: str
    """The command line, or the path of the script."""
    text_blake3: str
    """Of all that was judged: the line, or the script's content."""
    is_nested: bool
    """Started beneath a shell that was allowed: only blocked commands are refused then."""
    verdict: Literal["allow", "deny"]
    rule: str
    reason: str


class ExecObserved(EventBase):
    """A program was started, or was about to be, anywhere in a command's process tree.

    Path and arguments are what the caller's memory held then: telemetry, never a decision.
    """

    type: Literal["ExecObserved"] = "ExecObserved"
    action_id: str
    claimed_pid: int
    claimed_parent: int = 0
    """0: not known."""
    claimed_path: str = ""
    """As the caller wrote it; relative to a directory that is not recorded."""
    argv: list[str]
    """At most 32 arguments, each cut to 256 characters."""
    argv_is_cut: bool = False
    verdict: Literal["allowed", "refused"] = "allowed"
    """What the container does with that path: it runs, or the policy blocks it."""


class ToolResult(EventBase):
    """What an action did. ``ok`` is the tool's own success: a red test run is ``ok`` with ``exit_code`` 1."""

    type: Literal["ToolResult"] = "ToolResult"
    action_id: str
    ok: bool
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    wall_ms: int = 0
    cpu_ms: int = 0
    output_bytes: int = 0
    """All that was produced, also what was cut."""
    cut_bytes: int = 0
    content_blake3: str | None = None
    excerpt: str = ""
    execs_unrecorded: int = 0
    """Programs started by it that have no ``ExecObserved`` of their own: there were too many."""


class EgressConnection(EventBase):
    """A connection at the gateway: one line when it is decided, one when it closes."""

    type: Literal["EgressConnection"] = "EgressConnection"
    connection: int
    phase: Literal["open", "request", "close"]
    verdict: Literal["allow", "deny"]
    reason: str
    """A word of the gateway's vocabulary: ``ok``, ``host_not_allowed``, ``sni_mismatch``, …"""
    rule: str
    host: str
    """ASCII, escaped, cut to 256 characters; empty when the request could not be read."""
    port: int | None
    sni: str | None = None
    address: str | None = None
    method: str | None = None
    path: str | None = None
    credential: str | None = None
    """Where an injected credential came from (``${NAME}``), never its value."""
    bytes_up: int = 0
    bytes_down: int = 0
    peer_pid: int | None = None
    peer_uid: int | None = None


class BudgetReserved(EventBase):
    """The worst case of an effect was set aside, before it."""

    type: Literal["BudgetReserved"] = "BudgetReserved"
    reservation: str
    amounts: dict[str, int]


class BudgetSettled(EventBase):
    """A reservation became what was really used. ``kept`` means the whole reservation counts as spent."""

    type: Literal["BudgetSettled"] = "BudgetSettled"
    reservation: str
    amounts: dict[str, int]
    kept: bool


class BreakerTripped(EventBase):
    """A limit stopped or changed the run."""

    type: Literal["BreakerTripped"] = "BreakerTripped"
    breaker: str
    limit: int
    value: int
    action: Literal["stop", "fallback", "steer"]


class PolicyReloaded(EventBase):
    """A changed policy was offered while the session ran; taken over as a whole, or not at all."""

    type: Literal["PolicyReloaded"] = "PolicyReloaded"
    accepted: bool
    policy_blake3: str
    """Of the policy in force afterwards."""
    reason: str


class PhaseStarted(EventBase):
    """A phase of a spec began."""

    type: Literal["PhaseStarted"] = "PhaseStarted"
    phase: str


class PatchExported(EventBase):
    """The session's changes, as a patch and as the list of what was withheld from it."""

    type: Literal["PatchExported"] = "PatchExported"
    patch_blake3: str
    patch_sha256: str
    files: int
    withheld: list[str]
    """``path: reason`` of changes that never reach the patch; at most 100, then a count."""


class SessionEnded(EventBase):
    """Last line of a closed ledger."""

    type: Literal["SessionEnded"] = "SessionEnded"
    status: str
    reason: str
    spent: dict[str, int]


Event = Annotated[
    SessionStarted
    | ContainerStarted
    | ModelCall
    | ModelReply
    | ModelCallFailed
    | ModelFallback
    | ToolCall
    | DecisionMade
    | ConfirmationGiven
    | ShellJudged
    | ExecObserved
    | ToolResult
    | EgressConnection
    | BudgetReserved
    | BudgetSettled
    | BreakerTripped
    | PolicyReloaded
    | PhaseStarted
    | PatchExported
    | SessionEnded,
    Field(discriminator="type"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
"""Reads an event back from JSON data, strictly."""


def excerpt(text: str, limit: int = EXCERPT_CHARS) -> str:
    """Cut untrusted text for an event: lone surrogates replaced, the cut marked."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
