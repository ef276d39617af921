"""A Runtime whose containers are plain local processes: real bytes and exit codes, no isolation at all.

For tests of what sits above the port. It passes tests/contracts/test_runtime.py, as Docker's does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Literal

from sandbox.container.runtime import ContainerState, EngineFacts, Owned
from sandbox.container.spec import LABEL_OWNER, LABEL_SESSION, ContainerSpec
from sandbox.errors import EngineError, ImageError

PIECE_BYTES = 64 * 1024


class ProcessStream:
    """stdin, stdout and stderr of a process as a ContainerStream."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pieces: asyncio.Queue[tuple[Literal["stdout", "stderr"], bytes]] = asyncio.Queue(maxsize=4)
        self._is_ended = False
        self._is_closed = False
        assert process.stdout and process.stderr
        self._pumps = [
            asyncio.create_task(self._pump("stdout", process.stdout)),
            asyncio.create_task(self._pump("stderr", process.stderr)),
        ]
        self._end = asyncio.create_task(self._watch())
        self._writes: set[asyncio.Task[None]] = set()

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        if self._is_ended or self._is_closed:
            return "stdout", b""
        name, piece = await self._pieces.get()
        self._is_ended = not piece
        return name, piece

    async def write(self, data: bytes) -> None:
        task = asyncio.create_task(self._write(data))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        assert self._process.stdin
        self._process.stdin.close()
        for task in (*self._pumps, self._end):
            task.cancel()
        with contextlib.suppress(asyncio.QueueFull):
            self._pieces.put_nowait(("stdout", b""))

    async def _write(self, data: bytes) -> None:
        assert self._process.stdin
        if self._is_closed or self._process.returncode is not None:
            raise EngineError("cannot write to the container: it is gone")
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as exc:
            raise EngineError(f"cannot write to the container: it is gone ({exc})") from exc

    async def _pump(self, name: Literal["stdout", "stderr"], source: asyncio.StreamReader) -> None:
        while piece := await source.read(PIECE_BYTES):
            await self._pieces.put((name, piece))

    async def _watch(self) -> None:
        await asyncio.gather(*self._pumps)
        await self._process.wait()
        await self._pieces.put(("stdout", b""))


class FakeRuntime:
    """Runs ``spec.command`` here; a command that is a bind's target runs the bind's source (the guest)."""

    def __init__(self, images: dict[str, str] | None = None, facts: EngineFacts | None = None) -> None:
        self.images = {"fake/image:latest": "sha256:" + "0" * 64} if images is None else images
        self.engine = facts or EngineFacts("20.10.24", ("runc",), True, ())
        self.specs: dict[str, ContainerSpec] = {}
        self.volumes: dict[str, ContainerSpec] = {}
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def facts(self) -> EngineFacts:
        return self.engine

    async def image_id(self, reference: str) -> str:
        if reference not in self.images:
            raise ImageError(f"cannot use image {reference}: it is not on this machine; docker pull it")
        return self.images[reference]

    async def create(self, spec: ContainerSpec) -> str:
        if spec.image_id not in self.images.values():
            raise EngineError(f"cannot create container {spec.name}: no such image {spec.image_id}")
        if spec.workspace.name in self.volumes or any(
            spec.name == known.name for known in self.specs.values()
        ):
            raise EngineError(f"cannot create container {spec.name}: it or its volume exists already")
        container_id = os.urandom(32).hex()
        self.specs[container_id] = self.volumes[spec.workspace.name] = spec
        return container_id

    async def start(self, container_id: str) -> ProcessStream:
        spec = self._spec(container_id)
        sources = {bind.target: bind.source for bind in spec.binds}
        program, *arguments = spec.command
        try:
            process = await asyncio.create_subprocess_exec(
                sources.get(program, program),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=dict(spec.env),
            )
        except OSError as exc:
            raise EngineError(f"cannot start container {spec.name}: {program}: {exc.strerror}") from exc
        self.processes[container_id] = process
        return ProcessStream(process)

    async def state(self, container_id: str) -> ContainerState:
        self._spec(container_id)
        process = self.processes.get(container_id)
        if process is None:
            return ContainerState(False, None, False, "")
        code = process.returncode
        # A container killed by a signal reports 128 plus its number.
        return ContainerState(code is None, code if code is None or code >= 0 else 128 - code, False, "")

    async def remove(self, container_id: str | None, volume: str | None) -> None:
        if container_id is not None:
            self.specs.pop(container_id, None)
            process = self.processes.pop(container_id, None)
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
        if volume is not None:
            self.volumes.pop(volume, None)

    async def owned(self) -> list[Owned]:
        containers = [self._owned("container", identity, spec) for identity, spec in self.specs.items()]
        return containers + [self._owned("volume", name, spec) for name, spec in self.volumes.items()]

    async def close(self) -> None:
        for container_id in list(self.specs):
            await self.remove(container_id, None)

    def _spec(self, container_id: str) -> ContainerSpec:
        if container_id not in self.specs:
            raise EngineError(f"cannot find container {container_id[:12]}: there is none; create it again")
        return self.specs[container_id]

    @staticmethod
    def _owned(kind: Literal["container", "volume"], identity: str, spec: ContainerSpec) -> Owned:
        return Owned(kind, identity, spec.label(LABEL_SESSION), spec.label(LABEL_OWNER))
