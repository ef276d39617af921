"""``agent-runner apply``: take a session's patch into a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sandbox.container.patch.apply import ApplyReport
    from sandbox.digest import Digest

RESULT_NAME = "result.json"
PATCH_NAME = "patch.diff"

_EXIT_CALLER = 2
_EXIT_HOST = 3


@click.command("apply")
@click.argument("session", metavar="SESSION")
@click.option(
    "--workspace",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where to apply; default: the directory the session worked on.",
)
@click.option(
    "--allow-executable-paths",
    is_flag=True,
    help="Take changes to files that run code on this machine by themselves (hooks, CI, editor tasks).",
)
@click.option("--check", "is_check_only", is_flag=True, help="Only say whether it would apply.")
def command(session: str, workspace: Path | None, allow_executable_paths: bool, is_check_only: bool) -> None:
    """Apply the patch of SESSION (an id, the beginning of one, or 'latest'): all of it or nothing.

    The session's signed record must hold, as `agent-runner verify` checks it.

    Exit code 0: applied (with --check: it would be). 2: wrong usage. 3: refused or does not fit, and
    nothing was changed.
    """
    from sandbox.container.patch.apply import apply_patch
    from sandbox.errors import AgentRunnerError, PolicyError
    from sandbox.provenance.store import find_session
    from sandbox.resources import state_directory

    try:
        directory = find_session(state_directory(), session)
        refuse_broken_record(directory)
        recorded, digest = read_recorded_patch(directory)
        report = apply_patch(
            directory / PATCH_NAME,
            digest,
            workspace or recorded,
            allow_executable_paths=allow_executable_paths,
            is_check_only=is_check_only,
        )
    except AgentRunnerError as exc:
        click.echo(f"agent-runner: {exc}", err=True)
        raise click.exceptions.Exit(_EXIT_CALLER if isinstance(exc, PolicyError) else _EXIT_HOST) from exc
    click.echo(_as_text(report, workspace or recorded))


def refuse_broken_record(session_directory: Path) -> None:
    """Raise RecordError unless the signed record holds: the result alone names any patch it is told to.

    A session without a result has no record to judge yet; ``read_recorded_patch`` says so.
    """
    from sandbox.errors import RecordError
    from sandbox.provenance.verify import verify_session

    found = verify_session(session_directory)
    if not found.is_valid and (session_directory / RESULT_NAME).exists():
        said = "; ".join(problem.message for problem in found.problems) or "it is incomplete"
        raise RecordError(
            f"refusing to apply session {session_directory.name}: its record does not hold: "
            f"{_printable(said)}; look at it with agent-runner verify"
        )


def read_recorded_patch(session_directory: Path) -> tuple[Path, Digest]:
    """Return the workspace and the patch's digest from a session's result.

    The patch is always the file in the session's own directory, whatever path the result names: the
    directory may have moved. Raises WorkspaceError when the session has no result or no patch.
    """
    from sandbox.digest import Digest
    from sandbox.errors import WorkspaceError

    try:
        result = json.loads((session_directory / RESULT_NAME).read_bytes())
        patch = result["patch"]
        if patch is None:
            raise WorkspaceError(f"cannot apply session {session_directory.name}: it made no patch")
        return Path(str(result["workspace"])), Digest(str(patch["blake3"]), str(patch["sha256"]))
    except FileNotFoundError as exc:
        raise WorkspaceError(
            f"cannot apply session {session_directory.name}: it has no result; it is running, or was killed"
        ) from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise WorkspaceError(
            f"cannot apply session {session_directory.name}: its {RESULT_NAME} does not name a patch "
            f"({type(exc).__name__}: {exc}); check it with agent-runner verify"
        ) from exc


def _as_text(report: ApplyReport, workspace: Path) -> str:
    if not report.files:
        return "nothing to apply: the session changed no file"
    verb = "applied to" if report.is_applied else "would apply to"
    lines = [f"{verb} {workspace}: {len(report.files)} files"]
    for file in report.files:
        mark = f"  ! {file.runs_on_host}" if file.runs_on_host else ""
        lines.append(f"  {file.kind:<8} {_printable(file.shown)}{mark}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
