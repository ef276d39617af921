"""What a probe is, and what may come of it. Pure values; nothing is run here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Area = Literal["network", "files", "shell", "limits", "kernel", "identity"]
AREAS: tuple[Area, ...] = ("network", "files", "shell", "limits", "kernel", "identity")

Outcome = Literal["works", "blocked", "accepted", "skipped", "untestable", "failed", "worked", "refused"]
OUTCOMES: tuple[Outcome, ...] = (
    *("works", "blocked", "accepted", "skipped", "untestable"),
    *("worked", "refused", "failed"),
)
"""
works       an allowed thing works
blocked     a forbidden thing was refused as expected, and works in the permissive container
accepted    a forbidden thing works, or a runtime answers otherwise; ``images/probe/`` says why that will do
skipped     cannot be tried with this image or policy
untestable  a forbidden thing was refused, and in the permissive container as well: proves nothing here
worked      FAILURE: a forbidden thing works
refused     FAILURE: an allowed thing does not work
failed      FAILURE: could not be tried, or was refused in another way than by the control: proves nothing
"""
FAILURES: frozenset[Outcome] = frozenset(("worked", "refused", "failed"))


@dataclass(frozen=True)
class Act:
    """One line for the probe program: an act's name and its arguments."""

    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Talk:
    """One conversation with the egress gateway, driven by the self-test through the container. D5"""

    host: str
    """Canonical name or address, as the client asks for it."""
    port: int = 443
    way: Literal["proxy", "direct", "plain"] = "proxy"
    """``proxy``: CONNECT at the proxy port. ``direct``: a plain connect to the name, as /etc/hosts has it.
    ``plain``: a request for an http:// URL at the proxy port."""
    server_name: str | None = ""
    """The name in the ClientHello; empty: the host itself. None: no name."""
    is_tls: bool = True
    """False: plain HTTP bytes where TLS is expected."""
    method: str = "GET"
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    """Further fields of the request; a ``Host`` among them stands for the usual one."""
    alpn: str = ""
    """The only protocol that the ClientHello offers; empty: it offers none by name."""
    trusts: Literal["anybody", "bundle", "origin"] = "anybody"
    """Whose certificate the client accepts. ``bundle``: what the container's trust bundle vouches for.
    ``origin``: the origin's own and no other."""
    arrives: tuple[str, str] | None = None
    """A header and the value that the origin must see in it for this to count as worked; None: any."""
    echoes: str = ""
    """A text that the answer must hold for this to count as worked; empty: none. The origin repeats the
    fields it was sent."""
    answer_bytes: int = 0
    """How long an answer is asked for; it must arrive whole."""
    resolves_to: str = ""
    """The address that the name has while this runs, alone; empty: a public one."""


@dataclass(frozen=True)
class Timed:
    """A command that the guest must end in time, or whose output it must cut: judged on the host."""

    act: Act
    timeout_seconds: float = 60.0
    max_output_bytes: int = 64 * 1024
    expect: Literal["timeout", "cut", "whole"] = "timeout"


Attempt = Act | Talk | Timed


@dataclass(frozen=True)
class Probe:
    """One thing to try, on one side of a boundary."""

    id: str
    area: Area
    side: Literal["allow", "deny"]
    what: str
    """What is tried, in words."""
    control: str
    """What must stop it; for an allowed thing: what allows it."""
    attempt: Attempt
    refusals: frozenset[str] = frozenset()
    """Details that count as the expected refusal; empty: any refusal does."""
    in_control: Attempt | None = None
    """How it is tried in the permissive container, where that differs."""
    may_be_untestable: bool = False
    """Whether kernels differ in it: then a control that does not work is no fault of ours."""
    is_alone: bool = False
    """Whether it must not run beside others: it uses up what they need."""
    needs_memory_bytes: int = 0
    """Free memory of the host without which it is not tried."""
    needs_disk_bytes: int = 0
    """Free space of the state directory without which it is not tried."""
    skip: str = ""
    """Why it cannot be tried at all; empty: it can."""


@dataclass(frozen=True)
class Seen:
    """What came of one attempt in one container."""

    verdict: Literal["worked", "blocked", "failed"]
    detail: str = "-"
    """One word: an errno's name, a signal, the gateway's reason."""


@dataclass(frozen=True)
class Difference:
    """How a forbidden thing ends under another runtime, and why that is accepted."""

    verdict: Literal["worked", "blocked", "failed"]
    reason: str


@dataclass(frozen=True)
class Finding:
    """A probe, what was seen, and what that means."""

    probe: Probe
    outcome: Outcome
    seen: Seen | None = None
    """In the session's container; None when it was not tried."""
    control_seen: Seen | None = None
    """In the permissive container; None when it was not tried there."""
    reason: str = ""
    """Why it is accepted, skipped or untestable; for failures what was expected."""

    @property
    def is_failure(self) -> bool:
        """True when this alone makes the self-test fail."""
        return self.outcome in FAILURES


@dataclass(frozen=True)
class Report:
    """A whole self-test."""

    policy: str
    policy_source: str
    policy_blake3: str
    image: str
    image_id: str
    findings: tuple[Finding, ...]
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase; they overlap."""
    notes: tuple[str, ...] = ()
    """What differs from a session, one line each."""

    @property
    def is_good(self) -> bool:
        """True when nothing failed."""
        return not any(finding.is_failure for finding in self.findings)

    def counts(self, area: Area | None = None) -> dict[Outcome, int]:
        """Findings by outcome, of one area or of all; outcomes that did not occur are 0."""
        counted = Counter(f.outcome for f in self.findings if area in (None, f.probe.area))
        return {outcome: counted[outcome] for outcome in OUTCOMES}
