"""A raw HTTP/1.1 server on loopback that plays prepared answers byte for byte, misbehaviour included."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Answer:
    """One prepared answer. Each element of ``body`` leaves as one chunk, in one write."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: list[bytes] = field(default_factory=list)
    is_cut: bool = False
    """The connection dies after the last chunk, without the end of the body."""
    is_held: bool = False
    """Nothing comes after the last chunk; the server waits for the client to hang up."""
    is_dropped: bool = False
    """The connection dies before any answer."""


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class WireServer:
    """Serves ``answers`` in order, one per request; an unexpected request is HTTP 418."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.requests: list[Request] = []
        self.hung_up = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.gather(*self._open)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._serve_one(reader, writer):
                pass
        del self._open[task]
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append(Request(method, path, headers, json.loads(body) if body else None))
        answer = self.answers.popleft() if self.answers else Answer(418)
        if answer.is_dropped:
            writer.transport.abort()
            return False
        fields = {"transfer-encoding": "chunked", **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{k}: {v}" for k, v in fields.items())]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        for chunk in answer.body:
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
        if answer.is_held:
            await reader.read()
            self.hung_up.set()
            return False
        if answer.is_cut:
            writer.close()  # after what was written, and before the terminating chunk
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def pieces(content: bytes, size: int) -> list[bytes]:
    """Split bytes into chunks of one size, without regard for characters, lines or events."""
    return [content[start : start + size] for start in range(0, len(content), size)]


async def unused_address() -> str:
    """Return a loopback URL on which nobody listens."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return f"http://127.0.0.1:{port}"
