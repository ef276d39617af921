"""Carry one judged request to its host and the answer back, both framed anew. D5

The same for plain HTTP and for TLS that the gateway opened. A plain request gets an upstream connection of
its own; a tunnel's requests share one, which is given up as soon as anything on it is not as it should be.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from sandbox.egress.answers import CONTINUE
from sandbox.egress.bodies import BodyRefused, RequestBody
from sandbox.egress.leaks import Redactor
from sandbox.egress.request import MAX_HEAD_BYTES, Field, RequestHead, forwarded_fields
from sandbox.egress.responses import Response, client_head, head_bytes, is_delimited
from sandbox.egress.streams import Stream, send_down, send_up
from sandbox.egress.tunnel import CHUNK_BYTES, BudgetSpent, Traffic
from sandbox.policy.hosts import Authority, Refusal

_MALFORMED = Refusal("upstream_malformed", "the server's answer is not well-formed HTTP/1.1")
_UNREADABLE = Refusal(
    "upstream_malformed",
    "the server compresses an answer in which a credential would have to be made unreadable",
)
SURPLUS = Refusal("upstream_malformed", "the server sent more than its answer")


@dataclass(frozen=True)
class Outcome:
    """How one exchange ended."""

    reason: str
    """``ok``, or the word for the record."""
    refusal: Refusal | None = None
    """Why it failed, when that was somebody's fault; ``is_begun`` tells whether the client can be told."""
    is_begun: bool = False
    """An answer has begun: nothing else can be said to the client."""
    is_silent: bool = False
    """The upstream closed without a byte: on a connection that was kept, nobody's fault."""
    keeps_client: bool = False
    """True when the client's connection stands cleanly before its next request."""
    keeps_upstream: bool = False
    """True when the upstream's connection does."""
    has_surplus: bool = False
    """Bytes came behind the answer: nobody can say whose they are."""
    switched: bytes | None = None
    """After an agreed websocket: the first bytes of it that came with the answer."""


@dataclass(frozen=True)
class Forwarded:
    """One request as it goes upstream."""

    head: RequestHead
    """As the client sent it."""
    outgoing: bytes
    """The head that goes upstream."""
    body: RequestBody
    redactor: Redactor = field(default_factory=lambda: Redactor(()))
    has_credential: bool = False
    """Its answer must be readable, or it is refused."""
    websocket_key: bytes | None = None
    """Given when the request asks for a websocket and may have it."""


def outgoing_head(
    head: RequestHead,
    target: Authority,
    path: bytes,
    *,
    default_port: int = 80,
    fields: list[Field] | None = None,
    connection: bytes | None = b"close",
) -> bytes:
    """Return the head that goes upstream: the judged path, the canonical host, no hop-by-hop field.

    ``fields`` are the forwarded ones, where they are not simply those the client sent.
    """
    host = f"[{target.host}]" if ":" in target.host else target.host
    value = host if target.port == default_port else f"{host}:{target.port}"
    sent = [(b"Host", value.encode("ascii"))]
    sent += forwarded_fields(head) if fields is None else fields
    if head.is_chunked:
        sent.append((b"Transfer-Encoding", b"chunked"))
    elif head.content_length is not None:
        sent.append((b"Content-Length", b"%d" % head.content_length))
    if connection is not None:
        sent.append((b"Connection", connection))
    return head_bytes(head.method.encode("ascii") + b" " + path + b" HTTP/1.1", sent)


