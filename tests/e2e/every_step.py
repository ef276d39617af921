"""Kill a controller at each thing it does to the world: found by watching one session, so none is forgotten.

What a session does is what CPython's audit events say of it: files and folders made and removed in its state
directory, sockets bound, devices set up, programs started, and requests that change something in the engine.
Each child dies *before* one of them, which is after the one before it. What has no audit event (mounts) lies
between two that have one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.container.workspace import prepare
from tests.e2e.live_session import Live, shell

POLICY: dict[str, Any] = {
    # All that makes something: an authority and its roots, and the socket of the shells that ask.
    "network": {"allowlist": [{"host": "api.example.com", "inspect": True}]},
    "shell": {"allowed_binaries": ["sh", "python3"], "agents": ["python3"]},
}
AT_ONCE = 3
_MADE = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.symlink", "os.link", "shutil.rmtree"}
_NAMES = (
    (re.compile(r"\.claim@[^/ ]*"), "CLAIM"),
    (re.compile(r"[0-9]{8}-?T?[0-9]{6}[0-9a-zA-Z-]*"), "ID"),
    (re.compile(r"(sessions)/(?!CLAIM)[^/ ]+"), r"\1/ID"),
    (re.compile(r"[0-9a-f]{12,}"), "HEX"),
    (re.compile(r"/dev/loop[0-9]+"), "/dev/loopN"),
    (re.compile(r"/fd/[0-9]+"), "/fd/N"),
    (re.compile(r"/\.(index|shells|trial)-[^/]*"), r"/.\1"),
)
_OWNED = {*prepare._OWNED, prepare._LOWER, prepare._MARKER}
"""What a release removes by its name in an open folder; the rest it removes so is what these hold."""
_ONE_FOR_ALL = re.compile(r"STATE/keys/|/\.(trial|shells)(/| ?$)")
"""Steps within a folder that is thrown away as a whole, or put in its place by one rename."""


def step_of(state: str, event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return a name for what an audit event is about to do, the same in every session; None when nothing."""
    what = ""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        what = os.fsdecode(path)
        if not what.startswith((state, "/dev/loop")):
            return None
    elif event in _MADE:
        what = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else ""
        if not (what.startswith(state) if what.startswith("/") else what in _OWNED):
            return None
    elif event == "socket.bind":
        what = str(arguments[1])
    elif event == "subprocess.Popen":
        what = " ".join(os.fsdecode(word) for word in arguments[1] if not os.fsdecode(word).startswith("-"))
    elif event == "fcntl.ioctl":
        what = hex(arguments[1] & 0xFFFFFFFF)
    elif event == "http.client.send":
        line = arguments[1].split(b"\r\n", 1)[0].decode("latin-1") if isinstance(arguments[1], bytes) else ""
        if not re.fullmatch(r"(POST|PUT|DELETE) .* HTTP/1\.1", line):
            return None
        what = re.sub(r"/v1\.[0-9]+/", "/", line)
    else:
        return None
    what = what.replace(state, "STATE")
    for found, name in _NAMES:
        what = found.sub(name, what)
    return None if _ONE_FOR_ALL.search(what) and event != "os.mkdir" else f"{event} {what}"


def watch(directory: Path, see: Callable[[str], None]) -> None:
    """Run one session to its end, telling of each step just before it is taken."""
    live, state = Live(directory), str(directory / "state")
    sys.addaudithook(lambda event, arguments: _tell(state, event, arguments, see))
    asyncio.run(live.run(lambda guest, session: guest.run(shell("echo two > src/b.txt")), **POLICY))


def _tell(state: str, event: str, arguments: tuple[Any, ...], see: Callable[[str], None]) -> None:
    if (step := step_of(state, event, arguments)) is not None:
        see(step)


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child, with its modules loaded already; return the child's number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def list_steps(directory: Path) -> list[str]:
    """Return each step of a session once, in order."""
    Live(directory).fill()
    out = directory / "steps"

    def trace() -> None:
        seen: dict[str, None] = {}
        watch(directory, lambda step: seen.setdefault(step))
        out.write_text("\n".join(seen))

    _, status = os.waitpid(fork(trace), 0)
    if status:
        raise SystemExit("the session that nobody kills did not end well")
    return out.read_text().splitlines()


def die_before(directory: Path, warm: Path | None, wanted: str) -> int:
    """Begin a session in a child that is killed just before a step; return the child's number."""
    directory.mkdir()
    Live(directory).fill()
    if warm is not None:  # the image's index is there already
        (directory / "state").mkdir(mode=0o700)
        shutil.copytree(warm / "state" / "images", directory / "state" / "images")

    def die(step: str) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return fork(lambda: watch(directory, die))


def main(top: Path) -> None:
    """Walk all steps; each leaves a folder of its number, with the step and how it ended in ``died``."""
    import sandbox.agent.loop  # loaded once, not once for each child
    import sandbox.probe.selftest  # noqa: F401

    cold = top / "cold"
    cold.mkdir()
    steps = list_steps(cold)
    again = top / "warm"
    again.mkdir()
    shutil.copytree(cold / "state" / "images", again / "state" / "images")
    usual = set(list_steps(again))
    running: dict[int, tuple[Path, str]] = {}

    def collect() -> None:
        child, status = os.wait()
        directory, step = running.pop(child)
        (directory / "died").write_text(f"{os.waitstatus_to_exitcode(status)} {step}")

    for number, step in enumerate(steps):
        while len(running) >= AT_ONCE:
            collect()
        directory = top / str(number)
        running[die_before(directory, cold if step in usual else None, step)] = directory, step
    while running:
        collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
