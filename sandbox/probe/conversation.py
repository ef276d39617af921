"""Talk to the egress gateway through a container: our bytes, on the container's way. D5

A probe program in the container connects to where a client would connect and to a socket of ours, and
carries bytes between the two. So TLS is spoken here, with a real library, whatever the image has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.container.spec import EGRESS_DIRECTORY, EGRESS_SOCKET, PROXY_PORT
from sandbox.errors import StateError
from sandbox.probe.model import Act, Seen, Talk
from sandbox.probe.origin import LENGTH_FIELD, Origin, fingerprint

DRIVER_NAME = "driver.sock"
TALK_SECONDS = 10.0
READ_BYTES = 65536
TLS_ALERT = b"\x15"
"""The type of the record that an alert before a handshake comes in."""
MOST_FILE_BYTES = 4 * 1024 * 1024


class Switchboard:
    """Listens beside a gateway for the probe programs of one container, and holds each one's conversation."""

    def __init__(self, directory: Path, origin: Origin) -> None:
        """Take the egress directory of the container, and who answers in the end."""
        self._directory = directory
        self._origin = origin
        self._server: asyncio.Server | None = None
        self._waiting: dict[str, tuple[Talk, bool]] = {}
        self._talks: set[asyncio.Task[None]] = set()
        self.seen: dict[str, Seen] = {}
        """What came of each conversation that took place, by probe."""
        self._files: dict[str, asyncio.Future[bytes]] = {}
        self.bundle = b""
        """The roots that clients in the container trust, as read there; empty: nobody."""

    async def start(self) -> None:
        """Listen. Raises StateError when the socket cannot be made."""
        path = self._directory / DRIVER_NAME
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Socket addresses end at 108 bytes; the directory may lie deeper than that.
                listener.bind(f"/proc/self/fd/{directory}/{DRIVER_NAME}")
            finally:
                os.close(directory)
            path.chmod(0o666)  # the sandbox has a uid of its own; the directory is the wall
            listener.listen(256)
        except OSError as exc:
            raise StateError(
                f"cannot open the self-test's socket {path}: {exc.strerror}; set AGENT_RUNNER_STATE"
            ) from exc
        self._server = await asyncio.start_unix_server(self._answer, sock=listener)

    async def stop(self) -> None:
        """Hang up; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._talks:
            task.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)
        (self._directory / DRIVER_NAME).unlink(missing_ok=True)

    def expect(self, name: str, talk: Talk, *, is_control: bool) -> Act:
        """Return what the container's program must do for a conversation."""
        self._waiting[name] = (talk, is_control)
        driver = f"{EGRESS_DIRECTORY}/{DRIVER_NAME}"
        if is_control:
            return Act("carry", (driver, name, "unix", EGRESS_SOCKET))
        if talk.way == "direct":
            return Act("carry", (driver, name, "tcp", talk.host, str(talk.port)))
        return Act("carry", (driver, name, "tcp", "127.0.0.1", str(PROXY_PORT)))

    def expect_file(self, name: str, path: str) -> Act:
        """Return what the container's program must do to show a file as it is seen inside."""
        self._files[name] = asyncio.get_running_loop().create_future()
        return Act("carry", (f"{EGRESS_DIRECTORY}/{DRIVER_NAME}", name, "file", path))

    async def wait_file(self, name: str) -> bytes:
        """Return what ``expect_file`` brought; empty when nothing came."""
        try:
            async with asyncio.timeout(TALK_SECONDS):
                return await self._files[name]
        except TimeoutError:
            return b""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            async with asyncio.timeout(TALK_SECONDS):
                name = (await reader.readline()).decode("ascii", "replace").strip()
                if name in self._files and not self._files[name].done():
                    content = b""
                    while len(content) < MOST_FILE_BYTES and (more := await reader.read(READ_BYTES)):
                        content += more
                    self._files[name].set_result(content)
                known = self._waiting.pop(name, None)
                if known is not None:
                    talk, is_control = known
                    self.seen[name] = await _talk(
                        reader, writer, talk, self._origin, self.bundle, is_control=is_control
                    )
        except TimeoutError:
            self.seen[name] = Seen("failed", "timeout")
        except OSError as exc:
            self.seen[name] = Seen("failed", type(exc).__name__)
        finally:
            with contextlib.suppress(OSError):
                writer.close()


