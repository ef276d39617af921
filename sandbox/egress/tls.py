"""Read the server name of a ClientHello, and refuse what hides or doubles it. Pure. D5

Reassembles the handshake message over any number of records: a hello cut into small records is how
naive readers are passed by.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.policy.hosts import Refusal, canonical_host, is_ip_literal

MAX_HELLO_BYTES = 16 * 1024

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_ALPN = 16
# Encrypted ClientHello (RFC 9849) and its predecessor: the true name could not be seen.
_HIDDEN_NAME = frozenset({0xFE0D, 0xFFCE})
# A hello in records of one byte each, six bytes on the wire for one of the message.
_MAX_RECEIVED = 6 * MAX_HELLO_BYTES
_NOT_TLS = Refusal("tls_required", "only TLS may pass; the first bytes must be a ClientHello")
_MALFORMED = Refusal("tls_malformed", "the first message is not one well-formed TLS ClientHello")


@dataclass(frozen=True)
class ClientHello:
    """What the gate needs to know of a ClientHello."""

    server_name: bytes | None
    """Exactly as sent; None when there is no server_name extension."""
    hides_name: bool
    """An ECH extension is present, GREASE included: the two cannot be told apart."""
    protocols: tuple[bytes, ...] | None = None
    """What the client would speak (ALPN), best first; None when it does not say."""


class HelloReader:
    """Collects a client's first bytes until they hold a whole ClientHello. Every byte is looked at once."""

    def __init__(self) -> None:
        self.received = bytearray()
        """All bytes so far, to be sent on unchanged once the hello is accepted."""
        self._position = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> ClientHello | Refusal | None:
        """Take more bytes; return the hello, a refusal, or None while more bytes are needed."""
        self.received += data
        if len(self.received) > _MAX_RECEIVED:
            return _MALFORMED
        while self._position < len(self.received):
            header = bytes(self.received[self._position : self._position + 5])
            if header[0] != _HANDSHAKE or header[1:2] not in (b"", b"\x03"):
                # Only the very first record tells another protocol from a broken hello.
                return _MALFORMED if self._message else _NOT_TLS
            end = self._position + 5 + int.from_bytes(header[3:5])
            if len(header) < 5 or end > len(self.received):
                break
            self._message += self.received[self._position + 5 : end]
            self._position = end
            if (parsed := self._take_message()) is not None:
                return parsed
        return None

    def _take_message(self) -> ClientHello | Refusal | None:
        message = self._message
        if not message or message[0] != _CLIENT_HELLO:
            return _MALFORMED
        if len(message) < 4:
            return None
        size = 4 + int.from_bytes(message[1:4])
        if size > MAX_HELLO_BYTES or len(message) > size:
            return _MALFORMED
        return _parse_hello(bytes(message[4:])) if len(message) == size else None


def judge_hello(hello: ClientHello, host: str, *, is_opened: bool = False) -> Refusal | None:
    """Return why a hello may not go to a canonical host, or None when it may.

    A literal address cannot be a server name (RFC 6066), so for a listed address none is expected. Where
    TLS is opened (``is_opened``), a hidden name stays hidden from nobody: this gateway answers for the
    visible one, and a client that meant another gives up.
    """
    if is_opened and hello.protocols is not None and b"http/1.1" not in hello.protocols:
        return Refusal("alpn", f"only http/1.1 can be judged; set inspect: false for {host} to speak another")
    if hello.hides_name and not is_opened:
        return Refusal("ech_refused", "the hello carries ECH; turn it off in the client")
    if hello.server_name is None:
        if is_ip_literal(host):
            return None
        return Refusal("sni_missing", f"the hello names no server; it must name {host}")
    name = canonical_host(hello.server_name)
    if isinstance(name, Refusal):
        return _MALFORMED
    if name != host:
        return Refusal("sni_mismatch", f"the hello names another server than {host}")
    return None


class _Reader:
    """Takes length-prefixed vectors off a buffer; a short one raises ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        if len(self.data) < count:
            raise ValueError("short")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))


def _parse_hello(body: bytes) -> ClientHello | Refusal:
    try:
        reader = _Reader(body)
        reader.take(2 + 32)
        session, suites, compressions = reader.vector(1), reader.vector(2), reader.vector(1)
        if len(session) > 32 or not suites or len(suites) % 2 or not compressions:
            return _MALFORMED
        extensions: dict[int, bytes] = {}
        if reader.data:
            block = _Reader(reader.vector(2))
            while block.data:
                kind = block.number(2)
                if kind in extensions:
                    return _MALFORMED
                extensions[kind] = block.vector(2)
        if reader.data:
            return _MALFORMED
        name = _server_name(extensions[_SERVER_NAME]) if _SERVER_NAME in extensions else None
        protocols = _protocols(extensions[_ALPN]) if _ALPN in extensions else None
    except ValueError:
        return _MALFORMED
    return ClientHello(name, hides_name=not _HIDDEN_NAME.isdisjoint(extensions), protocols=protocols)


def _protocols(extension: bytes) -> tuple[bytes, ...]:
    outer = _Reader(extension)
    names = _Reader(outer.vector(2))
    found = []
    while names.data:
        found.append(names.vector(1))
    if outer.data or not all(found):
        raise ValueError("not a list of protocol names")
    return tuple(found)


def _server_name(extension: bytes) -> bytes:
    outer = _Reader(extension)
    names = _Reader(outer.vector(2))
    kind, name = names.number(1), names.vector(2)
    # One name of the only type there is: a list is two names to two readers.
    if kind != 0 or not name or names.data or outer.data:
        raise ValueError("not one host name")
    return name
