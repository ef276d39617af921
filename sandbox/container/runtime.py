"""The port to whatever runs containers. D2

Every method may raise EngineError; a message from the engine is quoted, never parsed for meaning
outside the adapter. Both adapters (Docker; the fake of the tests) pass ``tests/contracts/runtime``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sandbox.container.spec import ContainerSpec


class ContainerStream(Protocol):
    """The attached stdin, stdout and stderr of PID 1: a duplex byte stream, closed with the container."""

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        """Return the next piece; ``("stdout", b"")`` at the end. Cancel-safe: no bytes are lost.

        The end means that the container has stopped, or that ``close`` was called. A stream that
        breaks off while the container runs, or because the engine died, raises EngineError.
        One reader at a time.
        """

    async def write(self, data: bytes) -> None:
        """Write all of it, or raise EngineError when the container is gone.

        Cancelling the wait does not cut the data in two: what was begun is written to its end.
        """

    async def close(self) -> None:
        """Close both directions; idempotent."""


@dataclass(frozen=True)
class EngineFacts:
    """What this engine is and can enforce."""

    version: str
    runtimes: tuple[str, ...]
    has_seccomp: bool
    missing_controls: tuple[str, ...]
    """Controls it cannot apply, e.g. ``pids: cgroup controller is off``. Empty: all are there.

    A missing swap limit is among them only when this host swaps: without swap the memory limit holds alone.
    """
    runtime_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The arguments each runtime is registered with, where there are any."""


@dataclass(frozen=True)
class ContainerState:
    """How a container stands."""

    is_running: bool
    exit_code: int | None
    is_oom_killed: bool
    error: str


@dataclass(frozen=True)
class Owned:
    """Something of ours that exists in the engine."""

    kind: Literal["container", "volume"]
    id: str
    session_id: str
    owner: str


class Runtime(Protocol):
    """Runs containers. Blocking engine calls happen off the event loop."""

    async def facts(self) -> EngineFacts:
        """Ask the engine what it is. Raises EngineError with the remedy when none answers."""

    async def image_id(self, reference: str) -> str:
        """Return the id of a local image. Raises ImageError when it is absent; never pulls."""

    async def create(self, spec: ContainerSpec) -> str:
        """Create volume and container, started by nobody yet, and return the container's id.

        What was created is read back and compared with the spec: a control that the engine dropped
        silently raises EngineError. Leaves nothing behind when it raises.
        """

    async def start(self, container_id: str) -> ContainerStream:
        """Attach, then start; the stream misses nothing.

        What the kernel reports of the started process is compared with the spec once more; a control
        that is not in force kills the container and raises EngineError.
        """

    async def state(self, container_id: str) -> ContainerState:
        """Ask how a container stands. Raises EngineError when it is unknown."""

    async def remove(self, container_id: str | None, volume: str | None) -> None:
        """Kill and remove container and volume; what is gone already is fine. None: not asked for."""

    async def owned(self) -> list[Owned]:
        """List all containers and volumes that carry our labels, of any controller."""
