"""How a shell was called, read from its arguments alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sandbox.policy.commands.invocation import LOGIN_LETTERS, UnknownOption, read_invocation

TEXT = [
    (["-c", "echo hi"], 1),
    (["-lc", "echo hi"], 1),
    (["-e", "-c", "echo hi", "name", "argument"], 2),
    (["-o", "pipefail", "-c", "echo hi"], 3),
    (["-ceuo", "pipefail", "echo hi"], 2),
    (["--norc", "--noprofile", "-c", "echo hi"], 3),
    (["-c", "--", "echo hi"], 2),
    (["+x", "-c", "echo hi"], 2),
]


@pytest.mark.parametrize(("arguments", "index"), TEXT)
def test_the_text_that_runs_is_found(arguments: list[str], index: int) -> None:
    called = read_invocation(arguments, LOGIN_LETTERS)
    assert (called.kind, arguments[called.index]) == ("text", "echo hi")
    assert called.index == index


@pytest.mark.parametrize(("arguments", "index"), TEXT)
def test_bash_runs_that_very_text(arguments: list[str], index: int) -> None:
    """The control: what a real bash does with the same arguments."""
    ran = subprocess.run(["bash", *arguments], capture_output=True, text=True, check=False)
    assert ran.stdout == "hi\n", ran


@pytest.mark.parametrize(
    "arguments", [["good.sh"], ["-e", "good.sh", "-c"], ["--", "good.sh"], ["-x", "good.sh"]]
)
def test_a_script_is_a_file_and_not_its_arguments(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "good.sh").write_text("echo hi\n")
    called = read_invocation(arguments)
    assert (called.kind, arguments[called.index]) == ("file", "good.sh")
    ran = subprocess.run(["bash", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.stdout == "hi\n", ran


@pytest.mark.parametrize("arguments", [[], ["-"], ["-e"], ["/dev/stdin"], ["/proc/self/fd/0"], [""]])
def test_commands_on_standard_input_are_no_text(arguments: list[str]) -> None:
    assert read_invocation(arguments).kind == "input"


@pytest.mark.parametrize(
    "arguments",
    [["-i", "-c", "x"], ["-s", "a"], ["--rcfile", "f", "-c", "x"], ["--init-file=f"], ["-o", "vi", "-c", "x"],
     ["-O", "extglob", "-c", "x"], ["-o"], ["--unknown"]],
)  # fmt: skip
def test_options_that_may_change_what_runs_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UnknownOption):
        read_invocation(arguments, LOGIN_LETTERS)


def test_a_login_shell_is_known_only_where_it_is_asked_for() -> None:
    with pytest.raises(UnknownOption):
        read_invocation(["-lc", "x"])


def test_a_word_that_is_not_known_beforehand_decides_nothing() -> None:
    assert read_invocation(["-c", None]).kind == "dynamic"
    assert read_invocation([None, "-c"]).kind == "dynamic"
    assert read_invocation(["--version"]).kind == "nothing"
