"""``agent-runner``: find the command, import only its module, turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys

import click

from sandbox import __version__
from sandbox.errors import AgentRunnerError, HostError

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("sandbox.cli.run", "Run one task in a fresh container under a policy."),
    "apply": ("sandbox.cli.apply", "Apply a session's patch to the workspace."),
    "sessions": ("sandbox.cli.sessions", "List sessions, or show what one did."),
    "verify": ("sandbox.cli.verify", "Check a session's record: ledger, statement and patch."),
    "selftest": ("sandbox.cli.selftest", "Try to break out of the sandbox that a policy asks for."),
    "policy": ("sandbox.cli.policy", "Validate a policy, or show the effective one."),
    "doctor": ("sandbox.cli.doctor", "State what is really enforced on this host."),
    "gc": ("sandbox.cli.gc", "Remove what dead controllers left behind."),
}
"""Name to (module with a click ``command``, help line). The module is imported when it is called."""

USAGE_EXIT = 2
HOST_EXIT = 3


class LazyGroup(click.Group):
    """Lists commands without importing them, so that ``--help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a new user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = module.command
        assert isinstance(command, click.Command)  # noqa: S101  # a broken table, not bad input
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes of `run`: 0 completed, 10-16 the run stopped (see `run --help`), 130 cancelled; "
    "of every command: 2 wrong policy or command line, 3 this host cannot do it.",
)
@click.version_option(__version__, prog_name="agent-runner")
def cli() -> None:
    """Run work that nobody should trust in a fresh container under a policy file.

    Hands back a result that a machine can parse, a patch that a person can review, and a sealed
    record that proves what was allowed, what happened and what it cost.

    \b
    Examples:
      agent-runner run --task "fix the failing test" --workspace . --model script:turns.yaml
      agent-runner sessions show latest
      agent-runner verify latest && agent-runner apply latest
    """


def main() -> None:
    """Run the command line; every known error is one line on stderr."""
    _prepare_standard_streams()
    try:
        code = cli.main(prog_name="agent-runner", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        sys.exit(USAGE_EXIT)
    except click.ClickException as exc:
        click.echo(f"agent-runner: {_usage_message(exc)}", err=True)
        sys.exit(USAGE_EXIT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("agent-runner: cancelled", err=True)
        sys.exit(130)
    except AgentRunnerError as exc:
        click.echo(f"agent-runner: {exc}", err=True)
        sys.exit(HOST_EXIT if isinstance(exc, HostError) else USAGE_EXIT)
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_standard_streams() -> None:
    """Open the standard streams that the caller closed; else the next file opened, a ledger say, is one.

    Text that the terminal's encoding lacks is shown escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _usage_message(exc: click.ClickException) -> str:
    message = " ".join(exc.format_message().split()).rstrip(".")
    command = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "agent-runner"
    return f"{message}; see {command} --help"


if __name__ == "__main__":
    main()
