"""Compile a policy into everything the container will be. Pure and printable; nothing is created here. D2"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sandbox.digest import Digest, digest_json
from sandbox.policy.model import Policy

WORKSPACE = "/workspace"
GUEST = "/.agent-runner/guest"
EGRESS_DIRECTORY = "/.agent-runner/egress"
EGRESS_SOCKET = f"{EGRESS_DIRECTORY}/proxy.sock"
PROXY_PORT = 3128


@dataclass(frozen=True)
class Bind:
    """A host path that appears in the container."""

    source: str
    target: str
    is_read_only: bool = True


@dataclass(frozen=True)
class OverlayVolume:
    """The workspace: mask layer over the user's directory, with this session's upper layer. D4"""

    name: str
    """Docker volume name; unique to the session."""
    lower: tuple[str, ...]
    """Topmost first: the mask, then the user's directory (or its id-mapped view). Plain paths: the
    runtime's adapter escapes what overlayfs needs escaped."""
    upper: str
    work: str
    target: str = WORKSPACE
    flags: tuple[str, ...] = ("nosuid", "nodev")
    """Mount flags; ``noexec`` is added when the policy says ``workspace_exec: false``."""


@dataclass(frozen=True)
class Tmpfs:
    """Writable memory, always noexec, nosuid and nodev."""

    target: str
    size_bytes: int


@dataclass(frozen=True)
class ContainerSpec:
    """All that the engine is asked for. Two equal specs give the same container."""

    name: str
    image_id: str
    runtime: str
    uid: int
    gid: int
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    working_dir: str
    workspace: OverlayVolume
    binds: tuple[Bind, ...]
    tmpfs: tuple[Tmpfs, ...]
    extra_hosts: tuple[tuple[str, str], ...]
    """Name to loopback address, for exact allowlisted names. D5"""
    memory_bytes: int
    cpus: float
    pids: int
    nofile: int
    seccomp: str
    """The profile's JSON text, as given to the engine."""
    labels: tuple[tuple[str, str], ...]

    def digest(self) -> Digest:
        """Digest the spec; what differs by session only (names, host paths) is included."""
        return digest_json(asdict(self))

    def as_json(self) -> str:
        """Print the spec for ``--dry-run``; the seccomp profile by digest, not in full."""
        shown = asdict(self) | {"seccomp": "blake3:" + digest_json(json.loads(self.seccomp)).blake3}
        return json.dumps(shown, indent=2, sort_keys=True)


@dataclass(frozen=True)
class SessionPlaces:
    """Where one session lives on the host, and as whom it runs. Made by ``workspace`` and ``session``."""

    session_id: str
    workspace: OverlayVolume
    guest_binary: str
    egress_directory: str
    uid: int
    gid: int
    owner: str
    """``hostname:boot-id:pid:start-time`` of the controller, for the reaper."""


@dataclass(frozen=True)
class Image:
    """An image that is present, and where it keeps the programs that the policy blocks."""

    reference: str
    image_id: str
    blocked_paths: tuple[str, ...]
    """Absolute, symlinks resolved: each is covered by the refusal program."""
    refusal_binary: str
    """Host path of the program that says why and exits 126."""


def compile_spec(policy: Policy, image: Image, places: SessionPlaces, seccomp: str) -> ContainerSpec:
    """Turn a policy into the container it asks for. Pure: the same arguments give the same spec."""
    raise NotImplementedError
