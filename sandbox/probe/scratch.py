"""Directories of one self-test: a workspace with decoys, and what the permissive container needs."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.container.reaper import current_owner, is_alive
from sandbox.container.spec import OverlayVolume
from sandbox.errors import StateError
from sandbox.probe.files import Decoys

OWNER = "owner"
PREFIX = "scratch-"
CONTENT = "a decoy of agent-runner selftest; nothing secret\n"


@dataclass(frozen=True)
class Scratch:
    """Paths of one self-test."""

    path: Path

    @property
    def workspace(self) -> Path:
        """The workspace, decoys in it."""
        return self.path / "workspace"

    @property
    def control_egress(self) -> Path:
        """What the permissive container has of an egress directory."""
        return self.path / "egress"

    def control_volume(self, name: str) -> OverlayVolume:
        """The same workspace without a mask, with an upper layer of its own."""
        upper, work = str(self.path / "upper"), str(self.path / "work")
        return OverlayVolume(name, (str(self.workspace),), upper, work, flags=())


@contextlib.contextmanager
def opened_scratch(state: Path, decoys: Decoys) -> Iterator[Scratch]:
    """Make the directories, and remove them at the end; what a killed self-test left goes first.

    ``state`` is the self-test's own. Raises StateError when they cannot be made.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_abandoned(state)
        scratch = Scratch(state / f"{PREFIX}{secrets.token_hex(6)}")
        scratch.path.mkdir(mode=0o700)
    except OSError as exc:
        raise StateError(
            f"cannot make the self-test's directory in {state}: {exc.strerror}; set AGENT_RUNNER_STATE"
        ) from exc
    try:
        try:
            _fill(scratch, decoys)
        except OSError as exc:
            raise StateError(
                f"cannot make the self-test's decoys in {scratch.path}: {exc.strerror} at {exc.filename!r}; "
                "free space there or set AGENT_RUNNER_STATE"
            ) from exc
        yield scratch
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)


def remove_abandoned(state: Path) -> None:
    """Remove what killed self-tests left of their own beneath ``state``; their sessions are the reaper's."""
    for path in state.glob(f"{PREFIX}*"):
        try:
            owner = (path / OWNER).read_text()
        except OSError:
            continue
        if not is_alive(owner):
            shutil.rmtree(path, ignore_errors=True)


def _fill(scratch: Scratch, decoys: Decoys) -> None:
    (scratch.path / OWNER).write_text(current_owner())
    scratch.workspace.mkdir(mode=0o755)
    # The socket in it is looked up by the container's user; nobody else gets past the scratch directory.
    scratch.control_egress.mkdir(mode=0o755)
    for name in ("upper", "work"):
        (scratch.path / name).mkdir()
    (scratch.path / "upper").chmod(0o777)
    for name in decoys.files:
        path = scratch.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CONTENT)
    for new, old in decoys.hard_links:
        (scratch.workspace / new).hardlink_to(scratch.workspace / old)
