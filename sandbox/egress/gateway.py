"""The door itself: one Unix socket per session, admission, the record and the byte counts. D5"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from sandbox.egress.answers import refusal_answer, status_of
from sandbox.egress.attempt import Attempt, peer_credentials
from sandbox.egress.authority import SessionAuthority, upstream_context
from sandbox.egress.connection import (
    Connection,
    GatewayLimits,
    RecordUnavailable,
    Surroundings,
)
from sandbox.egress.credentials import Credentials
from sandbox.egress.door import open_door
from sandbox.egress.inspect import Inspection
from sandbox.egress.pace import Pace
from sandbox.egress.pipes import Pipes
from sandbox.egress.reload import judge_again, refuse_what_needs_a_new_session
from sandbox.egress.resolve import Dialer, Resolver, SystemResolver, TcpDialer, own_address_reader
from sandbox.egress.tunnel import UNLIMITED
from sandbox.errors import HostError, PolicyError
from sandbox.events import EgressConnection
from sandbox.policy.hosts import (
    Authority,
    EgressDecision,
    Refusal,
    decide_egress,
    inspected_hosts,
    invalid_patterns,
    is_denied,
)
from sandbox.policy.model import HostEntry, NetworkPolicy

__all__ = ["ByteBudget", "Gateway", "GatewayLimits"]

_MAX_DESTINATIONS = 4096
_LOG = logging.getLogger(__name__)


class ByteBudget(Protocol):
    """Says how many bytes may pass. Synchronous: between asking and taking, nobody else has a turn."""

    def left(self, host: str, entry: HostEntry) -> int:
        """Return how many bytes a host may still exchange, both directions, under the entry that lets it."""

    def take(self, host: str, entry: HostEntry, count: int) -> bool:
        """Count bytes that are about to be sent on; False, and nothing is counted, when they do not fit."""


class Gateway:
    """Lets one session reach what its policy allows, and nothing else.

    Speaks HTTP CONNECT, and plain HTTP/1.1 where the policy gives up ``enforce_tls``, on a Unix socket
    that any uid may connect to: who can see the directory it lies in is the caller's decision.
    """

    bytes_by_destination: dict[str, tuple[int, int]]
    """Bytes sent up and down by ``name:port``, live. Beyond 4096 names, by the rule that let them pass."""

    def __init__(
        self,
        network: NetworkPolicy,
        socket_path: Path,
        record: Callable[[EgressConnection], None],
        *,
        resolver: Resolver | None = None,
        own_addresses: frozenset[str] | None = None,
        limits: GatewayLimits | None = None,
        budget: ByteBudget | None = None,
        dialer: Dialer | None = None,
        credentials: Credentials | None = None,
        upstream_roots: bytes | None = None,
        session_seconds: float = 86_400,
    ) -> None:
        """Take the policy; nothing is opened yet.

        ``record`` is called before what it describes happens; when it raises, that does not happen, and
        nothing passes any more. ``budget`` is asked before bytes are sent on, and again when the policy
        changes; None: bytes are only counted. ``own_addresses`` of None: asked of the kernel, afresh every
        second. ``credentials`` are those of ``network.inject``; ``upstream_roots`` (PEM) are trusted besides
        this host's own when TLS is opened; the session's authority is valid for ``session_seconds``.
        Raises PolicyError for patterns that mean nothing and for an injection without its value,
        HostError when the roots cannot be read.
        """
        _refuse_invalid(network)
        self.bytes_by_destination = {}
        self._socket_path = socket_path
        self._record = record
        self._budget = budget
        self._network_at_start = network
        self._limits = limits or GatewayLimits()
        self._resolver = resolver or SystemResolver()
        self._is_record_broken = False
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}
        numbers = itertools.count(1)
        self._credentials = credentials or Credentials()
        self._credentials.check(network)
        hosts = inspected_hosts(network)
        self._authority = (
            SessionAuthority(hosts, now=datetime.now(UTC), lifetime=timedelta(seconds=session_seconds))
            if hosts
            else None
        )
        self._around = Surroundings(
            network=network,
            limits=self._limits,
            resolver=self._resolver,
            dialer=dialer or TcpDialer(),
            own_addresses=own_address_reader() if own_addresses is None else lambda: own_addresses,
            record=self._record_first,
            account=self._account,
            allowance=self._allowance,
            next_number=lambda: next(numbers),
            pace=Pace(self._limits.burst_requests, self._limits.requests_per_second),
            pipes=Pipes(),
            credentials=self._credentials,
            inspection=None,
        )
        if self._authority is not None:
            inspection = self._inspection(self._authority, upstream_roots)
            self._around = replace(self._around, inspection=inspection)

    @property
    def authority_pem(self) -> bytes | None:
        """The certificate that clients of inspected hosts must trust; None when nothing is inspected."""
        return self._authority.certificate_pem if self._authority is not None else None

    async def start(self) -> None:
        """Listen. Raises HostError when the socket cannot be made; a path that exists is never replaced."""
        try:
            self._listener = open_door(self._socket_path)
        except OSError as exc:
            raise HostError(
                f"cannot open the egress socket {self._socket_path}: {exc.strerror or exc}; "
                "give each session an own, writable directory"
            ) from exc
        self._accepting = asyncio.create_task(self._accept(self._listener), name="egress-accept")

    async def stop(self) -> None:
        """Close the door and drop every tunnel; their close events are recorded. Idempotent."""
        accepting, self._accepting = self._accepting, None
        listener, self._listener = self._listener, None
        running = [task for task in (accepting, *self._connections) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if listener is not None:
            listener.close()
            self._socket_path.unlink(missing_ok=True)
        self._resolver.close()
        self._around.pipes.close()

    def check_reload(self, network: NetworkPolicy) -> None:
        """Raise PolicyError, with the remedy, when ``reload`` would refuse this policy."""
        _refuse_invalid(network)
        refuse_what_needs_a_new_session(self._network_at_start, network)

    def reload(self, network: NetworkPolicy) -> None:
        """Enforce another policy from now on, as a whole; raise PolicyError and change nothing instead.

        Whatever is under way and would not be allowed just so by the new policy ends: its close event says
        ``policy_changed``. Never awaits: no decision is taken in between. Budgets are the caller's: the new
        ones must stand before this is called.
        """
        self.check_reload(network)
        before, self._around.network = self._around.network, network

        def judge(
            old: EgressDecision, target: Authority, addresses: tuple[str, ...]
        ) -> EgressDecision | None:
            try:
                new = judge_again(before, network, old, target, addresses)
                return new if new is not None and self._allowance(new, target) > 0 else None
            except Exception:
                # What cannot be judged ends, and the others are judged all the same.
                _LOG.exception("egress gateway could not judge a tunnel by the new policy; it is closed")
                return None

        for task, connection in self._connections.items():
            if not connection.review(judge):
                task.cancel("policy_changed")

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as exc:
                # Out of descriptors or memory: the session must not lose its door for good over it.
                _LOG.warning("egress gateway could not accept a connection: %s", exc)
                await asyncio.sleep(0.1)
                continue
            try:
                # Here, so that those turned away wait as well: further ones queue in the kernel.
                await self._around.pace.turn()
                self._admit(client)
            except asyncio.CancelledError:
                client.close()
                raise
            except Exception:
                _LOG.exception("egress gateway could not serve a connection")
                client.close()

    def _admit(self, client: socket.socket) -> None:
        if len(self._connections) >= self._limits.max_connections:
            self._turn_away(client)
            return
        connection = Connection(client, self._around)
        task = asyncio.create_task(connection.serve())
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)
        # A task that is cancelled before its first step never reaches its own ``finally``.
        task.add_done_callback(lambda _: client.close())

    def _turn_away(self, client: socket.socket) -> None:
        refusal = Refusal("too_many_connections", f"at most {self._limits.max_connections} at a time")
        try:
            self._record_first(Attempt(self._around.next_number(), *peer_credentials(client)).opened(refusal))
        except RecordUnavailable:
            refusal = Refusal("log_unavailable", "the session's record cannot be written")
        with client:
            # An empty send buffer takes this much at once; a client that went away is no error.
            try:
                client.send(refusal_answer(refusal, None, status_of(refusal.reason)))
            except OSError:
                return

    def _inspection(self, authority: SessionAuthority, roots: bytes | None) -> Inspection:
        try:
            upstream_tls = upstream_context(roots)
        except ValueError as exc:
            raise HostError(f"cannot verify inspected hosts: {exc}; give PEM certificates") from exc
        limits, around = self._limits, self._around
        return Inspection(
            authority=authority,
            upstream_tls=upstream_tls,
            credentials=self._credentials,
            dialer=around.dialer,
            decide=self._decide_again,
            record=self._record_first,
            turn=around.pace.turn,
            handshake_seconds=limits.hello_seconds,
            head_seconds=limits.head_seconds,
            keep_seconds=limits.keep_seconds,
            dial_seconds=limits.dial_seconds,
            idle_seconds=limits.idle_seconds,
        )

    def _decide_again(self, target: Authority, address: str) -> EgressDecision:
        network = self._around.network
        if is_denied(network, address):
            return EgressDecision("deny", "address_denied", "network.denylist")
        return decide_egress(network, target.host, target.port)

    def _record_first(self, event: EgressConnection) -> None:
        if self._is_record_broken:
            raise RecordUnavailable
        try:
            self._record(event)
        except Exception as exc:
            # The chain has a hole from here on, so nothing may follow it.
            self._is_record_broken = True
            _LOG.exception("egress gateway cannot record; it refuses everything from now on")
            raise RecordUnavailable from exc

    def _account(self, decision: EgressDecision, target: Authority, up: int, down: int) -> bool:
        host = f"[{target.host}]" if ":" in target.host else target.host
        destination = f"{host}:{target.port}"
        entry = decision.entry
        if self._budget is not None and (
            entry is None or not self._budget.take(target.host, entry, up + down)
        ):
            return False
        counts = self.bytes_by_destination
        if destination not in counts and len(counts) >= _MAX_DESTINATIONS:
            # A wildcard lets a client make up names without end; memory has one.
            destination = decision.rule
        before = counts.get(destination, (0, 0))
        counts[destination] = (before[0] + up, before[1] + down)
        return True

    def _allowance(self, decision: EgressDecision, target: Authority) -> int:
        if self._budget is None or decision.entry is None:
            return UNLIMITED
        return self._budget.left(target.host, decision.entry)


def _refuse_invalid(network: NetworkPolicy) -> None:
    if problems := invalid_patterns(network):
        first = problems[0]
        raise PolicyError(f"cannot enforce network pattern {first.pattern!r}: {first.message}")
