"""The guest in a real container, on the real attach stream: a small stand-in for the Docker adapter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import docker

from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import GuestConfig

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "images" / "guest" / "build"
IMAGE = os.environ.get("AGENT_RUNNER_TEST_IMAGE", "agent-runner/base:latest")
UID = 1000


class AttachedStream:
    """Docker's attach protocol: eight bytes of head (stream, length) before each piece."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        while len(self._buffer) < 8 or len(self._buffer) < 8 + self._size():
            data = await asyncio.get_running_loop().sock_recv(self._socket, 256 * 1024)
            if not data:
                return "stdout", b""
            self._buffer += data
        size = self._size()
        piece = self._buffer[8 : 8 + size]
        source: Literal["stdout", "stderr"] = "stderr" if self._buffer[0] == 2 else "stdout"
        self._buffer = self._buffer[8 + size :]
        return source, piece

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _size(self) -> int:
        return int(struct.unpack(">I", self._buffer[4:8])[0])


class Box:
    """One container with the guest as PID 1, open for use."""

    def __init__(self, container: Any, stream: AttachedStream, channel: GuestChannel) -> None:
        self.container = container
        self.stream = stream
        self.channel = channel


@contextlib.asynccontextmanager
async def guest_box(
    workspace: Path,
    config: GuestConfig | None = None,
    *,
    must_open: bool = True,
    stream_type: type[AttachedStream] = AttachedStream,
    **options: Any,
) -> AsyncIterator[Box]:
    """Start a container as the product would: no network, no capability, only the workspace writable."""
    os.makedirs(workspace, exist_ok=True)  # noqa: PTH103 - a test may block
    os.chown(workspace, UID, UID)
    engine = docker.from_env()
    arguments = options.pop("entrypoint_args", [])
    volumes = {
        str(BUILD / "guest"): {"bind": "/.agent-runner/guest", "mode": "ro"},
        str(workspace): {"bind": "/workspace", "mode": "rw"},
    } | options.pop("volumes", {})
    settings: dict[str, Any] = {
        "network_mode": "none",
        "read_only": True,
        "user": f"{UID}:{UID}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": 512,
        "mem_limit": "512m",
        "tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=64m"},
        "log_config": docker.types.LogConfig(type="none"),
        "labels": {"agent-runner.test": "guest"},
    } | options
    container = engine.containers.create(
        IMAGE,
        entrypoint=["/.agent-runner/guest", *arguments],
        command=[],
        stdin_open=True,
        volumes=volumes,
        **settings,
    )
    try:
        attached = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        sock = attached._sock
        sock.setblocking(False)
        container.start()
        stream = stream_type(sock)
        channel = GuestChannel(stream)
        try:
            if must_open:
                await channel.open(config or GuestConfig())
            yield Box(container, stream, channel)
        finally:
            await channel.close()
    finally:
        container.remove(force=True, v=True)
        engine.close()
