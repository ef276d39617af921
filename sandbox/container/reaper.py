"""Remove what dead controllers left: containers, volumes, mounts and scratch folders; never a record. D2

Everything of a session carries its controller's name. Only what belongs to a controller that certainly
lives no more is touched: one of this host, of an earlier boot or of a process that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.container.runtime import Runtime
from sandbox.errors import HostError, StateError
from sandbox.provenance.owner import OWNER_NAME, current_owner, is_owner_alive

__all__ = [
    "ReapReport",
    "claim_session",
    "current_owner",
    "discard_session",
    "is_alive",
    "only_reaper",
    "reap",
]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
INTERRUPTED_FILE = "interrupted"
"""Written beside the ledger of a session whose controller died; holds that controller's name."""
REAPER_LOCK = "reaper.lock"
LEDGER_FILE = "ledger.jsonl"
RESULT_FILE = "result.json"
STATEMENT_FILE = "statement.json"
PATCH_FILE = "patch.diff"
EGRESS_FOLDER = "egress"
TRUST_FOLDER = "trust"

_RECORD = (LEDGER_FILE, PATCH_FILE, RESULT_FILE, STATEMENT_FILE)
_SCRATCH = (
    "mask",
    "lower",
    "upper",
    "work",
    "layers",
    "layers.img",
    "reserve",
    EGRESS_FOLDER,
    TRUST_FOLDER,
)
_DRAFTS = (f"{PATCH_FILE}.new", f".{STATEMENT_FILE}.")
"""How the names of what was written but not yet put in its place begin."""
_CLAIM = ".claim@"


@dataclass
class ReapReport:
    """What was removed, by name; all empty when there was nothing to do."""

    containers: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    """Sessions whose scratch folders and mounts were removed."""
    interrupted: list[str] = field(default_factory=list)
    """Those among them that have a record, which is kept and marked."""
    problems: list[str] = field(default_factory=list)
    """What could not be removed and why, one line each."""


def is_alive(owner: str) -> bool:
    """Return False only for a controller that certainly lives no more.

    One of another host, and a name that is none, count as alive: nobody here can know.
    """
    _, boot_id, pid, start_time = ("::::" + owner.strip()).rsplit(":", 3)
    if not (boot_id and pid.isdecimal() and int(pid) and start_time.isdecimal()) or is_owner_alive(owner):
        return True
    # /proc may hide other users' processes (hidepid); a signal that is not allowed says that one is there.
    if boot_id == BOOT_ID.read_text().strip() and not Path(f"/proc/{pid}").exists():
        with contextlib.suppress(ProcessLookupError, OverflowError):
            try:
                os.kill(int(pid), 0)
            except PermissionError:
                return True
    return False


def claim_session(sessions: Path, session_id: str, owner: str) -> Path:
    """Make a session's directory (0700) with its owner's name in it, both at once, and return it.

    There is no moment at which the directory exists and belongs to nobody, so none can be left over.
    Raises StateError when it cannot be made or exists already.
    """
    claim, directory = sessions / f"{_CLAIM}{owner}@{session_id}", sessions / session_id
    try:
        sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
        claim.mkdir(mode=0o700)
        (claim / OWNER_NAME).write_text(f"{owner}\n")
        claim.rename(directory)  # fails on a directory that is not empty, as any session's is
    except OSError as exc:
        _remove_flat(claim)
        raise StateError(
            f"cannot make session directory {directory}: {exc.strerror}; check AGENT_RUNNER_STATE"
        ) from exc
    return directory


def discard_session(directory: Path, release: Callable[[Path], None]) -> None:
    """Remove a session that never began, its record included; idempotent.

    The workspace goes first: while any of it is left, a mount of the user's own files may be among it,
    and nothing else is touched. The owner's name goes last, so that whatever stays is found again.
    Raises HostError or OSError then.
    """
    release(directory)
    _remove_flat(directory / EGRESS_FOLDER)
    _remove_flat(directory / TRUST_FOLDER)
    _check_nothing_left(directory)
    _remove_flat(directory)


