"""Where benchmarks work: a temporary directory and the engine, both left as they were found."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.container.reaper import current_owner
from sandbox.container.spec import LABEL_OWNER
from sandbox.container.workspace.prepare import release_workspace

PEER_SECONDS = 120
"""Longest wait for one command of a peer."""


@dataclass(frozen=True)
class Place:
    """What every benchmark gets."""

    directory: Path
    """Temporary; on the file system that TMPDIR names."""
    image: str
    progress: Callable[[str], None]

    @property
    def state(self) -> Path:
        """The state directory of sessions that benchmarks open; the user's own is not touched."""
        return self.directory / "state"

    @property
    def label(self) -> str:
        """Goes on every container that a benchmark makes outside a session."""
        return f"{LABEL_OWNER}={current_owner()}"


@contextmanager
def working_place(image: str, progress: Callable[[str], None]) -> Iterator[Place]:
    """Make a place, and remove it with all that was made in it or for it, however the block ends."""
    place = Place(Path(tempfile.mkdtemp(prefix="agent-runner-bench-")), image, progress)
    try:
        yield place
    finally:
        progress("removing what was made")
        _remove_from_engine(place)
        sessions = place.state / "sessions"
        for session in sessions.iterdir() if sessions.is_dir() else ():
            # Before the tree is removed: an id-mapped view of a workspace may still be mounted in here.
            release_workspace(session)
        shutil.rmtree(place.directory)


def time_command(arguments: list[str], *, stdin: bytes = b"") -> float:
    """Run a peer's command, which must succeed, and return its seconds, process start and end included."""
    started = time.perf_counter()
    subprocess.run(arguments, input=stdin, check=True, capture_output=True, timeout=PEER_SECONDS)
    return time.perf_counter() - started


async def time_long_command(arguments: list[str]) -> float:
    """Like ``time_command``, for commands of seconds: an interrupted run does not wait for them."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*arguments)
    try:
        async with asyncio.timeout(PEER_SECONDS):
            code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        raise subprocess.CalledProcessError(code, arguments)
    return time.perf_counter() - started


def _remove_from_engine(place: Place) -> None:
    """Remove containers and volumes that carry our label. Without an engine there are none."""
    for listing, removal in ((["ps", "-aq"], ["rm", "-fv"]), (["volume", "ls", "-q"], ["volume", "rm"])):
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(
                ["docker", *listing, "--filter", f"label={place.label}"],
                check=True,
                capture_output=True,
                text=True,
                timeout=PEER_SECONDS,
            ).stdout.split()
            if found:
                command = ["docker", *removal, *found]
                subprocess.run(command, check=True, capture_output=True, timeout=PEER_SECONDS)


def file_system(directory: Path) -> str:
    """Return the type of the file system a directory is on, for the reader; ``?`` when it is unknown."""
    device = f"{os.major(directory.stat().st_dev)}:{os.minor(directory.stat().st_dev)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split(" ")[2] == device:
            return rest.split(" ")[0]
    return "?"
