"""Read a server's answer, and frame it anew for the client. Pure: bytes in, bytes out. D5

Interim answers (1xx) and trailers are dropped. Nothing behind an answer's end belongs to anybody.
"""

from __future__ import annotations

import base64
import hashlib
import re

import httptools

from sandbox.egress.leaks import Redactor
from sandbox.egress.request import Field, RequestHead

_NAME = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
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


class Response:
    """Collects what llhttp makes of the upstream's bytes."""

    def __init__(self, *, is_head: bool, websocket_key: bytes | None = None) -> None:
        self.fields: list[Field] = []
        self.status = 0
        self.phrase = b""
        self.has_head = False
        """The final answer's head is here."""
        self.is_complete = False
        self.is_switched = False
        """The server agreed to a websocket; ``behind`` begins it."""
        self.has_surplus = False
        """Bytes came behind the answer."""
        self.keeps_alive = False
        self.pieces: list[bytes] = []
        self.behind = b""
        self._is_head = is_head
        self._websocket_key = websocket_key
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises ValueError when they are not one well-formed answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            if not self.is_switched:
                raise ValueError("the server switches protocols, which was not asked for") from exc
            self.behind += data[exc.args[0] :]
        except httptools.HttpParserError as exc:
            if not self.is_complete:
                raise ValueError(f"llhttp refuses the answer: {exc}") from exc
            self.has_surplus = True

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a field, lower-case name given."""
        return [value for field, value in self.fields if field.lower() == name]

    def tokens(self, name: bytes) -> set[bytes]:
        """Return the lower-case members of a comma-separated field."""
        return {part.strip(b" \t") for part in b",".join(self.values(name)).lower().split(b",")} - {b""}

    @property
    def is_readable(self) -> bool:
        """True when the body is not compressed: what it holds can be seen."""
        return not self.tokens(b"content-encoding") - {b"identity"}

    @property
    def is_cut_short(self) -> bool:
        """True when the upstream is at its end and the answer is not."""
        return not self.is_complete and bool(
            self.values(b"content-length") or self.values(b"transfer-encoding")
        )

    def on_message_begin(self) -> None:
        """Called by the parser; again for each answer after an interim one."""
        if self.is_complete:
            self.has_surplus = True
        else:
            self.fields, self.phrase = [], b""

    def on_status(self, phrase: bytes) -> None:
        """Called by the parser."""
        if not self.has_head:
            self.phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if self.has_head:
            return  # a trailer, or behind the end
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise ValueError("a header field of the answer is malformed")
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self.has_head:
            return
        self.status = self._parser.get_status_code()
        if self.status == 101:
            self._check_switch()
            self.is_switched = self.has_head = self.is_complete = True
            return
        self.has_head = self.status >= 200
        if not self.has_head:
            return
        # What is neither chunked nor identity would reach the client coded, and its name dropped.
        if self.tokens(b"transfer-encoding") - {b"chunked"} or len(self.values(b"transfer-encoding")) > 1:
            raise ValueError("the answer has a transfer coding other than chunked")
        self.keeps_alive = self._parser.should_keep_alive()
        self.is_complete = self._is_head

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self.is_complete:
            self.has_surplus = True
        else:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_complete = self.is_complete or self.has_head

    def _check_switch(self) -> None:
        key = self._websocket_key
        if key is None:
            raise ValueError("the server switches protocols, which was not asked for")
        # The proof that it read this very request, and not an answer kept for somebody else.
        proof = base64.b64encode(hashlib.sha1(key + _WEBSOCKET_GUID, usedforsecurity=False).digest())
        if (
            self.tokens(b"upgrade") != {b"websocket"}
            or b"upgrade" not in self.tokens(b"connection")
            or self.values(b"sec-websocket-accept") != [proof]
        ):
            raise ValueError("the server's answer does not prove that it speaks this websocket")


def client_head(
    response: Response, head: RequestHead, redactor: Redactor, *, keeps_client: bool
) -> tuple[bytes, bool]:
    """Return the head for the client, and whether the body that follows goes out in chunks."""
    is_chunked, fields = _client_framing(response, head)
    if response.is_switched:
        fields += [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
    else:
        fields.append((b"Connection", b"keep-alive" if keeps_client else b"close"))
    phrase = re.sub(rb"[^ -~]", b"", redactor.clean(response.phrase))
    cleaned = [(redactor.clean(name), redactor.clean(value)) for name, value in fields]
    return head_bytes(b"HTTP/1.1 %d %s" % (response.status, phrase), cleaned), is_chunked


def is_delimited(response: Response, head: RequestHead) -> bool:
    """Tell whether the client sees where the answer ends without the connection being closed."""
    return (
        head.minor == 1
        or head.method == "HEAD"
        or response.status in (204, 304)
        or bool(response.values(b"content-length"))
    )


def head_bytes(line: bytes, fields: list[Field]) -> bytes:
    """Write a start line and fields, blank line included."""
    return line + b"\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in fields) + b"\r\n"


def _client_framing(response: Response, head: RequestHead) -> tuple[bool, list[Field]]:
    dropped = _NOT_RETURNED | response.tokens(b"connection")
    fields = [field for field in response.fields if field[0].lower() not in dropped]
    lengths = [(b"Content-Length", length) for length in response.values(b"content-length")[:1]]
    if response.is_switched:
        return False, fields
    if lengths or head.method == "HEAD" or response.status in (204, 304):
        return False, fields + lengths
    if head.minor == 1:
        return True, [*fields, (b"Transfer-Encoding", b"chunked")]
    return False, fields
