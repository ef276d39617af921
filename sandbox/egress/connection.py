"""One client connection, from its first byte to its last. D5

The order is the defence: read strictly, decide, resolve, vet, record, dial the vetted address, answer,
and only then carry bytes. Whatever goes wrong before the answer is a refusal.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from sandbox.egress.answers import ESTABLISHED, refusal_answer, status_of, tunnel_refusal
from sandbox.egress.attempt import Attempt, peer_credentials
from sandbox.egress.bodies import BodyRefused, RequestBody
from sandbox.egress.credentials import Credentials
from sandbox.egress.forward import Forwarded, exchange, outgoing_head
from sandbox.egress.heads import read_head
from sandbox.egress.inspect import InspectedTunnel, Inspection
from sandbox.egress.leaks import LEAK
from sandbox.egress.pace import Pace
from sandbox.egress.pipes import Pipes
from sandbox.egress.request import (
    RequestHead,
    check_host,
    check_upgrade,
    parse_connect,
    parse_forward,
)
from sandbox.egress.resolve import Dialer, PeerMismatch, Resolver, dial_first
from sandbox.egress.rules import judge_request
from sandbox.egress.streams import PlainStream, hear_out
from sandbox.egress.tls import HelloReader, judge_hello
from sandbox.egress.tunnel import CHUNK_BYTES, BudgetSpent, Traffic, relay
from sandbox.events import EgressConnection
from sandbox.policy.addresses import vet_address
from sandbox.policy.hosts import (
    Authority,
    EgressDecision,
    Refusal,
    decide_egress,
    is_denied,
    is_ip_literal,
    is_tls_port,
)
from sandbox.policy.model import NetworkPolicy

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayLimits:
    """What one session's gateway grants its clients."""

    max_connections: int = 256
    """Open client connections; further ones are answered 503."""
    head_seconds: float = 10.0
    """From the start of a connection, or of waiting for its next request, to a complete head."""
    hello_seconds: float = 10.0
    """From the 200 to a complete ClientHello, and from there to the end of an inspected handshake."""
    keep_seconds: float = 60.0
    """Between two requests of an inspected connection."""
    resolve_seconds: float = 10.0
    dial_seconds: float = 10.0
    """Each address of a name gets this long."""
    idle_seconds: float = 900.0
    """Without a byte in either direction, a tunnel is closed."""
    burst_requests: int = 2_000
    """Requests that are served as fast as they come; beyond them ``requests_per_second``."""
    requests_per_second: float = 20.0
    """Bounds the record: an hour of flooding leaves some tens of megabytes."""


class RecordUnavailable(Exception):
    """An event could not be recorded: nothing may happen that it would have described."""


@dataclass
class Surroundings:
    """What the connections of one gateway share."""

    network: NetworkPolicy
    """In force now; the gateway replaces it as a whole. Read afresh for every decision."""
    limits: GatewayLimits
    resolver: Resolver
    dialer: Dialer
    own_addresses: Callable[[], frozenset[str]]
    record: Callable[[EgressConnection], None]
    """Raises RecordUnavailable."""
    account: Callable[[EgressDecision, Authority, int, int], bool]
    """Called with bytes up and down before they are sent on; False ends the connection."""
    allowance: Callable[[EgressDecision, Authority], int]
    """How many bytes ``account`` would grant now."""
    next_number: Callable[[], int]
    pace: Pace
    pipes: Pipes
    credentials: Credentials
    inspection: Inspection | None
    """None when the policy opens no TLS."""


Judge = Callable[[EgressDecision, Authority, tuple[str, ...]], EgressDecision | None]
"""Given the old decision, the destination and the addresses it may lead to: the new decision, when a
connection goes on just as it is; else None."""


