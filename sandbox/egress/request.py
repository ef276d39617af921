"""Read one request head off the wire by a grammar stricter than HTTP's. Pure: bytes in, value out. D5

Whatever two parsers could read differently is refused: bare CR or LF, folded lines, repeated framing,
a second Host, surplus blanks. What passes means the same to this gateway and to any server behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sandbox.policy.hosts import Authority, Refusal, parse_authority

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 8 * 1024
MAX_FIELDS = 100

_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
_FIELD_NAME = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_FIELD_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
_ROUTING = frozenset({b"host", b"content-length", b"transfer-encoding"})
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"expect",
    }
)
# Ways to ask a server for another method or path than the one that was judged.
_OVERRIDES = frozenset(
    {b"x-http-method-override", b"x-method-override", b"x-http-method", b"x-original-url", b"x-rewrite-url"}
)

Field = tuple[bytes, bytes]


@dataclass(frozen=True)
class RequestHead:
    """One request head that passed the gate."""

    raw: bytes
    """The exact bytes, blank line included."""
    method: str
    target: bytes
    """As sent: visible ASCII, no blanks."""
    minor: Literal[0, 1]
    """HTTP/1.0 or HTTP/1.1."""
    fields: tuple[Field, ...]
    """Names as sent, values without the blanks around them."""
    content_length: int | None
    is_chunked: bool

    def values(self, name: bytes) -> tuple[bytes, ...]:
        """Return the values of a field, lower-case name given."""
        return tuple(value for field, value in self.fields if field.lower() == name)

    def tokens(self, name: bytes) -> frozenset[bytes]:
        """Return the lower-case members of a comma-separated field."""
        parts = b",".join(self.values(name)).lower().split(b",")
        return frozenset(part.strip(b" \t") for part in parts) - {b""}

    @property
    def has_body(self) -> bool:
        """True when framing was declared, a length of zero included."""
        return self.is_chunked or self.content_length is not None


@dataclass(frozen=True)
class ForwardTarget:
    """What an absolute-form request asks for."""

    authority: Authority
    path: bytes
    """Origin form, query included, as sent."""


def find_head_end(buffer: bytes | bytearray) -> int | Refusal | None:
    """Return the length of the first head in a buffer, None while it is incomplete, or why it is refused.

    Refuses as soon as the first byte shows another protocol (SOCKS, TLS, blank lines), so that such a
    client gets an answer and not a timeout.
    """
    if buffer and not 0x41 <= buffer[0] <= 0x5A:
        return Refusal("bad_request", "this is an HTTP proxy: send CONNECT name:port HTTP/1.1")
    line_end = buffer.find(b"\r\n", 0, MAX_LINE_BYTES)
    if line_end < 0 and len(buffer) >= MAX_LINE_BYTES:
        return Refusal("header_too_large", f"the request line is longer than {MAX_LINE_BYTES} bytes")
    end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    if end < 0 and len(buffer) >= MAX_HEAD_BYTES:
        return Refusal("header_too_large", f"the request head is longer than {MAX_HEAD_BYTES} bytes")
    return None if end < 0 else end + 4


def parse_head(raw: bytes) -> RequestHead | Refusal:
    """Parse one complete head, blank line included."""
    line, *lines = raw[:-4].split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        return Refusal("bad_request", "the request line must be METHOD SP target SP HTTP/1.1")
    if len(lines) > MAX_FIELDS:
        return Refusal("header_too_large", f"more than {MAX_FIELDS} header fields")
    fields = []
    for text in lines:
        name, colon, value = text.partition(b":")
        # A bare CR or LF, a fold or a blank before the colon ends up in one of these two.
        if not (colon and _FIELD_NAME.fullmatch(name) and _FIELD_VALUE.fullmatch(value)):
            return Refusal("bad_request", "a header field is malformed")
        # Servers behind CGI read Content_Length as Content-Length: two framings in one head.
        if b"_" in name and name.lower().replace(b"_", b"-") in _ROUTING | _HOP_BY_HOP | _OVERRIDES:
            return Refusal("bad_request", f"the header name {name.decode()!r} imitates another")
        fields.append((name, value.strip(b" \t")))
    minor: Literal[0, 1] = 1 if match[3] == b"1" else 0
    head = RequestHead(raw, match[1].decode(), match[2], minor, tuple(fields), None, False)
    return _with_framing(head)


def parse_connect(head: RequestHead) -> Authority | Refusal:
    """Return where a CONNECT wants to go."""
    if head.has_body:
        return Refusal("bad_request", "CONNECT has no body")
    return parse_authority(head.target)


def parse_forward(head: RequestHead) -> ForwardTarget | Refusal:
    """Return what an absolute-form ``http://`` request asks for."""
    scheme, separator, rest = head.target.partition(b"://")
    if not separator or scheme.lower() != b"http":
        return Refusal(
            "bad_request", "send CONNECT name:port for TLS, or GET http://name/path for plain HTTP"
        )
    end = next((at for at, byte in enumerate(rest) if byte in b"/?#"), len(rest))
    path = rest[end:]
    # A backslash or ``@`` in the authority is refused with it: parsers disagree on where the host is then.
    target = parse_authority(rest[:end], default_port=80)
    if isinstance(target, Refusal):
        return target
    if b"#" in path:
        return Refusal("bad_request", "a request target has no fragment")
    return ForwardTarget(target, path if path[:1] == b"/" else b"/" + path)


