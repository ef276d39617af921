"""A destination inside this process: what the allowed names lead to while the sandbox is probed. D5

Names are answered and connections are led here by the gateway's constructor ports; the gateway itself,
its decisions and the container's way to it are the real ones. Nothing outside this machine is contacted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import os
import secrets
import socket
import ssl
from ipaddress import ip_address

from sandbox.policy.hosts import is_ip_literal

PUBLIC_ADDRESS = "93.184.216.34"
"""What every name resolves to: an address that may be dialled, and that is not."""
READ_BYTES = 65536
TLS_RECORD = 0x16
VALID = datetime.timedelta(hours=1)
SECRET_FIELD = "X-Selftest"  # noqa: S105  # a header's name
LENGTH_FIELD = "X-Selftest-Length"
"""A client's wish for a long answer, in bytes."""
LONGEST_ANSWER = 16 * 1024 * 1024
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Origin:
    """An HTTP/1.1 server on loopback, TLS or plain by the first byte, that answers with its secret."""

    def __init__(self, names: frozenset[str]) -> None:
        """Take the names that its certificate is for."""
        self.secret = secrets.token_hex(16)
        """Who has seen this has got through."""
        self.end = secrets.token_hex(16)
        """Who has seen this has had the whole answer."""
        self.certificate_pem, self._context = _server_context(names)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._vetted: dict[int, str] = {}
        self.answers: dict[str, str] = {}
        """Addresses that names have for a while; all others have the public one."""

    async def start(self) -> None:
        """Listen on a port of the kernel's choice, loopback only."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def resolve(self, host: str) -> list[str]:
        """Answer for every name. The Resolver port."""
        return [self.answers.get(host, PUBLIC_ADDRESS)]

    def close(self) -> None:
        """Release nothing: a gateway closes its resolver, and there may be two gateways."""

    async def connect(self, address: str, port: int) -> socket.socket:
        """Connect here, whatever was vetted. The Dialer port."""
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        self._vetted[connection.fileno()] = address
        return connection

    def peer_address(self, connection: socket.socket) -> str:
        """Return the address that was vetted: this stands in for it."""
        return self._vetted[connection.fileno()]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            first = await reader.read(READ_BYTES)
            if first[:1] == bytes((TLS_RECORD,)):
                await self._serve_tls(first, reader, writer)
            elif first:
                while b"\r\n\r\n" not in first and (more := await reader.read(READ_BYTES)):
                    first += more
                writer.write(self._answer(first))
                await writer.drain()
        writer.close()

    async def _serve_tls(
        self, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_side=True)
        request, is_shaken = b"", False
        while data and b"\r\n\r\n" not in request:
            incoming.write(data)
            try:
                if not is_shaken:
                    tls.do_handshake()
                    is_shaken = True
                request += tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                pass
            if b"\r\n\r\n" in request:
                tls.write(self._answer(request))
            writer.write(outgoing.read())
            await writer.drain()
            if b"\r\n\r\n" not in request:
                data = await reader.read(READ_BYTES)

    def _answer(self, request: bytes) -> bytes:
        """Answer with the secret in the head and again at the end, and with what was asked for."""
        head = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
        # A digest, since the gateway takes a credential out of what comes back.
        seen = [f"{name}={fingerprint(value)}" for name, value in fields.items()]
        body = "\n".join([*seen, *head]).encode("latin-1")
        if asked := fields.get(LENGTH_FIELD.lower(), ""):
            body = body.ljust(min(int(asked), LONGEST_ANSWER) if asked.isdecimal() else 0, b".")
        body += f"\n{self.secret}\n{self.end}".encode()
        if key := fields.get("sec-websocket-key"):
            lines = [
                "HTTP/1.1 101 Switching Protocols",
                "Upgrade: websocket",
                "Connection: Upgrade",
                f"Sec-WebSocket-Accept: {websocket_accept(key)}",
            ]
        else:
            lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close"]
        lines.append(f"{SECRET_FIELD}: {self.secret}")
        answer = "\r\n".join([*lines, "", ""]).encode()
        return answer if request.startswith(b"HEAD ") else answer + body


def fingerprint(value: str) -> str:
    """Return what the origin says of a header's value that it was sent."""
    return hashlib.sha256(value.encode("latin-1", "replace")).hexdigest()


def websocket_accept(key: str) -> str:
    """Return a server's answer to a client's key (RFC 6455)."""
    return base64.b64encode(hashlib.sha1(f"{key}{WEBSOCKET_GUID}".encode()).digest()).decode()  # noqa: S324


def _server_context(names: frozenset[str]) -> tuple[bytes, ssl.SSLContext]:
    """Make a certificate that signs itself, for all names, and a context that shows it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent-runner selftest")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [
        x509.IPAddress(ip_address(name)) if is_ip_literal(name) else x509.DNSName(name)
        for name in sorted(names)
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - VALID)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # load_cert_chain reads files only; this one is in memory and gone at once.
    with os.fdopen(os.memfd_create("selftest-origin"), "wb") as file:
        file.write(private + pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return pem, context
