"""Open one tunnel's TLS and judge each request in it. D5

The order is the defence here too: the client's name is checked before TLS is opened, the server's certificate
before a request is sent, and every request is judged and recorded before a byte of it goes upstream. What
goes upstream is written anew from what was judged.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from sandbox.egress.answers import refusal_answer, status_of
from sandbox.egress.attempt import Attempt
from sandbox.egress.authority import SessionAuthority
from sandbox.egress.bodies import BodyRefused, RequestBody
from sandbox.egress.credentials import Credentials
from sandbox.egress.forward import SURPLUS, Forwarded, Outcome, exchange, outgoing_head
from sandbox.egress.heads import read_head
from sandbox.egress.leaks import LEAK
from sandbox.egress.request import (
    RequestHead,
    check_host,
    forwarded_fields,
    parse_inner,
    websocket_key,
)
from sandbox.egress.resolve import Dialer, PeerMismatch, dial_first
from sandbox.egress.rules import judge_request
from sandbox.egress.streams import TlsEnded, TlsStream, hear_out, relay_streams
from sandbox.events import EgressConnection
from sandbox.policy.hosts import Authority, EgressDecision, Refusal
from sandbox.policy.model import HostEntry

_LOG = logging.getLogger(__name__)
HTTPS = 443
_MISTRUST = {
    "TLSV1_ALERT_UNKNOWN_CA",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "TLSV1_ALERT_ACCESS_DENIED",
}
"""How OpenSSL names the alerts of a client that does not accept a certificate."""


@dataclass(frozen=True)
class Inspection:
    """What inspected connections of one gateway share."""

    authority: SessionAuthority
    upstream_tls: ssl.SSLContext
    credentials: Credentials
    dialer: Dialer
    decide: Callable[[Authority, str], EgressDecision]
    """What the policy in force now says of a name and of the address it was found at."""
    record: Callable[[EgressConnection], None]
    """Raises when the event cannot be recorded; then what it describes must not happen."""
    turn: Callable[[], Awaitable[object]]
    """Waits until another request may be asked."""
    handshake_seconds: float
    head_seconds: float
    keep_seconds: float
    dial_seconds: float
    idle_seconds: float


@dataclass(frozen=True)
class InnerRequest:
    """What a judged request asks for."""

    path: bytes
    """Origin form, query included: as judged and as forwarded."""
    websocket_key: bytes | None


def judge_inner(
    head: RequestHead, target: Authority, entry: HostEntry, credentials: Credentials
) -> InnerRequest | Refusal:
    """Judge one request that came through a tunnel to ``target``. Pure.

    Host, the authority of an absolute-form target, and the tunnel must all name the same place.
    """
    path = parse_inner(head, target)
    if isinstance(path, Refusal):
        return path
    if (refusal := check_host(head, target, HTTPS)) is not None:
        return refusal
    key = websocket_key(head)
    if isinstance(key, Refusal):
        return key
    judged = judge_request(entry, head.method, path, is_websocket=key is not None)
    if isinstance(judged, Refusal):
        return judged
    return credentials.find_misuse(target.host, head) or InnerRequest(judged, key)


class InspectedTunnel:
    """Serves the requests of one tunnel. One upstream connection at a time, always to the vetted address."""

    def __init__(
        self, client: socket.socket, upstream: socket.socket, attempt: Attempt, inspection: Inspection
    ) -> None:
        """Take both sockets, and an attempt whose target and address are settled."""
        assert attempt.target is not None and attempt.address is not None  # noqa: S101
        self._client_socket = client
        self._upstream_socket = upstream
        self._attempt = attempt
        self._target = attempt.target
        self._address = attempt.address
        self._inspection = inspection
        self._pending = bytearray()
        self._upstream: TlsStream | None = None
        self._is_used = False
        self._is_body_read = False

    async def serve(self, hello: bytes) -> str | Refusal:
        """Open TLS, beginning with the accepted ClientHello, and serve; return how it ended, for the record.

        Both sockets are closed then. Raises OSError when the client goes away inside a request.
        """
        context = self._inspection.authority.context_for(self._target.host)
        client = TlsStream(self._client_socket, context, received=hello)
        try:
            if (refusal := await self._shake_client(client)) is not None:
                return refusal
            upstream = await self._shake_upstream(self._upstream_socket)
            if isinstance(upstream, TlsStream):
                self._upstream = upstream
                return await self._serve_requests(client, None)
            return await self._serve_requests(client, upstream)
        finally:
            client.close()
            self._drop_upstream()
            self._upstream_socket.close()

    async def _shake_client(self, client: TlsStream) -> Refusal | None:
        try:
            async with asyncio.timeout(self._inspection.handshake_seconds):
                await client.handshake()
        except ssl.SSLError as exc:
            return self._mistrust(exc.reason) or Refusal(
                "tls_malformed", f"the client's TLS handshake failed: {exc.reason}"
            )
        except TimeoutError:
            return Refusal("timeout", "the client's TLS handshake was not complete in time")
        except OSError:
            return Refusal("tls_malformed", "the client closed inside its TLS handshake")
        return None

    def _mistrust(self, reason: str | None) -> Refusal | None:
        if reason not in _MISTRUST:
            return None
        refusal = Refusal(
            "client_rejected_ca",
            f"the client does not trust the session's authority: let it read the trust bundle, "
            f"or set inspect: false for {self._target.host}",
        )
        _LOG.warning("egress connection %d: %s", self._attempt.number, refusal.hint)
        return refusal

    async def _shake_upstream(self, connection: socket.socket) -> TlsStream | Refusal:
        stream = TlsStream(connection, self._inspection.upstream_tls, server_name=self._target.host)
        try:
            async with asyncio.timeout(self._inspection.dial_seconds):
                await stream.handshake()
        except OSError as exc:  # TimeoutError and ssl.SSLError are some of them
            stream.close()
            why = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else ""
            why = why or (exc.reason if isinstance(exc, ssl.SSLError) else "") or "the connection broke off"
            return Refusal("upstream_tls", f"no verified TLS 1.2 or newer with {self._target.host}: {why}")
        except BaseException:
            stream.close()
            raise
        return stream

    async def _serve_requests(self, client: TlsStream, failure: Refusal | None) -> str | Refusal:
        inspection, count = self._inspection, 0
        while True:
            keep = inspection.keep_seconds if count else None
            try:
                head = await read_head(client, self._pending, inspection.head_seconds, idle_seconds=keep)
            except ConnectionError as exc:
                # In TLS 1.3 the server is done before the client has looked at its certificate.
                if not count and isinstance(exc, TlsEnded) and (refusal := self._mistrust(exc.reason)):
                    return refusal
                head = None  # cut without a goodbye: common between requests
            if head is None or (isinstance(head, Refusal) and not self._pending and head.reason == "timeout"):
                return failure or ("ok" if count else "no_request")
            if count:
                await inspection.turn()
            count += 1
            ended = await self._serve_one(client, head, failure)
            if ended is not None:
                if isinstance(head, RequestHead) and head.has_body and not self._is_body_read:
                    client.say_goodbye()
                    await hear_out(self._client_socket)
                return ended

    async def _serve_one(
        self, client: TlsStream, head: RequestHead | Refusal, failure: Refusal | None
    ) -> str | Refusal | None:
        """Serve one request; return None when the next may follow."""
        attempt, self._is_body_read = self._attempt.inner(), False
        try:
            judged = self._judge(client, head, attempt)
            refusal = judged if isinstance(judged, Refusal) else failure
            if refusal is None and self._upstream is not None:
                match self._upstream.unasked():
                    case "bytes":
                        refusal = SURPLUS
                    case "end":
                        self._drop_upstream()
            self._inspection.record(attempt.requested(refusal))
        except Exception:
            # The record's failure, above all: what cannot be recorded does not happen.
            _LOG.exception("egress connection %d: a request could not be recorded", attempt.number)
            await self._answer(client, attempt, Refusal("log_unavailable", "the record cannot be written"))
            return "log_unavailable"
        if refusal is not None or isinstance(judged, Refusal):
            await self._answer(client, attempt, refusal or SURPLUS)
            return "request_refused"
        is_reused = self._upstream is not None and self._is_used
        if self._upstream is None:
            upstream = await self._dial_again()
            if isinstance(upstream, Refusal):
                await self._answer(client, attempt, upstream)
                return upstream
            self._upstream = upstream
        self._is_used = True
        outcome = await exchange(
            client, self._upstream, judged, self._attempt.traffic, self._inspection.idle_seconds
        )
        self._is_body_read = judged.body.is_complete
        return await self._after(client, attempt, outcome, judged, is_reused=is_reused)

    def _judge(self, client: TlsStream, head: RequestHead | Refusal, attempt: Attempt) -> Forwarded | Refusal:
        if isinstance(head, Refusal):
            return head
        attempt.method = head.method
        try:
            return self._forwarded(client, head, attempt)
        except Exception:
            # Any failure to decide is a refusal. The client learns nothing of the cause.
            _LOG.exception("egress connection %d: a request could not be judged", attempt.number)
            return Refusal("policy_error", "this request could not be judged")

    def _forwarded(self, client: TlsStream, head: RequestHead, attempt: Attempt) -> Forwarded | Refusal:
        target, credentials = self._target, self._inspection.credentials
        watch = credentials.watch
        attempt.path = watch.redactor().clean(head.target)
        # Asked again for each request: the policy may have changed since the tunnel was opened.
        decision = self._inspection.decide(target, self._address)
        attempt.rule = decision.rule
        if decision.entry is None or not decision.entry.inspect:
            return Refusal(
                decision.reason if not decision.is_allowed else "host_not_allowed",
                decision.hint or "not allowed by the session's network policy any more",
            )
        traffic = self._attempt.traffic
        if traffic.allowance() <= 0 and not traffic.account(1, 0):  # asking for one makes it known
            return Refusal("budget_spent", f"this session's bytes for {target.host} are used up (max_bytes)")
        inner = judge_inner(head, target, decision.entry, credentials)
        if isinstance(inner, Refusal):
            if inner == LEAK:
                attempt.path = None  # it may be spelt in a way that clean() does not know
            return inner
        attempt.path = inner.path
        fields, attempt.credential = credentials.inject(target.host, head, forwarded_fields(head))
        is_websocket = inner.websocket_key is not None
        outgoing = outgoing_head(
            head,
            target,
            inner.path,
            default_port=HTTPS,
            fields=[*fields, (b"Upgrade", b"websocket")] if is_websocket else fields,
            connection=b"Upgrade" if is_websocket else None,
        )
        try:
            body = RequestBody(head, outgoing, client, self._pending, watch.outbound())
        except BodyRefused as exc:
            attempt.credential = None
            return exc.refusal
        return Forwarded(
            head,
            outgoing,
            body,
            watch.redactor(),
            has_credential=bool(credentials.for_host(target.host)),
            websocket_key=inner.websocket_key,
        )

    async def _dial_again(self) -> TlsStream | Refusal:
        """Connect once more to the address that was vetted for this tunnel."""
        host, port = self._target.host, self._target.port
        try:
            dialled = await dial_first(
                self._inspection.dialer, [self._address], port, self._inspection.dial_seconds
            )
        except PeerMismatch as exc:
            return Refusal("address_denied", str(exc))
        if dialled is None:
            return Refusal("upstream_unreachable", f"{host} does not answer on port {port} any more")
        self._is_used = False
        return await self._shake_upstream(dialled[0])

    async def _after(
        self, client: TlsStream, attempt: Attempt, outcome: Outcome, request: Forwarded, *, is_reused: bool
    ) -> str | Refusal | None:
        if outcome.switched is not None and self._upstream is not None:
            return await relay_streams(
                client,
                self._upstream,
                self._attempt.traffic,
                self._inspection.idle_seconds,
                first_up=bytes(self._pending),
                first_down=outcome.switched,
                redactor=request.redactor,
            )
        if outcome.is_silent and is_reused:
            return "reset"  # the server had given the connection up; clients know this and ask again
        if outcome.refusal is not None:
            if not outcome.is_begun:
                await self._answer(client, attempt, outcome.refusal)
            return outcome.refusal
        if outcome.reason != "ok":
            return outcome.reason
        if outcome.has_surplus:
            return SURPLUS
        if not outcome.keeps_upstream:
            self._drop_upstream()
        return None if outcome.keeps_client else "ok"

    async def _answer(self, client: TlsStream, attempt: Attempt, refusal: Refusal) -> None:
        code = status_of(refusal.reason, attempt.method or "")
        # A client that does not read its own answer is not waited for.
        with suppress(OSError):
            async with asyncio.timeout(self._inspection.head_seconds):
                await client.send(refusal_answer(refusal, self._target, code))

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
