"""Carry one judged plain-HTTP request to its host and the answer back, both framed anew. D5

Every request gets an upstream connection of its own, so nothing an upstream sends too much can become
the answer to the next request. Bodies are parsed by llhttp behind the strict head gate; both must agree.
"""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import dataclass

import httptools

from sandbox.egress.answers import CONTINUE
from sandbox.egress.request import MAX_HEAD_BYTES, Field, RequestHead, forwarded_fields
from sandbox.egress.tunnel import CHUNK_BYTES, BudgetSpent, Traffic
from sandbox.policy.hosts import Authority, Refusal

_MALFORMED = Refusal("upstream_malformed", "the server's answer is not well-formed HTTP/1.1")
_NOT_RETURNED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"content-length",
        b"upgrade",
    }
)


@dataclass(frozen=True)
class Outcome:
    """How one exchange ended."""

    reason: str
    """``ok``, or the word for the record."""
    refusal: Refusal | None = None
    """What the client still has to be told; None once an answer has begun."""
    keeps_client: bool = False
    """True when the client's connection stands cleanly before its next request."""


class RequestBody:
    """A request's body, taken off the client's connection piece by piece."""

    def __init__(self, head: RequestHead, outgoing: bytes, client: socket.socket, pending: bytearray) -> None:
        """Check that llhttp reads the outgoing head as the gate read the incoming one, else ValueError."""
        self.is_complete = False
        self.has_surplus = False
        self._pieces: list[bytes] = []
        self._in_body = False
        self._client = client
        self._pending = pending
        self._left = head.content_length
        self._is_chunked = head.is_chunked
        self._parser = httptools.HttpRequestParser(self)
        self._feed(outgoing)
        if self.is_complete != (not head.is_chunked and not head.content_length):
            raise ValueError("the two parsers disagree on where the request ends")

    async def next_piece(self) -> bytes:
        """Return the next piece, empty at the end. Raises ValueError when the framing is broken."""
        while not self._pieces and not self.is_complete:
            limit = CHUNK_BYTES if self._left is None else min(CHUNK_BYTES, self._left)
            data = bytes(self._pending[:limit])
            del self._pending[:limit]
            if not data and not (data := await asyncio.get_running_loop().sock_recv(self._client, limit)):
                raise ValueError("the client closed inside its request")
            if self._left is not None:
                self._left -= len(data)
            self._feed(data)
        return self._pieces.pop(0) if self._pieces else b""

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            # What follows a complete chunked body is not forwarded and not answered, whatever it is.
            if not self.is_complete:
                raise ValueError(f"llhttp refuses the request: {exc}") from exc
            self.has_surplus = True

    def on_message_begin(self) -> None:
        """Called by the parser; a second time when bytes follow the body."""
        self.has_surplus = self.has_surplus or self.is_complete

    def on_headers_complete(self) -> None:
        """Called by the parser: any field from here on is a trailer."""
        self._in_body = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser. A trailer may carry framing or credentials past the gate: refused."""
        if self._in_body and not self.is_complete:
            raise ValueError("trailers are not accepted")

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if not self.is_complete:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_complete = True


class _Response:
    """Collects what llhttp makes of the upstream's bytes. Interim answers (1xx) are dropped."""

    def __init__(self, *, is_head: bool) -> None:
        self.fields: list[Field] = []
        self.status = 0
        self.phrase = b""
        self.has_head = False
        self.is_complete = False
        self.pieces: list[bytes] = []
        self._is_head = is_head
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self.is_complete:
                raise ValueError(f"llhttp refuses the answer: {exc}") from exc

    def values(self, name: bytes) -> list[bytes]:
        return [value for field, value in self.fields if field.lower() == name]

    def on_message_begin(self) -> None:
        if not self.is_complete:
            self.fields, self.phrase = [], b""

    def on_status(self, phrase: bytes) -> None:
        if not self.has_head:
            self.phrase = phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # trailers are dropped
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self.is_complete or self.has_head:
            return
        self.status = self._parser.get_status_code()
        if self.status == 101:
            raise ValueError("the server switches protocols, which was not asked for")
        self.has_head = self.status >= 200
        self.is_complete = self.has_head and self._is_head

    def on_body(self, data: bytes) -> None:
        if not self.is_complete:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.is_complete = self.is_complete or self.has_head


