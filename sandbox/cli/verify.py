"""``agent-runner verify``: judge one session's record and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from sandbox.errors import AgentRunnerError
    from sandbox.provenance.verify import SessionVerification

EXIT_NOT_VERIFIED = 1


@click.command("verify")
@click.argument("session", metavar="SESSION")
@click.option(
    "--key",
    "key_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Public key (PEM) that must have signed the record; default: this installation's own.",
)
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(session: str, key_file: Path | None, output: str) -> None:
    """Check the record of SESSION (an id, the beginning of one, or 'latest').

    Exit code 0: every line, the patch, the result and the signed statement agree. 1: something was
    changed or is missing, and the output says what. 2: wrong usage. 3: this machine cannot check.
    """
    from sandbox.errors import AgentRunnerError
    from sandbox.provenance.keys import load_public_key
    from sandbox.provenance.sessions import find_session
    from sandbox.provenance.verify import verify_session
    from sandbox.resources import state_directory

    try:
        key = load_public_key(key_file) if key_file else None
        directory = find_session(state_directory(), session)
        found = verify_session(directory, public_key=key)
    except AgentRunnerError as exc:
        stop(exc)
    if output == "json":
        click.echo(json.dumps(verdict_as_data(directory, found), indent=2))
    else:
        click.echo(verdict_as_text(directory, found))
    if not found.is_valid:
        raise click.exceptions.Exit(EXIT_NOT_VERIFIED)


def stop(error: AgentRunnerError) -> NoReturn:
    """End the command with one line on stderr: exit code 2 for the caller's mistake, 3 for the host's."""
    from sandbox.errors import PolicyError

    click.echo(f"agent-runner: {error}", err=True)
    raise click.exceptions.Exit(2 if isinstance(error, PolicyError) else 3) from error


def verdict_as_text(directory: Path, found: SessionVerification) -> str:
    """Say in one line that the record holds or is incomplete, or in several what is wrong with it."""
    from sandbox.cli.display import printable

    ledger = found.ledger
    if found.is_valid:
        return (
            f"record verified: {ledger.entries} entries, head {ledger.head[:16]}…, "
            f"signed by {(found.keyid or '')[:16]}…"
        )
    if ledger.is_valid and found.status == "interrupted" and not _is_sealed(directory):
        return (
            f"record incomplete: session {directory.name} has not ended; its {ledger.entries} entries hold, "
            "and nothing proves that none is missing after them"
        )
    lines = [f"record NOT verified: session {directory.name}"]
    lines += [f"  {problem.part}: {printable(problem.message)}" for problem in found.problems]
    if ledger.problem is not None and ledger.entries:
        lines.append(f"  {ledger.entries} entries continue each other from the first")
    return "\n".join(lines)


def verdict_as_data(directory: Path, found: SessionVerification) -> dict[str, object]:
    """Return the verdict for machines."""
    return {
        "session": directory.name,
        "verified": found.is_valid,
        "status": found.status,
        "entries": found.ledger.entries,
        "head": found.ledger.head,
        "keyid": found.keyid,
        "problems": [
            {"part": problem.part, "line": problem.line, "message": problem.message}
            for problem in found.problems
        ],
    }


def _is_sealed(directory: Path) -> bool:
    return (directory / "statement.json").exists()
