"""Take a request's body off a connection, by a framing that no two parsers can read differently. D5

llhttp parses it, behind the head gate and behind a chunk grammar stricter than its own; where the three
disagree, the request is refused.
"""

from __future__ import annotations

import re

import httptools

from sandbox.egress.leaks import Outbound
from sandbox.egress.request import RequestHead
from sandbox.egress.streams import Stream
from sandbox.egress.tunnel import CHUNK_BYTES
from sandbox.policy.hosts import Refusal

_MAX_CHUNK_LINE = 128
# At most 4 GiB each: llhttp takes any 64-bit size, others overflow. Extensions are read and dropped.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~]*)?")


class BodyRefused(Exception):
    """The request may not go on, for what its body is."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.hint)


class RequestBody:
    """A request's body, taken off the client's connection piece by piece."""

    def __init__(
        self,
        head: RequestHead,
        outgoing: bytes,
        client: Stream,
        pending: bytearray,
        watch: Outbound | None = None,
    ) -> None:
        """Check that llhttp reads the outgoing head as the gate read the incoming one, else BodyRefused.

        What ``pending`` holds of the body already is taken and checked now: most of what is refused is
        refused before anything has left.
        """
        self.is_complete = False
        self.has_surplus = False
        self._pieces: list[bytes] = []
        self._in_body = False
        self._client = client
        self._pending = pending
        self._watch = watch
        self._left = head.content_length
        self._chunks = _ChunkLines() if head.is_chunked else None
        self._parser = httptools.HttpRequestParser(self)
        self._parse(outgoing)
        if self.is_complete != (not head.is_chunked and not head.content_length):
            raise _refused("the two parsers disagree on where the request ends")
        if not self.is_complete and pending:
            self._take_pending()

    async def next_piece(self) -> bytes:
        """Return the next piece, empty at the end. Raises BodyRefused."""
        while not self._pieces and not self.is_complete:
            if not self._pending:
                try:
                    data = await self._client.receive(CHUNK_BYTES)
                except ConnectionError:
                    data = b""
                if not data:
                    raise _refused("the client closed inside its request")
                self._pending += data
            self._take_pending()
        return self._pieces.pop(0) if self._pieces else b""

    def _take_pending(self) -> None:
        size = len(self._pending) if self._left is None else min(len(self._pending), self._left)
        data = bytes(self._pending[:size])
        del self._pending[:size]
        if self._left is not None:
            self._left -= size
        known = len(self._pieces)
        if self._chunks is not None:
            self._chunks.feed(data)
        self._parse(data)
        if self._chunks is not None and self._chunks.is_complete != self.is_complete:
            raise _refused("the two parsers disagree on where the body ends")
        for piece in self._pieces[known:]:
            if self._watch is not None and (refusal := self._watch.feed(piece)) is not None:
                raise BodyRefused(refusal)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            # What follows a complete chunked body is not forwarded and not answered, whatever it is.
            if not self.is_complete:
                raise _refused(f"llhttp refuses the request: {exc}") from exc
            self.has_surplus = True
        except httptools.HttpParserUpgrade:
            pass  # a websocket's head, judged as such; it has no body

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


class _ChunkLines:
    """Follows chunked framing: plain sizes, CRLF and nothing else as line ends, no trailer."""

    def __init__(self) -> None:
        self.is_complete = False
        self._line = b""
        self._left = 0
        self._is_last = False
        self._ends_chunk = False

    def feed(self, data: bytes) -> None:
        position = 0
        while position < len(data) and not self.is_complete:
            if self._left:
                taken = min(self._left, len(data) - position)
                self._left -= taken
                position += taken
                continue
            end = data.find(b"\n", position) + 1
            self._line += data[position : end or len(data)]
            if len(self._line) > _MAX_CHUNK_LINE:
                raise _refused("a chunk's size line is too long")
            if not end:
                return
            position = end
            line, self._line = self._line, b""
            if not line.endswith(b"\r\n"):
                raise _refused("a chunk's line does not end in CRLF")
            self._take_line(line[:-2])

    def _take_line(self, text: bytes) -> None:
        if self._ends_chunk or self._is_last:
            if text:
                raise _refused("a chunk is longer than its size, or a trailer follows the last")
            self.is_complete, self._ends_chunk = self._is_last, False
            return
        match = _CHUNK_LINE.fullmatch(text)
        if match is None:
            raise _refused("a chunk's size must be one to eight hexadecimal digits")
        self._left = int(match[1], 16)
        self._is_last = self._left == 0
        self._ends_chunk = not self._is_last


def _refused(hint: str) -> BodyRefused:
    return BodyRefused(Refusal("bad_request", hint))