async def _talk(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    talk: Talk,
    origin: Origin,
    bundle: bytes,
    *,
    is_control: bool,
) -> Seen:
    host = f"[{talk.host}]" if ":" in talk.host else talk.host
    authority = host if talk.port == 80 and talk.way == "plain" else f"{host}:{talk.port}"
    request = _request(talk, authority)
    if talk.way == "plain":
        absolute = f"{talk.method} http://{authority}{talk.path}".encode()
        writer.write(absolute + request[len(f"{talk.method} {talk.path}") :])
        return _judge(await _read_all(reader, talk, origin), talk, origin)
    if talk.way == "proxy" or is_control:
        writer.write(f"CONNECT {host}:{talk.port} HTTP/1.1\r\nHost: {host}:{talk.port}\r\n\r\n".encode())
        head = await _read_head(reader)
        if not head.startswith(b"HTTP/1.1 200"):
            return _judge(head, talk, origin)
    if not talk.is_tls:
        writer.write(request)
        return _judge(await _read_all(reader, talk, origin), talk, origin)
    context = _context(talk, origin, bundle)
    return await _tls(reader, writer, talk, request, origin, context)


def _request(talk: Talk, authority: str) -> bytes:
    fields = {"Host": authority, "Connection": "close"} | dict(talk.headers)
    if talk.answer_bytes:
        fields[LENGTH_FIELD] = str(talk.answer_bytes)
    lines = [f"{talk.method} {talk.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _context(talk: Talk, origin: Origin, bundle: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    match talk.trusts:
        case "anybody":
            # Whose certificate it is says nothing here: only the origin knows the secret.
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        case "bundle":
            if bundle:
                context.load_verify_locations(cadata=bundle.decode("ascii", "replace"))
        case "origin":
            context.load_verify_locations(cadata=origin.certificate_pem.decode("ascii"))
    if talk.alpn:
        context.set_alpn_protocols([talk.alpn])
    return context


async def _tls(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    talk: Talk,
    request: bytes,
    origin: Origin,
    context: ssl.SSLContext,
) -> Seen:
    name = talk.host if talk.server_name == "" else talk.server_name
    if name is not None and (":" in name or name.replace(".", "").isdigit()):
        name = None  # an address is no server name
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)

    has_alert = False

    async def until(step: Callable[[], Any]) -> Any:  # whatever the step returns
        nonlocal has_alert
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                data = await reader.read(READ_BYTES)
                if not data:
                    raise ConnectionResetError from None
                incoming.write(data)
                # Python's ssl has no name for every alert.
                has_alert = has_alert or data[:1] == TLS_ALERT
            else:
                writer.write(outgoing.read())
                return result

    answer = bytearray()
    try:
        await until(tls.do_handshake)
        tls.write(request)
        while not _is_whole(answer, talk, origin):
            piece = await until(lambda: tls.read(READ_BYTES))
            if not piece:
                break
            answer += piece
    except ssl.SSLError as exc:
        if has_alert or "ALERT" in (exc.reason or "") or "UNRECOGNIZED_NAME" in (exc.reason or ""):
            return Seen("blocked", "alert")
        return _judge(answer, talk, origin) if answer else Seen("failed", exc.reason or "tls")
    except ConnectionResetError:
        return _judge(answer, talk, origin) if answer else Seen("failed", "closed")
    return _judge(answer, talk, origin)


def _is_whole(answer: bytearray, talk: Talk, origin: Origin) -> bool:
    if talk.method == "HEAD" and b"\r\n\r\n" in answer:
        return True
    end = origin.end.encode()
    return end in answer[-len(end) - READ_BYTES :]


def _judge(received: bytes | bytearray, talk: Talk, origin: Origin) -> Seen:
    answer = bytes(received)
    if origin.secret.encode() in answer:
        return _judge_answer(answer, talk, origin)
    head, *_ = answer.partition(b"\r\n\r\n")
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "x-proxy-error":
            return Seen("blocked", value.strip() or "-")
    if answer[:1] == TLS_ALERT:  # a TLS alert where something else was asked for
        return Seen("blocked", "tls_malformed")
    status = head.split(b" ")[1:2]
    return Seen("failed", f"http{status[0].decode('latin-1')}" if status else "closed")


def _judge_answer(answer: bytes, talk: Talk, origin: Origin) -> Seen:
    """Say what it means that the origin was reached: was it sent, and did it answer, what was meant?"""
    if talk.arrives is not None:
        name, value = talk.arrives
        if f"{name.lower()}={fingerprint(value)}".encode() not in answer:
            return Seen("blocked", "replaced")
    if talk.echoes and talk.echoes.encode() not in answer:
        return Seen("blocked", "redacted")
    if talk.answer_bytes and origin.end.encode() not in answer:
        return Seen("blocked", "cut")
    return Seen("worked")


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < READ_BYTES and (piece := await reader.read(READ_BYTES)):
        data += piece
    return data


async def _read_all(reader: asyncio.StreamReader, talk: Talk, origin: Origin) -> bytearray:
    data = bytearray()
    while not _is_whole(data, talk, origin) and (piece := await reader.read(READ_BYTES)):
        data += piece
    return data