def outgoing_head(head: RequestHead, target: Authority, path: bytes) -> bytes:
    """Return the head that goes upstream: the judged path, the canonical host, no hop-by-hop field."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    fields = [(b"Host", (host if target.port == 80 else f"{host}:{target.port}").encode("ascii"))]
    fields += forwarded_fields(head)
    if head.is_chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif head.content_length is not None:
        fields.append((b"Content-Length", b"%d" % head.content_length))
    fields.append((b"Connection", b"close"))
    return _head_bytes(head.method.encode("ascii") + b" " + path + b" HTTP/1.1", fields)


async def exchange(
    client: socket.socket,
    upstream: socket.socket,
    head: RequestHead,
    outgoing: bytes,
    body: RequestBody,
    traffic: Traffic,
    idle_seconds: float,
) -> Outcome:
    """Send the request, return the answer to the client as it comes."""
    response = _Response(is_head=head.method == "HEAD")
    sending = asyncio.create_task(_send_request(client, upstream, head, outgoing, body, traffic))
    receiving = asyncio.create_task(
        _return_response(client, upstream, head, body, response, traffic, idle_seconds)
    )
    try:
        # A server may answer before it has read all (413): the answer ends the exchange either way.
        await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        failure = sending.exception() if sending.done() else None
        if isinstance(failure, ValueError):
            return Outcome("bad_request", None if response.has_head else Refusal("bad_request", str(failure)))
        if isinstance(failure, BudgetSpent):
            return Outcome("budget_spent")
        # A reset while sending often means that an answer is waiting to be read.
        return await receiving
    finally:
        sending.cancel()
        receiving.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def _send_request(
    client: socket.socket,
    upstream: socket.socket,
    head: RequestHead,
    outgoing: bytes,
    body: RequestBody,
    traffic: Traffic,
) -> None:
    await traffic.send_up(upstream, outgoing)
    if head.minor == 1 and not body.is_complete and b"100-continue" in head.tokens(b"expect"):
        await traffic.send_down(client, CONTINUE)
    while piece := await body.next_piece():
        await traffic.send_up(upstream, _chunk(piece) if head.is_chunked else piece)
    if head.is_chunked:
        await traffic.send_up(upstream, b"0\r\n\r\n")


async def _return_response(
    client: socket.socket,
    upstream: socket.socket,
    head: RequestHead,
    body: RequestBody,
    response: _Response,
    traffic: Traffic,
    idle_seconds: float,
) -> Outcome:
    loop = asyncio.get_running_loop()
    is_head_sent = is_chunked = keeps_client = False
    head_bytes = 0
    try:
        while not response.is_complete:
            async with asyncio.timeout(idle_seconds):
                data = await loop.sock_recv(upstream, CHUNK_BYTES)
            if not data:
                break
            response.feed(data)
            if not response.has_head:
                head_bytes += len(data)
                if head_bytes > MAX_HEAD_BYTES:
                    return Outcome("upstream_malformed", _MALFORMED)
                continue
            if not is_head_sent:
                is_delimited, is_chunked, fields = _client_framing(response, head)
                keeps_client = is_delimited and head.minor == 1 and b"close" not in head.tokens(b"connection")
                keeps_client = keeps_client and body.is_complete and not body.has_surplus
                fields.append((b"Connection", b"keep-alive" if keeps_client else b"close"))
                line = b"HTTP/1.1 %d %s" % (response.status, _printable(response.phrase))
                is_head_sent = True
                await traffic.send_down(client, _head_bytes(line, fields))
            while response.pieces:
                piece = response.pieces.pop(0)
                await traffic.send_down(client, _chunk(piece) if is_chunked else piece)
    except ValueError:
        return Outcome("upstream_malformed", None if is_head_sent else _MALFORMED)
    except BudgetSpent:
        return Outcome("budget_spent")
    except OSError as exc:
        reason = "timeout" if isinstance(exc, TimeoutError) else "reset"
        return Outcome(reason, None if is_head_sent else _MALFORMED)
    if not is_head_sent:
        return Outcome("upstream_malformed", _MALFORMED)
    if not response.is_complete and (
        response.values(b"content-length") or response.values(b"transfer-encoding")
    ):
        return Outcome("upstream_malformed")  # cut short: the client must see it cut short too
    if is_chunked:
        await traffic.send_down(client, b"0\r\n\r\n")
    return Outcome("ok", keeps_client=keeps_client)


def _client_framing(response: _Response, head: RequestHead) -> tuple[bool, bool, list[Field]]:
    """Return whether the client sees the body's end, whether it comes in chunks, and the fields to send."""
    nominated = {
        token.strip().lower() for value in response.values(b"connection") for token in value.split(b",")
    }
    fields = [field for field in response.fields if field[0].lower() not in _NOT_RETURNED | nominated]
    lengths = response.values(b"content-length")
    if head.method == "HEAD" or response.status in (204, 304):
        return True, False, fields + [(b"Content-Length", length) for length in lengths[:1]]
    if lengths:
        return True, False, [*fields, (b"Content-Length", lengths[0])]
    if head.minor == 1:
        return True, True, [*fields, (b"Transfer-Encoding", b"chunked")]
    return False, False, fields


def _head_bytes(line: bytes, fields: list[Field]) -> bytes:
    return line + b"\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in fields) + b"\r\n"


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def _printable(phrase: bytes) -> bytes:
    return re.sub(rb"[^ -~]", b"", phrase)
