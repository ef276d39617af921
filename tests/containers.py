"""Specs over real directories, for tests that create containers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sandbox.container.reaper import current_owner
from sandbox.container.spec import ContainerSpec, Image, OverlayVolume, SessionPlaces, compile_spec
from sandbox.policy.model import Policy

IMAGE = "agent-runner/base:latest"
UID = 1000
SECCOMP = json.dumps(
    {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["keyctl"], "action": "SCMP_ACT_ERRNO"}]}
)
"""A profile whose effect is easy to see; the shipped ones have tests of their own."""


def make_places(directory: Path, session_id: str | None = None, owner: str | None = None) -> SessionPlaces:
    """Make the directories of one session beneath ``directory`` and name them."""
    session_id = session_id or f"test-{os.urandom(6).hex()}"
    session = directory / session_id
    for name in ("mask", "user", "upper", "work", "egress"):
        (session / name).mkdir(parents=True)
    # The sandbox's user owns its upper layer; as an ordinary user these are the same.
    (session / "upper").chmod(0o777)
    guest = session / "guest"
    shutil.copy("/bin/cat", guest)
    layers = (str(session / "mask"), str(session / "user"))
    volume = OverlayVolume(
        f"agent-runner-{session_id}", layers, str(session / "upper"), str(session / "work")
    )
    return SessionPlaces(
        session_id, volume, str(guest), str(session / "egress"), UID, UID, owner or current_owner()
    )


def make_spec(
    places: SessionPlaces,
    image_id: str,
    policy: Policy | None = None,
    *,
    blocked_paths: tuple[str, ...] = (),
    hosts: dict[str, str] | None = None,
) -> ContainerSpec:
    """Compile a spec for an image, with the seccomp profile of these tests."""
    image = Image(IMAGE, image_id, blocked_paths, places.guest_binary)
    return compile_spec(policy or Policy(name="test"), image, places, SECCOMP, hosts=hosts or {})


async def read_all(stream: Any) -> dict[str, bytes]:
    """Read a ContainerStream to its end."""
    read = {"stdout": bytearray(), "stderr": bytearray()}
    while True:
        name, piece = await stream.read()
        if not piece:
            return {name: bytes(content) for name, content in read.items()}
        read[name] += piece