def parse_inner(head: RequestHead, tunnel: Authority) -> bytes | Refusal:
    """Return the path that a request inside a TLS tunnel asks for: origin form, query included, as sent.

    An absolute target is taken when it names the tunnel's own end; RFC 9112 has servers accept it.
    """
    target = head.target
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.lower() in (b"https", b"http"):
        name, slash, path = rest.partition(b"/")
        authority = parse_authority(name, default_port=443 if scheme.lower() == b"https" else 80)
        if isinstance(authority, Refusal):
            return authority
        if authority != tunnel or scheme.lower() != b"https":
            return Refusal("host_mismatch", "the request target names another place than the tunnel")
        target = slash + path or b"/"
    if head.method == "CONNECT" or not target.startswith(b"/"):
        return Refusal("bad_request", "the target of a request inside a tunnel is a path: GET /path HTTP/1.1")
    if b"#" in target:
        return Refusal("bad_request", "a request target has no fragment")
    return target


def websocket_key(head: RequestHead) -> bytes | Refusal | None:
    """Return the key of a well-formed websocket request, None when no upgrade is asked, else why not."""
    asked = head.tokens(b"upgrade")
    if not asked:
        return None
    keys = head.values(b"sec-websocket-key")
    if not (
        asked == {b"websocket"}
        and b"upgrade" in head.tokens(b"connection")
        and (head.method, head.minor, head.has_body) == ("GET", 1, False)
        and head.values(b"sec-websocket-version") == (b"13",)
        and len(keys) == 1
        and _WEBSOCKET_KEY.fullmatch(keys[0])
    ):
        return Refusal("upgrade", "requests after a protocol switch could not be judged; use plain requests")
    return keys[0]


def check_host(head: RequestHead, target: Authority, default_port: int) -> Refusal | None:
    """Return why the Host field does not name the target, or None. The target decides, not Host."""
    for value in head.values(b"host"):
        host = parse_authority(value, default_port=default_port)
        if isinstance(host, Refusal):
            return host
        if host != target:
            return Refusal("host_mismatch", "the Host field names another place than the request target")
    return None


def check_upgrade(head: RequestHead) -> Refusal | None:
    """Return why an upgrade is refused, or None. An offer of h2c is dropped: clients go on without."""
    if head.tokens(b"upgrade") - {b"h2c"}:
        return Refusal("upgrade", "requests after a protocol switch could not be judged; use plain requests")
    return None


def forwarded_fields(head: RequestHead) -> list[Field]:
    """Return the fields that go upstream: no hop-by-hop, nominated, framing or override field, no Host."""
    dropped = _HOP_BY_HOP | _OVERRIDES | _ROUTING | head.tokens(b"connection")
    return [field for field in head.fields if field[0].lower() not in dropped]


def _with_framing(head: RequestHead) -> RequestHead | Refusal:
    hosts, lengths, codings = (
        head.values(name) for name in (b"host", b"content-length", b"transfer-encoding")
    )
    if len(hosts) > 1 or (head.minor == 1 and not hosts):
        return Refusal("bad_request", "exactly one Host field is needed")
    if lengths and codings:
        return Refusal("bad_request", "Content-Length and Transfer-Encoding exclude each other")
    if lengths and not (len(lengths) == 1 and _LENGTH.fullmatch(lengths[0])):
        return Refusal("bad_request", "Content-Length must be one plain number")
    if codings and not (len(codings) == 1 and codings[0].lower() == b"chunked" and head.minor == 1):
        return Refusal("bad_request", "Transfer-Encoding must be chunked, once, on HTTP/1.1")
    if head.tokens(b"connection") & _ROUTING:
        return Refusal("bad_request", "Connection names a field that frames or routes the request")
    length = int(lengths[0]) if lengths else None
    return RequestHead(
        head.raw, head.method, head.target, head.minor, head.fields, length, is_chunked=bool(codings)
    )
