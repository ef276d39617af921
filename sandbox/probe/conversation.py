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

DRIVER_NAME = "driver.sock"
TALK_SECONDS = 10.0
READ_BYTES = 65536


class Switchboard:
    """Listens beside a gateway for the probe programs of one container, and holds each one's conversation."""

    def __init__(self, directory: Path, secret: str) -> None:
        """Take the egress directory of the container, and what the origin answers with."""
        self._directory = directory
        self._secret = secret.encode()
        self._server: asyncio.Server | None = None
        self._waiting: dict[str, tuple[Talk, bool]] = {}
        self._talks: set[asyncio.Task[None]] = set()
        self.seen: dict[str, Seen] = {}
        """What came of each conversation that took place, by probe."""

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

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            async with asyncio.timeout(TALK_SECONDS):
                name = (await reader.readline()).decode("ascii", "replace").strip()
                known = self._waiting.pop(name, None)
                if known is not None:
                    talk, is_control = known
                    self.seen[name] = await _talk(reader, writer, talk, self._secret, is_control=is_control)
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
    secret: bytes,
    *,
    is_control: bool,
) -> Seen:
    host = f"[{talk.host}]" if ":" in talk.host else talk.host
    authority = host if talk.port == 80 and talk.way == "plain" else f"{host}:{talk.port}"
    request = f"{talk.method} {talk.path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode()
    if talk.way == "plain":
        absolute = f"{talk.method} http://{authority}{talk.path}".encode()
        writer.write(absolute + request[len(f"{talk.method} {talk.path}") :])
        return _judge(await _read_all(reader), secret)
    if talk.way == "proxy" or is_control:
        writer.write(f"CONNECT {host}:{talk.port} HTTP/1.1\r\nHost: {host}:{talk.port}\r\n\r\n".encode())
        head = await _read_head(reader)
        if not head.startswith(b"HTTP/1.1 200"):
            return _judge(head, secret)
    if not talk.is_tls:
        writer.write(request)
        return _judge(await _read_all(reader), secret)
    return await _tls(reader, writer, talk, request, secret)


async def _tls(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, talk: Talk, request: bytes, secret: bytes
) -> Seen:
    # Whose certificate it is says nothing here: only the origin knows the secret.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    name = talk.host if talk.server_name == "" else talk.server_name
    if name is not None and (":" in name or name.replace(".", "").isdigit()):
        name = None  # an address is no server name
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)

    async def until(step: Callable[[], Any]) -> Any:  # whatever the step returns
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                data = await reader.read(READ_BYTES)
                if not data:
                    raise ConnectionResetError from None
                incoming.write(data)
            else:
                writer.write(outgoing.read())
                return result

    answer = b""
    try:
        await until(tls.do_handshake)
        tls.write(request)
        while secret not in answer:
            piece = await until(lambda: tls.read(READ_BYTES))
            if not piece:
                break
            answer += piece
    except ssl.SSLError as exc:
        if "ALERT" in (exc.reason or "") or "UNRECOGNIZED_NAME" in (exc.reason or ""):
            return Seen("blocked", "alert")
        return _judge(answer, secret) if answer else Seen("failed", exc.reason or "tls")
    except ConnectionResetError:
        return _judge(answer, secret) if answer else Seen("failed", "closed")
    return _judge(answer, secret)


def _judge(answer: bytes, secret: bytes) -> Seen:
    if secret in answer:
        return Seen("worked")
    head, *_ = answer.partition(b"\r\n\r\n")
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "x-proxy-error":
            return Seen("blocked", value.strip() or "-")
    if answer[:1] == b"\x15":  # a TLS alert where something else was asked for
        return Seen("blocked", "tls_malformed")
    status = head.split(b" ")[1:2]
    return Seen("failed", f"http{status[0].decode('latin-1')}" if status else "closed")


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < READ_BYTES and (piece := await reader.read(READ_BYTES)):
        data += piece
    return data


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while len(data) < READ_BYTES and (piece := await reader.read(READ_BYTES)):
        data += piece
    return data
