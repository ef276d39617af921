"""The progress line: on a terminal what happens, elsewhere nothing, and never what the model wants shown."""

import subprocess
import sys

from tests.unit.cli.on_terminal import Terminal

SHOW = """
from datetime import UTC, datetime
from sandbox.cli.progress import Progress
from sandbox.events import *
from sandbox.provenance.ledger import Entry

with Progress(is_quiet={quiet}) as progress:
    for event in [
        ContainerStarted(container_id="c", runtime="runc", guest_version="1", started_ms=5),
        ToolCall(action_id="a1", tool="[red]x\\x1b[2J", arguments_blake3="", summary="[/bold]\\x1b]0;t\\x07"),
        DecisionMade(action_id="a1", verdict="deny", rule="some[rule]", reason=""),
        ModelCallFailed(call_id="c", attempt=1, kind="x", http_status=1, message="\\x1b[1A", retry_in_ms=5),
        ModelFallback(from_model="a", to_model="b", reason="[link]\\x1b[1A"),
    ]:
        progress(Entry(1, datetime.now(UTC), "", event, ""))
    progress.on_text("\\x1b[2J")
print("END", flush=True)
"""


def test_untrusted_text_is_shown_escaped_and_unstyled() -> None:
    with Terminal(SHOW.format(quiet=False)) as terminal:
        seen = terminal.expect("END")
    assert "container ready after 5 ms" in seen
    assert "denied  [red]x\\x1b[2J: [/bold]\\x1b]0;t\\x07  (some[rule])" in seen.replace("\r\n", "")
    assert "\x1b[2J" not in seen
    assert "\x1b]0;" not in seen


def test_a_quiet_run_shows_nothing() -> None:
    with Terminal(SHOW.format(quiet=True)) as terminal:
        assert terminal.expect("END").strip() == "END"


def test_without_a_terminal_nothing_is_shown() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SHOW.format(quiet=False)], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("END\n", "")
