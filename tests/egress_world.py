"""A small internet for the gateway: origins on loopback with real TLS, a resolver stub, raw clients.

Loopback stands in for public addresses at one place only: ``LoopbackDialer`` connects to an origin
whatever address the gateway vetted, and remembers which one that was. Everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.egress.credentials import resolve_credentials
from sandbox.egress.gateway import Gateway, GatewayLimits
from sandbox.events import EgressConnection
from sandbox.policy.model import NetworkPolicy

PUBLIC = "93.184.216.34"
QUICK = GatewayLimits(
    head_seconds=0.5, hello_seconds=0.5, resolve_seconds=2.0, dial_seconds=2.0, idle_seconds=20.0
)
REAL = "ghp-real-token-0123456789"  # what a case calls <real>
NAMES = (
    "docs.internal.net",
    "api.example.com",
    "packages.test",
    "*.packages.test",
    "*.example.com",
    "evil.com",
)


def network(allow: list[Any] | None = None, deny: list[str] | None = None, **options: Any) -> NetworkPolicy:
    """Build a network policy as the loader would: a string is an entry with only a host."""
    entries = [{"host": entry} if isinstance(entry, str) else entry for entry in allow or []]
    document = {"allowlist": entries, "denylist": deny or [], **options}
    return NetworkPolicy.model_validate_json(json.dumps(document))


class StubResolver:
    """Answers from a table, a public address by default, and remembers every question."""

    def __init__(self, answers: dict[str, list[str]] | None = None) -> None:
        self.answers = answers or {}
        self.queries: list[str] = []

    async def resolve(self, host: str) -> list[str]:
        self.queries.append(host)
        return self.answers.get(host, [PUBLIC])

    def close(self) -> None:
        pass


class LoopbackDialer:
    """Connects to the origin of the port asked for, and remembers the vetted address."""

    def __init__(self, ports: dict[int, int], peer: str | None = None) -> None:
        self.dials: list[tuple[str, int]] = []
        self.unreachable: set[str] = set()
        self.ports = ports
        self.peer = peer

    async def connect(self, address: str, port: int) -> socket.socket:
        self.dials.append((address, port))
        if address in self.unreachable:
            raise ConnectionRefusedError(address)
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.ports[port]))
        return connection

    def peer_address(self, connection: socket.socket) -> str:
        return self.peer or self.dials[-1][0]


class Origin:
    """An HTTP server on loopback, with or without TLS, that keeps every raw byte it was sent."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.received = bytearray()
        """Every byte off the wire."""
        self.plaintext = bytearray()
        """The same with TLS opened."""
        self.connections = 0
        self.requests: list[bytes] = []
        self.response = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
        self.is_closing = False
        """Close each TLS connection behind its first answer."""
        self.port = 0
        self.open_connections = 0
        self.answers_early = False
        """Answer at the first bytes of a request."""
        self.has_spoken = False
        self._speaking: Callable[[bytes], None] | None = None
        self._context = context
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    def say(self, data: bytes) -> None:
        """Send something nobody asked for on the latest TLS connection."""
        assert self._speaking is not None
        self._speaking(data)
        self.has_spoken = True

    def change_tls(self, context: ssl.SSLContext) -> None:
        """Use another certificate from the next connection on."""
        self._context = context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        self.connections += 1
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_side=True) if self._context else None
        text, is_shaken, known = b"", False, len(self.requests)

        def speak(data: bytes) -> None:
            assert tls is not None
            tls.write(data)
            writer.write(outgoing.read())

        self._speaking = speak
        try:
            while data := await reader.read(65536):
                self.received += data
                if tls is None:
                    self.plaintext += data
                    text += data
                else:
                    incoming.write(data)
                    try:
                        if not is_shaken:
                            tls.do_handshake()
                            is_shaken = True
                        while piece := tls.read(65536):
                            self.plaintext += piece
                            text += piece
                    except ssl.SSLWantReadError:
                        pass
                if _has_whole_request(text) or (self.answers_early and text):
                    self.requests.append(text)
                    text = b""
                    if tls is None:
                        writer.write(self.response)
                    else:
                        tls.write(self.response)
                writer.write(outgoing.read())
                await writer.drain()
                if tls is None and self.requests and b"Connection: close" in self.requests[-1]:
                    break
                if tls is not None and self.is_closing and len(self.requests) > known:
                    break
        except (OSError, ssl.SSLError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()


class Client:
    """A client's end of the gateway's socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def receive(self, limit: int = 65536) -> bytes:
        """Return what is there, empty at the end, also when the gateway has cut the connection."""
        if self._buffer:
            data, self._buffer = self._buffer[:limit], self._buffer[limit:]
            return data
        try:
            async with asyncio.timeout(10):
                return await asyncio.get_running_loop().sock_recv(self.connection, limit)
        except ConnectionResetError:
            return b""

    async def receive_all(self) -> bytes:
        data = b""
        while piece := await self.receive():
            data += piece
        return data

    async def answer(self) -> Answer:
        """Read one response of the gateway or an origin: head, and a body of known length."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await self.receive()
            if not piece:
                return Answer(0, {}, data)
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
        length = int(headers.get("content-length", 0))
        while len(body) < length:
            piece = await self.receive()
            if not piece:
                break
            body += piece
        self._buffer, body = body[length:], body[:length]
        return Answer(int(line.split()[1]), headers, body)

    async def connect(self, target: str) -> Answer:
        await self.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        return await self.answer()

    def close(self) -> None:
        self.connection.close()


@dataclass(frozen=True)
class Answer:
    """A response as the client reads it; status 0 when the connection was just closed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def reason(self) -> str:
        """The gateway's reason word; ``ok`` for a success."""
        return "ok" if self.status == 200 else self.headers.get("x-proxy-error", "closed")


class TlsClient:
    """A real TLS client whose bytes the test carries, so that it can bend the first ones."""

    def __init__(
        self,
        client: Client,
        sni: str | None,
        alpn: list[str] | None = None,
        trust: str | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        context = context or ssl.create_default_context(cadata=trust or authority_pem())
        context.check_hostname = sni is not None
        context.verify_mode = ssl.CERT_REQUIRED
        if alpn:
            context.set_alpn_protocols(alpn)
        self._client = client
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=sni)

    def hello(self) -> bytes:
        """Return the ClientHello, to be sent by the test."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    async def shake(self) -> None:
        """Finish the handshake."""
        await self._until(self._tls.do_handshake)

    async def write(self, data: bytes) -> None:
        self._tls.write(data)
        await self._flush()

    async def read(self, limit: int = 65536) -> bytes:
        """Return the next piece, empty after a goodbye; a cut raises ConnectionResetError."""
        return await self._until(lambda: self._tls.read(limit))

    async def say_goodbye(self) -> None:
        """End TLS in good order."""
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()

    def hear(self, data: bytes) -> None:
        """Take bytes as if they had come from the other side. Raises ssl.SSLError for what is none of its."""
        self._incoming.write(data)
        self._tls.read(1)

    def parting(self) -> bytes:
        """Return what TLS still has to say, an alert after a failed handshake."""
        return self._outgoing.read()

    @property
    def session(self) -> ssl.SSLObject:
        return self._tls

    async def get(self, host: str) -> bytes:
        """Finish the handshake, make one request, return the first piece of the answer."""
        await self._until(self._tls.do_handshake)
        self._tls.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return await self._until(lambda: self._tls.read(65536))

    async def _until(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._client.receive()
                if not data:
                    raise ConnectionResetError("closed during TLS") from None
                self._incoming.write(data)
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._client.send(data)


class Inner(Client):
    """A client's end of an opened tunnel: what it sends and receives is inside TLS."""

    def __init__(self, client: Client, tls: TlsClient) -> None:
        super().__init__(client.connection)
        self.tls = tls

    async def send(self, data: bytes) -> None:
        await self.tls.write(data)

    async def receive(self, limit: int = 65536) -> bytes:
        if self._buffer:
            data, self._buffer = self._buffer[:limit], self._buffer[limit:]
            return data
        try:
            return await self.tls.read(limit)
        except (OSError, ssl.SSLError):
            return b""


@dataclass
class World:
    """A running gateway and everything around it."""

    gateway: Gateway
    path: Path
    resolver: StubResolver
    dialer: LoopbackDialer
    tls_origin: Origin
    plain_origin: Origin
    events: list[EgressConnection]
    recorded: asyncio.Event
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        directory = os.open(self.path.parent, os.O_PATH)
        try:
            await asyncio.get_running_loop().sock_connect(
                connection, f"/proc/self/fd/{directory}/{self.path.name}"
            )
        finally:
            os.close(directory)
        client = Client(connection)
        self.clients.append(client)
        return client

    async def raw(self, data: bytes) -> Answer:
        client = await self.client()
        await client.send(data)
        return await client.answer()

    async def connect(self, target: str) -> Answer:
        return await (await self.client()).connect(target)

    async def inner(self, target: str, sni: str | None = None, **options: Any) -> Inner:
        """Return a client that trusts the session's authority, inside a tunnel with TLS up."""
        client = await self.client()
        answer = await client.connect(target)
        assert answer.status == 200, answer
        trust = (self.gateway.authority_pem or b"").decode()
        tls = TlsClient(client, sni or target.rpartition(":")[0], trust=trust, **options)
        await client.send(tls.hello())
        await tls.shake()
        return Inner(client, tls)

    def denials(self) -> list[str]:
        """Return the reasons of all refusals recorded so far."""
        return [event.reason for event in self.events if event.verdict == "deny"]

    async def closed(self, count: int = 1) -> list[EgressConnection]:
        """Wait until so many close events are recorded; return them."""
        async with asyncio.timeout(10):
            while len(found := [event for event in self.events if event.phase == "close"]) < count:
                self.recorded.clear()
                await self.recorded.wait()
        return found


@asynccontextmanager
async def world(
    policy: NetworkPolicy,
    directory: Path,
    *,
    answers: dict[str, list[str]] | None = None,
    peer: str | None = None,
    record: Callable[[EgressConnection], None] | None = None,
    origin_tls: ssl.SSLContext | None = None,
    environ: dict[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[World]:
    """Run a gateway under a policy, with one TLS and one plain origin behind every name."""
    tls_origin, plain_origin = Origin(origin_tls or server_context()), Origin()
    await tls_origin.start()
    await plain_origin.start()
    events: list[EgressConnection] = []
    recorded = asyncio.Event()

    def keep(event: EgressConnection) -> None:
        if record is not None:
            record(event)
        events.append(event)
        recorded.set()

    resolver = StubResolver(answers)
    dialer = LoopbackDialer({443: tls_origin.port, 80: plain_origin.port}, peer)
    options = {
        "own_addresses": frozenset(),
        "limits": QUICK,
        "upstream_roots": authority_pem().encode(),
        "credentials": resolve_credentials(policy, environ or {}),
        **options,
    }
    path = directory / "proxy.sock"
    gateway = Gateway(policy, path, keep, resolver=resolver, dialer=dialer, **options)
    await gateway.start()
    here = World(gateway, path, resolver, dialer, tls_origin, plain_origin, events, recorded)
    try:
        yield here
    finally:
        for client in here.clients:
            client.close()
        await gateway.stop()
        await tls_origin.stop()
        await plain_origin.stop()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what no event announces: a state of the kernel or of a log."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def client_hello(sni: str | None = "api.example.com", alpn: list[str] | None = None) -> bytes:
    """Return a real ClientHello as OpenSSL writes it."""
    return TlsClient(Client(socket.socket()), sni, alpn).hello()


def extension(kind: int, body: bytes) -> bytes:
    return kind.to_bytes(2) + len(body).to_bytes(2) + body


def server_name(*names: bytes) -> bytes:
    """Return a server_name extension with these names in one list."""
    listed = b"".join(b"\x00" + len(name).to_bytes(2) + name for name in names)
    return extension(0, len(listed).to_bytes(2) + listed)


def with_extensions(hello: bytes, *added: bytes) -> bytes:
    """Add extensions to a ClientHello of one record, lengths adjusted."""
    body = bytearray(hello[9:])
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    extensions = bytes(body[at + 2 :]) + b"".join(added)
    body[at:] = len(extensions).to_bytes(2) + extensions
    message = b"\x01" + len(body).to_bytes(3) + bytes(body)
    return in_records(message, 16384)


def in_records(message: bytes, size: int) -> bytes:
    """Cut a handshake message into records of so many bytes."""
    pieces = (message[at : at + size] for at in range(0, len(message), size))
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces)


def _has_whole_request(text: bytes) -> bool:
    head, end, body = text.partition(b"\r\n\r\n")
    if not end:
        return False
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(body) >= (lengths[0] if lengths else 0)


@cache
def _authority() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    return key, _certificate(name, name, key, key, x509.BasicConstraints(ca=True, path_length=0))


def authority_pem() -> str:
    return _authority()[1].public_bytes(serialization.Encoding.PEM).decode()


@cache
def server_context(*hosts: str, is_self_signed: bool = False, is_old: bool = False) -> ssl.SSLContext:
    """Return an origin's TLS, its certificate by the test authority; with ``is_old`` TLS 1.0 only."""
    ca_key, ca = _authority()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "origin")])
    names = x509.SubjectAlternativeName([x509.DNSName(one) for one in hosts or NAMES])
    if is_self_signed:
        leaf = _certificate(name, name, key, key, names)
    else:
        leaf = _certificate(name, ca.subject, key, ca_key, names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if is_old:
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    # load_cert_chain reads files only.
    directory = os.memfd_create("certificate")
    with os.fdopen(directory, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + leaf.public_bytes(serialization.Encoding.PEM)
        )
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{directory}")
    return context


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extra: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(extra, critical=isinstance(extra, x509.BasicConstraints))
        # Python 3.13 verifies strictly: RFC 5280 wants both identifiers, and a CA's key usage.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(_usage(is_authority=isinstance(extra, x509.BasicConstraints)), critical=True)
        .sign(signer, hashes.SHA256())
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
