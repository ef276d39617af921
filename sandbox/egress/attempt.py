"""What is known so far of one request that wants out, and the events it becomes. D7"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace
from typing import Literal

from sandbox.egress.tunnel import Traffic
from sandbox.events import EgressConnection
from sandbox.policy.hosts import Authority, EgressDecision, Refusal

_TEXT_CHARS = 256


@dataclass
class Attempt:
    """One request, filled in as it is judged."""

    number: int
    pid: int
    uid: int
    target: Authority | None = None
    decision: EgressDecision | None = None
    """By the policy in force; a changed policy that still allows the same puts its own in this place."""
    is_revoked: bool = False
    """Allowed by a policy that was in force, not by the one that is; not recorded yet, and never to be."""
    rule: str = "gateway"
    method: str | None = None
    path: bytes | None = None
    sni: bytes | None = None
    address: str | None = None
    candidates: tuple[str, ...] = ()
    """Vetted addresses that the connection may lead to; once it stands, the one it does."""
    credential: str | None = None
    """Where an injected credential came from, never its value."""
    is_recorded: bool = False
    """Its open event is written; from then on no second verdict may follow."""
    traffic: Traffic = field(default_factory=lambda: Traffic(lambda up, down: False))

    def opened(self, refusal: Refusal | None = None) -> EgressConnection:
        """Return the event of the verdict, to be recorded before it leaves."""
        return self._event("open", refusal or "ok")

    def inner(self) -> Attempt:
        """Return an attempt for the next request inside this tunnel; traffic is counted together."""
        return replace(self, method=None, path=None, credential=None)

    def requested(self, refusal: Refusal | None = None) -> EgressConnection:
        """Return the event of one request inside a tunnel, to be recorded before it is sent."""
        return self._event("request", refusal or "ok")

    def closed(self, reason: str | Refusal) -> EgressConnection:
        """Return the event of the end, with what was carried."""
        return self._event("close", reason)

    def _event(self, phase: Literal["open", "request", "close"], reason: str | Refusal) -> EgressConnection:
        is_refused = isinstance(reason, Refusal)
        return EgressConnection(
            connection=self.number,
            phase=phase,
            verdict="deny" if is_refused else "allow",
            reason=reason.reason if isinstance(reason, Refusal) else reason,
            rule=self.rule,
            host=self.target.host if self.target else "",
            port=self.target.port if self.target else None,
            sni=_text(self.sni),
            address=self.address,
            method=self.method,
            path=_text(self.path),
            credential=self.credential,
            # Readers add the bytes of all events up: a tunnel's are told once, at its end.
            bytes_up=0 if phase == "request" else self.traffic.up,
            bytes_down=0 if phase == "request" else self.traffic.down,
            peer_pid=self.pid,
            peer_uid=self.uid,
        )


def peer_credentials(client: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process that connected, as the kernel saw them then."""
    packed = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", packed)
    return pid, uid


def _text(raw: bytes | None) -> str | None:
    """Escape client bytes so that they can forge nothing in a log line, and cut them."""
    if raw is None:
        return None
    shown = raw[:_TEXT_CHARS].decode("latin-1").encode("ascii", "backslashreplace").decode("ascii")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)[:_TEXT_CHARS]
