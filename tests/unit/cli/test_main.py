"""The command line as a process: quick to help, one line for an error, honest exit codes."""

import subprocess
import sys

import pytest

from sandbox.cli.main import COMMANDS

HEAVY = ("docker", "anthropic", "ollama", "rich", "pydantic", "cryptography", "yaml", "jsonschema", "httpx")


def run(*arguments: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sandbox.cli.main", *arguments]
    if shell:
        argv = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *argv]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"Usage: agent-runner {command}")
    assert shown.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    look = (
        "import sys\n"
        "from sandbox.cli.main import main\n"
        "sys.argv = ['agent-runner', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage: agent-runner" in shown.stdout
    assert shown.stderr.strip() == "[]"
    # The control: the same look finds what a command imports.
    control = look.replace("'--help'", "'run', '--task', 't', '--policy', '/no/such/file'").replace(
        "assert end.code == 0", "assert end.code == 2"
    )
    loaded = subprocess.run([sys.executable, "-c", control], capture_output=True, text=True, timeout=60)
    assert "'pydantic'" in loaded.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("run",),
        ("run", "--task", "t", "--no-such-option"),
        ("run", "--task", "t", "--budget-limit", "-1"),
        ("run", "--task", "t", "--budget-limit", "much"),
        ("run", "--task", "t", "--max-tool-calls", "1.5"),
        ("run", "--task", "t", "--policy", "/no/such/policy.yaml"),
        ("policy", "validate", "/no/such/policy.yaml"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("agent-runner: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_closed_standard_stream_is_no_crash(shell: str) -> None:
    assert run("run", "--task", "t", "--policy", "/no/such/policy.yaml", shell=shell).returncode == 2
