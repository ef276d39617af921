"""The question at a real terminal: only a typed yes, of this moment, on a line of its own, is a yes."""

import pytest

from tests.unit.cli.on_terminal import Terminal

ASK = """
import asyncio, os, signal, sys, time
from sandbox.cli.confirm import TerminalConfirmer
from sandbox.cli.progress import Progress
from sandbox.session.confirm import Question

QUESTION = Question("a1", "run_command", {text!r}, "because", "0123456789abcdef" * 4)

async def main():
    with Progress(is_quiet=False) as progress:
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        {before}
        try:
            async with asyncio.timeout({seconds}):
                answer = await TerminalConfirmer(progress).ask(QUESTION)
        except asyncio.CancelledError:
            return "CANCELLED"
        except TimeoutError:
            return "TIMED OUT"
    return f"ANSWER {{answer.is_approved}} {{answer.by}}"

print(asyncio.run(main()), flush=True)
"""


def ask(text: str = "git push", before: str = "pass", seconds: float = 60) -> Terminal:
    return Terminal(ASK.format(text=text, before=before, seconds=seconds))


@pytest.mark.parametrize(
    ("keys", "is_approved"),
    [
        ("y\n", True),
        ("yes\n", True),
        (" YES \n", True),
        ("n\n", False),
        ("\n", False),
        ("yy\n", False),
        ("yes please\n", False),
        ("\x04", False),  # Ctrl-D: end of file
        ("y\x04\x04", False),  # half a line is no answer
        ("n\x7fy\n", True),  # typed, erased, typed anew
        ("x" * 3000 + "\n", False),
    ],
)
def test_only_a_clear_yes_is_a_yes(keys: str, is_approved: bool) -> None:
    with ask() as terminal:
        terminal.expect("Approve? [y/N]")
        terminal.type(keys)
        terminal.expect(f"ANSWER {is_approved} terminal")


def test_what_was_typed_before_the_question_answers_nothing() -> None:
    before = (
        "print('TYPE NOW', flush=True); import select; select.select([0], [], []); print('SEEN', flush=True)"
    )
    with ask(before=before) as terminal:
        terminal.expect("TYPE NOW")
        terminal.type("y\n")
        terminal.expect("Approve? [y/N]")
        terminal.type("n\n")
        terminal.expect("ANSWER False terminal")


def test_ctrl_c_abandons_the_question() -> None:
    with ask() as terminal:
        terminal.expect("Approve? [y/N]")
        terminal.type("\x03")
        terminal.expect("CANCELLED")
        assert terminal.process.wait(20) == 0


@pytest.mark.parametrize("keys", ["", "y\x04"])
def test_the_sessions_clock_runs_while_a_person_thinks(keys: str) -> None:
    with ask(seconds=0.5) as terminal:
        terminal.expect("Approve? [y/N]")
        terminal.type(keys)
        terminal.expect("TIMED OUT" if not keys else "ANSWER False")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("git push\x1b[2K\rgit status", "git push\\x1b[2K\\rgit status"),
        ("git push\nApprove? [y/N] y", "git push\\nApprove?"),
        ("git \u202ehsup", "git \\u{202e}hsup"),
        ("git [bold]push[/bold]", "git [bold]push[/bold]"),
    ],
)
def test_what_is_asked_is_shown_as_it_is(text: str, shown: str) -> None:
    with ask(text) as terminal:
        seen = terminal.expect("Approve? [y/N] ").rpartition("needs your approval")[2]
        assert shown in seen
        assert "blake3 0123456789abcdef" in seen