async def reap(
    runtime: Runtime,
    state: Path,
    release: Callable[[Path], None],
    is_enough: Callable[[], bool] = lambda: False,
) -> ReapReport:
    """Remove everything of dead controllers and return what that was; one failure does not stop the rest.

    ``release`` unmounts and removes the workspace layers of a session's directory
    (``workspace.release_workspace``). ``is_enough`` is asked before each removal, and ends it when true;
    what is left is found the next time. Raises EngineError when the engine cannot be asked at all.
    """
    report = ReapReport()
    orphans = [owned for owned in await runtime.owned() if not is_alive(owned.owner)]
    for orphan in sorted(orphans, key=lambda owned: owned.kind):  # containers first: they hold the volumes
        if is_enough():
            return report
        try:
            if orphan.kind == "container":
                await runtime.remove(orphan.id, None)
                report.containers.append(orphan.id)
            else:
                await runtime.remove(None, orphan.id)
                report.volumes.append(orphan.id)
        except HostError as exc:
            report.problems.append(str(exc))
    await asyncio.to_thread(_reap_sessions, state / "sessions", release, report, is_enough)
    return report


@contextlib.contextmanager
def only_reaper(state: Path) -> Iterator[bool]:
    """Hold for a block that nobody else reaps this state directory; False when another process does.

    Two at once would find each other's half-removed trees and report them as problems.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(state / REAPER_LOCK, flags, 0o600)
    except OSError:
        yield True  # nothing was kept there yet, or nothing can be: whoever makes something there says so
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _reap_sessions(
    sessions: Path, release: Callable[[Path], None], report: ReapReport, is_enough: Callable[[], bool]
) -> None:
    try:
        directories = sorted(sessions.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return  # never used; whether it can be is asked when something is made there
    except OSError as exc:
        raise StateError(
            f"cannot read {sessions}: {exc.strerror}; become its owner or set AGENT_RUNNER_STATE"
        ) from exc
    for directory in directories:
        if is_enough():
            return
        if directory.is_symlink() or not directory.is_dir():
            continue
        try:
            if directory.name.startswith(_CLAIM):
                _, owner, _ = directory.name.split("@", 2)
                if not is_alive(owner):
                    _remove_flat(directory)
            else:
                _reap_session(directory, release, report)
        except (HostError, OSError) as exc:
            reason = exc if isinstance(exc, HostError) else exc.strerror
            report.problems.append(f"cannot clean up session {directory.name}: {reason}")


def _reap_session(directory: Path, release: Callable[[Path], None], report: ReapReport) -> None:
    try:
        owner = (directory / OWNER_NAME).read_text().strip()
    except FileNotFoundError:
        return  # nobody says that it is ours
    drafts = [entry for entry in directory.iterdir() if entry.name.startswith(_DRAFTS)]
    has_scratch = bool(drafts) or any(os.path.lexists(directory / name) for name in _SCRATCH)
    # A ledger without a line is the record of nothing: the session never began.
    has_record = any((directory / name).exists() and (directory / name).stat().st_size for name in _RECORD)
    is_finished = (directory / RESULT_FILE).exists()
    is_marked = (directory / INTERRUPTED_FILE).exists()
    if is_alive(owner) or (has_record and (is_finished or is_marked) and not has_scratch):
        return

    if not has_record:
        discard_session(directory, release)
    else:
        # ``release`` knows which of these are mounts and which lead to the user's own files; this does not.
        release(directory)
        _remove_flat(directory / EGRESS_FOLDER)
        _remove_flat(directory / TRUST_FOLDER)
        for draft in drafts:
            draft.unlink()
        _check_nothing_left(directory)
        if not is_finished and not is_marked:
            (directory / INTERRUPTED_FILE).write_text(f"{owner}\n")
            report.interrupted.append(directory.name)
    report.sessions.append(directory.name)


def _check_nothing_left(directory: Path) -> None:
    if left := [name for name in _SCRATCH if os.path.lexists(directory / name)]:
        raise StateError(f"{', '.join(left)} in {directory} could not be removed; remove it as its owner")


def _remove_flat(directory: Path) -> None:
    """Remove a directory and the files in it; one with directories in it stays, with an OSError."""
    if not os.path.lexists(directory):
        return
    # The owner's name last: a directory without one is nobody's, and would stay for ever if we died here.
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name == OWNER_NAME):
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink()
    directory.rmdir()
