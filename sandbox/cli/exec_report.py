"""Tell which programs an action started: a line for each action, or all of them."""

from __future__ import annotations

import posixpath
import shlex
from collections import Counter
from collections.abc import Sequence

from sandbox.cli.display import printable
from sandbox.events import ExecObserved, ToolResult

PROGRAMS_SHOWN = 8
PROGRAM_WIDTH = 32
COMMAND_WIDTH = 100


def execs_line(execs: Sequence[ExecObserved], result: ToolResult | None) -> str:
    """Return how many programs there were and the most frequent of them; empty when there was none."""
    left_out = result.execs_unrecorded if result else 0
    total = len(execs) + left_out
    if not total:
        return ""
    line = f"{total} program{'s' if total > 1 else ''}: {_names(execs)}"
    if left_out:
        line += f"; {left_out} not recorded one by one"
    if refused := [exec_ for exec_ in execs if exec_.verdict == "refused"]:
        line += f"; refused: {_names(refused)}"
    return line


def execs_in_full(execs: Sequence[ExecObserved]) -> str:
    """Return one line for each exec, in the order they were seen."""
    lines = []
    for exec_ in execs:
        command = " ".join(shlex.quote(word) for word in exec_.argv) + (" …" if exec_.argv_is_cut else "")
        mark = "REFUSED " if exec_.verdict == "refused" else ""
        path = exec_.claimed_path or "(unreadable)"
        lines.append(
            f"{exec_.claimed_parent:>6} > {exec_.claimed_pid:<6} {mark}{printable(path, COMMAND_WIDTH)}"
            f"  {printable(command, COMMAND_WIDTH)}"
        )
    return "\n".join(lines)


def execs_as_data(
    execs: Sequence[ExecObserved], result: ToolResult | None, *, in_full: bool
) -> dict[str, object]:
    """Return the same for machines; ``programs`` is by claimed path, most frequent first."""
    counts = Counter(exec_.claimed_path for exec_ in execs)
    left_out = result.execs_unrecorded if result else 0
    data: dict[str, object] = {
        "count": len(execs) + left_out,
        "unrecorded": left_out,
        "refused": sum(exec_.verdict == "refused" for exec_ in execs),
        "programs": dict(counts.most_common(None if in_full else PROGRAMS_SHOWN)),
    }
    if in_full:
        data["all"] = [exec_.model_dump(mode="json", exclude={"type", "action_id"}) for exec_ in execs]
    return data


def _names(execs: Sequence[ExecObserved]) -> str:
    counts = Counter(posixpath.basename(exec_.claimed_path) or "(unreadable)" for exec_ in execs)
    shown = [
        printable(name, PROGRAM_WIDTH) + (f" x{count}" if count > 1 else "")
        for name, count in counts.most_common(PROGRAMS_SHOWN)
    ]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} other names" if more > 0 else "")