async def exchange(
    client: Stream, upstream: Stream, request: Forwarded, traffic: Traffic, idle_seconds: float
) -> Outcome:
    """Send the request, return the answer to the client as it comes.

    The exchange ends when no byte has passed in either direction for ``idle_seconds``.
    """
    head, body = request.head, request.body
    if head.minor == 1 and not body.is_complete and b"100-continue" in head.tokens(b"expect"):
        # Before anything is sent: an answer that came at once must not have this in its middle.
        try:
            await send_down(traffic, client, CONTINUE)
        except BudgetSpent:
            return Outcome("budget_spent", is_begun=True)
    response = Response(is_head=head.method == "HEAD", websocket_key=request.websocket_key)
    sending = asyncio.create_task(_send_request(upstream, request, traffic))
    receiving = asyncio.create_task(_return_response(client, upstream, request, response, traffic))
    traffic.active_at = time.monotonic()
    try:
        # A server may answer before it has read all (413): the answer ends the exchange either way.
        waiting = {sending, receiving}
        while not receiving.done():
            left = traffic.active_at + idle_seconds - time.monotonic()
            if left <= 0:
                return Outcome("timeout", _MALFORMED, is_begun=response.has_head)
            done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if sending in done:
                waiting = {receiving}
                failure = sending.exception()
                if isinstance(failure, BodyRefused):
                    return Outcome(failure.refusal.reason, failure.refusal, is_begun=response.has_head)
                if isinstance(failure, BudgetSpent):
                    return Outcome("budget_spent", is_begun=True)
                if failure is not None and not isinstance(failure, OSError):
                    raise failure
                # A reset while sending often means that an answer is waiting to be read.
        outcome = receiving.result()
        is_sent = sending.done() and sending.exception() is None
        # An answer that came before the whole request was sent leaves the rest of it in between.
        return outcome if is_sent else replace(outcome, keeps_upstream=False)
    finally:
        sending.cancel()
        receiving.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def _send_request(upstream: Stream, request: Forwarded, traffic: Traffic) -> None:
    head, body = request.head, request.body
    await send_up(traffic, upstream, request.outgoing)
    while piece := await body.next_piece():
        await send_up(traffic, upstream, _chunk(piece) if head.is_chunked else piece)
    if head.is_chunked:
        await send_up(traffic, upstream, b"0\r\n\r\n")


async def _return_response(
    client: Stream, upstream: Stream, request: Forwarded, response: Response, traffic: Traffic
) -> Outcome:
    head, redactor = request.head, request.redactor
    is_head_sent = is_chunked = keeps_client = False
    received = 0
    try:
        while not response.is_complete:
            data = await upstream.receive(CHUNK_BYTES)
            if not data:
                break
            received += len(data)
            response.feed(data)
            if not response.has_head:
                if received > MAX_HEAD_BYTES:
                    return Outcome("upstream_malformed", _MALFORMED)
                continue
            if not is_head_sent:
                if request.has_credential and not response.is_readable:
                    return Outcome("upstream_malformed", _UNREADABLE)
                keeps_client = _keeps_client(response, request)
                text, is_chunked = client_head(response, head, redactor, keeps_client=keeps_client)
                is_head_sent = True
                await send_down(traffic, client, text)
            await _send_pieces(client, response, redactor, traffic, is_chunked=is_chunked)
    except ValueError:
        return Outcome("upstream_malformed", _MALFORMED, is_begun=is_head_sent)
    except BudgetSpent:
        return Outcome("budget_spent", is_begun=True)
    except OSError:
        return Outcome("reset", _MALFORMED, is_begun=is_head_sent, is_silent=not received)
    if not is_head_sent:
        return Outcome("upstream_malformed", _MALFORMED, is_silent=not received)
    if response.is_cut_short:  # the client must see it cut short too
        return Outcome("upstream_malformed", _MALFORMED, is_begun=True)
    if response.is_switched:
        return Outcome("ok", is_begun=True, switched=response.behind)
    response.pieces.append(redactor.finish())
    try:
        await _send_pieces(client, response, redactor, traffic, is_chunked=is_chunked, is_last=True)
    except BudgetSpent:
        return Outcome("budget_spent", is_begun=True)
    return Outcome(
        "ok",
        is_begun=True,
        has_surplus=response.has_surplus,
        keeps_client=keeps_client,
        keeps_upstream=response.is_complete and response.keeps_alive and not response.has_surplus,
    )


async def _send_pieces(
    client: Stream,
    response: Response,
    redactor: Redactor,
    traffic: Traffic,
    *,
    is_chunked: bool,
    is_last: bool = False,
) -> None:
    pieces, response.pieces = response.pieces, []
    for raw in pieces:
        # The last piece is what the redactor itself held back.
        if piece := raw if is_last else redactor.feed(raw):
            await send_down(traffic, client, _chunk(piece) if is_chunked else piece)
    if is_last and is_chunked:
        await send_down(traffic, client, b"0\r\n\r\n")


def _keeps_client(response: Response, request: Forwarded) -> bool:
    head, body = request.head, request.body
    return (
        is_delimited(response, head)
        and head.minor == 1
        and b"close" not in head.tokens(b"connection")
        and body.is_complete
        and not body.has_surplus
    )


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)