class Connection:
    """Serves one client until it closes, is refused, or is cancelled. Closes the client's socket."""

    def __init__(self, client: socket.socket, around: Surroundings) -> None:
        self._client = client
        self._stream = PlainStream(client)
        self._around = around
        self._pending = bytearray()
        self._attempt: Attempt | None = None
        self._pid, self._uid = peer_credentials(client)

    async def serve(self) -> None:
        """Judge and carry requests, one after the other. Raises nothing but cancellation."""
        is_first = True
        try:
            while await self._serve_one(is_first=is_first):
                is_first = False
        except OSError:
            pass  # the client went away
        finally:
            self._client.close()

    def review(self, judge: Judge) -> bool:
        """Judge what is under way anew, by a policy that is in force from now on; False: it has to end.

        What was not recorded yet refuses itself when it gets there.
        """
        attempt = self._attempt
        if attempt is None or attempt.target is None or attempt.decision is None:
            return True
        if not attempt.decision.is_allowed:
            return True
        decision = judge(attempt.decision, attempt.target, attempt.candidates)
        if decision is not None:
            attempt.decision = decision
            return True
        attempt.is_revoked = True
        return not attempt.is_recorded

    async def _serve_one(self, *, is_first: bool) -> bool:
        head = await read_head(self._stream, self._pending, self._around.limits.head_seconds)
        if head is None:
            return False
        if not is_first:  # a first request waited before it was let in
            await self._around.pace.turn()
        attempt = Attempt(self._around.next_number(), self._pid, self._uid)
        if isinstance(head, Refusal):
            # A kept connection that simply falls silent asked for nothing.
            if is_first or self._pending:
                await self._refuse(attempt, head, 414 if self._is_line_too_long(head) else None)
            return False
        attempt.method = head.method
        try:
            if head.method == "CONNECT":
                await self._serve_connect(head, attempt)
                return False
            return await self._serve_forward(head, attempt)
        except RecordUnavailable:
            await self._answer(attempt, Refusal("log_unavailable", "the session's record cannot be written"))
        except Exception as exc:
            if attempt.is_recorded and isinstance(exc, OSError):
                raise  # a peer went away
            # Any failure to decide is a refusal. The client learns nothing of the cause.
            _LOG.exception("egress connection %d failed in the gateway", attempt.number)
            if not attempt.is_recorded:
                await self._refuse(attempt, Refusal("policy_error", "this request could not be judged"))
        return False

    async def _serve_connect(self, head: RequestHead, attempt: Attempt) -> None:
        target = parse_connect(head)
        if isinstance(target, Refusal):
            await self._refuse(attempt, target)
            return
        decision = self._decide(attempt, target)
        refusal = (
            self._find_leak(attempt, decision, target)
            or _refusal_of(decision)
            or check_host(head, target, target.port)
        )
        is_opened = decision.entry is not None and decision.entry.inspect
        if refusal is None and decision.entry is not None and (is_opened or decision.entry.rules):
            refusal = self._check_inspection(target, is_opened=is_opened)
        upstream = await self._open_upstream(attempt, decision, target, refusal)
        if upstream is None:
            return
        reason: str | Refusal = ""
        try:
            await self._send(ESTABLISHED)
            if is_opened:
                reason = await self._carry_inspected(upstream, attempt, target)
            else:
                reason = await self._carry_tunnel(upstream, attempt, target)
                if isinstance(reason, Refusal):
                    await self._tell(reason, target)
        except BaseException as exc:
            reason = _word_of(exc)
            raise
        finally:
            upstream.close()
            self._record_close(attempt, reason)

    def _find_leak(
        self, attempt: Attempt, decision: EgressDecision | None, target: Authority
    ) -> Refusal | None:
        """Return why a name that a client may have made up is not even recorded, or None."""
        if decision is not None and decision.is_exact_name:
            return None
        leak = self._around.credentials.find_in_name(target.host)
        if leak is not None:
            attempt.target = None
        return leak

    def _check_inspection(self, target: Authority, *, is_opened: bool) -> Refusal | None:
        """Return why requests to a host whose requests are judged could not be; None when they can."""
        if not is_opened or not is_tls_port(self._around.network, target.port):
            return Refusal("inspection_required", "this host has rules: send plain requests, not a tunnel")
        inspection = self._around.inspection
        if inspection is None or not inspection.authority.covers(target.host):
            return Refusal(
                "inspection_required", "TLS of this host cannot be opened in this session; start a new one"
            )
        return None

    async def _carry_inspected(
        self, upstream: socket.socket, attempt: Attempt, target: Authority
    ) -> str | Refusal:
        hello = await self._judged_hello(attempt, target, is_opened=True)
        if isinstance(hello, Refusal):
            await self._tell(hello, target)
            return hello
        assert self._around.inspection is not None  # noqa: S101  # _check_inspection
        return await InspectedTunnel(self._client, upstream, attempt, self._around.inspection).serve(hello)

    async def _tell(self, refusal: Refusal, target: Authority) -> None:
        with suppress(OSError):
            await self._send(tunnel_refusal(refusal, target))

    async def _carry_tunnel(
        self, upstream: socket.socket, attempt: Attempt, target: Authority
    ) -> str | Refusal:
        try:
            if self._around.network.enforce_tls:
                first = await self._judged_hello(attempt, target)
                if isinstance(first, Refusal):
                    return first
            else:
                first = bytes(self._pending)
            if first:
                await attempt.traffic.send_up(upstream, first)
        except BudgetSpent:
            return "budget_spent"
        around = self._around
        return await relay(self._client, upstream, attempt.traffic, around.limits.idle_seconds, around.pipes)

    async def _judged_hello(
        self, attempt: Attempt, target: Authority, *, is_opened: bool = False
    ) -> bytes | Refusal:
        reader = HelloReader()
        data = bytes(self._pending)
        try:
            async with asyncio.timeout(self._around.limits.hello_seconds):
                while (hello := reader.feed(data)) is None:
                    data = await asyncio.get_running_loop().sock_recv(self._client, CHUNK_BYTES)
                    if not data:
                        return Refusal(
                            "tls_malformed", "the client closed before its ClientHello was complete"
                        )
        except TimeoutError:
            return Refusal("timeout", "no complete ClientHello arrived in time")
        if isinstance(hello, Refusal):
            return hello
        shown = (hello.server_name or b"").decode("latin-1")
        attempt.sni = None if self._around.credentials.find_in_name(shown) else hello.server_name
        return judge_hello(hello, target.host, is_opened=is_opened) or bytes(reader.received)

    async def _serve_forward(self, head: RequestHead, attempt: Attempt) -> bool:
        asked = parse_forward(head)
        if isinstance(asked, Refusal):
            await self._refuse(attempt, asked)
            return False
        target = asked.authority
        attempt.path = self._around.credentials.watch.redactor().clean(asked.path)
        if self._around.network.enforce_tls:
            attempt.target, attempt.rule = target, "network.enforce_tls"
            leak = self._find_leak(attempt, None, target)
            required = Refusal("tls_required", "use https; plain HTTP is off (enforce_tls)")
            await self._refuse(attempt, leak or required)
            if head.has_body:
                await hear_out(self._client)
            return False
        decision = self._decide(attempt, target)
        request = self._judge_plain(head, attempt, decision, target, asked.path)
        refusal = request if isinstance(request, Refusal) else None
        upstream = await self._open_upstream(attempt, decision, target, refusal)
        if upstream is None or isinstance(request, Refusal):
            if head.has_body:
                await hear_out(self._client)
            return False
        reason: str | Refusal = ""
        try:
            outcome = await exchange(
                self._stream,
                PlainStream(upstream),
                request,
                attempt.traffic,
                self._around.limits.idle_seconds,
            )
            reason = outcome.refusal or outcome.reason
            if outcome.refusal is not None and not outcome.is_begun:
                await self._answer(attempt, outcome.refusal)
            if not (outcome.keeps_client or request.body.is_complete):
                await hear_out(self._client)
            return outcome.keeps_client
        except BaseException as exc:
            reason = _word_of(exc)
            raise
        finally:
            upstream.close()
            self._record_close(attempt, reason)

    def _judge_plain(
        self, head: RequestHead, attempt: Attempt, decision: EgressDecision, target: Authority, path: bytes
    ) -> Forwarded | Refusal:
        credentials = self._around.credentials
        if credentials.for_host(target.host):
            return Refusal("tls_required", "this host is sent a credential: use https")
        misuse = credentials.find_misuse(None, head)
        if misuse == LEAK:
            attempt.path = None  # it may be spelt in a way that clean() does not know
        refusal = (
            self._find_leak(attempt, decision, target)
            or _refusal_of(decision)
            or check_host(head, target, 80)
            or check_upgrade(head)
            or misuse
        )
        if refusal is not None or decision.entry is None:
            return (
                refusal or _refusal_of(decision) or Refusal("policy_error", "no entry of the policy decided")
            )
        judged = judge_request(decision.entry, head.method, path)
        if isinstance(judged, Refusal):
            return judged
        attempt.path = judged
        outgoing = outgoing_head(head, target, judged)
        try:
            body = RequestBody(head, outgoing, self._stream, self._pending, credentials.watch.outbound())
        except BodyRefused as exc:
            return exc.refusal
        return Forwarded(head, outgoing, body, credentials.watch.redactor())

    def _decide(self, attempt: Attempt, target: Authority) -> EgressDecision:
        around = self._around
        attempt.target = target
        attempt.decision = decision = decide_egress(around.network, target.host, target.port)
        attempt.rule = decision.rule
        attempt.traffic = Traffic(
            lambda up, down: around.account(attempt.decision or decision, target, up, down),
            lambda: around.allowance(attempt.decision or decision, target),
        )
        self._attempt = attempt
        return decision

    async def _open_upstream(
        self, attempt: Attempt, decision: EgressDecision, target: Authority, refusal: Refusal | None
    ) -> socket.socket | None:
        """Resolve, vet, record and dial; None when the request was refused and answered."""
        # A refused name is never looked up: the query itself would carry data out.
        refusal = refusal or self._spent(decision, target)
        addresses = refusal or await self._vetted_addresses(decision, target)
        if attempt.is_revoked:
            addresses = Refusal("policy_changed", "the policy changed meanwhile and allows this no more")
        if isinstance(addresses, Refusal):
            await self._refuse(attempt, addresses)
            return None
        attempt.address, attempt.candidates = addresses[0], tuple(addresses)
        self._around.record(attempt.opened())
        attempt.is_recorded = True
        failure = Refusal("upstream_unreachable", f"{target.host} does not answer on port {target.port}")
        try:
            dialled = await dial_first(
                self._around.dialer, addresses, target.port, self._around.limits.dial_seconds
            )
        except PeerMismatch as exc:
            dialled, failure = None, Refusal("address_denied", str(exc))
        except BaseException as exc:
            self._record_close(attempt, _word_of(exc))
            raise
        if dialled is None:
            self._record_close(attempt, failure)
            await self._answer(attempt, failure)
            return None
        upstream, attempt.address = dialled
        attempt.candidates = (attempt.address,)
        return upstream

    def _spent(self, decision: EgressDecision, target: Authority) -> Refusal | None:
        """Refuse what could not carry one byte. Asking for one makes it known that the budget is spent."""
        around = self._around
        if around.allowance(decision, target) > 0 or around.account(decision, target, 1, 0):
            return None
        return Refusal(
            "budget_spent",
            f"this session's bytes for {target.host}, or for all hosts together, are used up (max_bytes)",
        )

    async def _vetted_addresses(self, decision: EgressDecision, target: Authority) -> list[str] | Refusal:
        if is_ip_literal(target.host):
            return [target.host]  # listed as such: the author named this very address
        try:
            async with asyncio.timeout(self._around.limits.resolve_seconds):
                answers = await self._around.resolver.resolve(target.host)
        except TimeoutError:
            answers = []
        if not answers:
            return Refusal("dns_failure", f"{target.host} has no address")
        own = self._around.own_addresses()
        refused = ""
        vetted = []
        for address in answers:
            problem = vet_address(address, is_exact_name=decision.is_exact_name, own_addresses=own)
            if problem is None and is_denied(self._around.network, address):
                problem = "an address on the denylist"
            if problem is None:
                vetted.append(address)
            else:
                refused = f"{target.host} resolves to {problem}"
        return vetted or Refusal("address_denied", refused)

    def _is_line_too_long(self, refusal: Refusal) -> bool:
        return refusal.reason == "header_too_large" and b"\r\n" not in self._pending

    async def _refuse(self, attempt: Attempt, refusal: Refusal, status: int | None = None) -> None:
        try:
            self._around.record(attempt.opened(refusal))
            attempt.is_recorded = True
        except RecordUnavailable:
            refusal, status = Refusal("log_unavailable", "the session's record cannot be written"), None
        await self._answer(attempt, refusal, status)

    async def _answer(self, attempt: Attempt, refusal: Refusal, status: int | None = None) -> None:
        code = status or status_of(refusal.reason, attempt.method or "")
        await self._send(refusal_answer(refusal, attempt.target, code))

    async def _send(self, data: bytes) -> None:
        # A client that does not read its own answer is not waited for.
        async with asyncio.timeout(self._around.limits.head_seconds):
            await asyncio.get_running_loop().sock_sendall(self._client, data)

    def _record_close(self, attempt: Attempt, reason: str | Refusal) -> None:
        # Nothing is left to stop: the gateway refuses everything from here on.
        with suppress(RecordUnavailable):
            self._around.record(attempt.closed(reason))


def _word_of(failure: BaseException) -> str:
    if isinstance(failure, asyncio.CancelledError):
        return str(failure.args[0]) if failure.args else "cancelled"
    return "reset" if isinstance(failure, OSError) else "gateway_error"


def _refusal_of(decision: EgressDecision) -> Refusal | None:
    if decision.is_allowed:
        return None
    return Refusal(decision.reason, decision.hint or "not allowed by the session's network policy")
