"""How the programs of an action are told."""

from __future__ import annotations

from sandbox.cli.exec_report import execs_as_data, execs_in_full, execs_line
from sandbox.events import ExecObserved, ToolResult


def observed(path: str, *, verdict: str = "allowed", argv: tuple[str, ...] = ("x",)) -> ExecObserved:
    return ExecObserved.model_validate(
        {
            "action_id": "a", "claimed_pid": 12, "claimed_parent": 3, "claimed_path": path,
            "argv": list(argv), "verdict": verdict,
        }
    )  # fmt: skip


EXECS = [observed("/bin/sh"), *[observed("/usr/bin/cc")] * 3, observed("/usr/bin/curl", verdict="refused")]
CUT = ToolResult(action_id="a", ok=True, execs_unrecorded=7)


def test_a_line_counts_names_and_points_out_what_was_refused() -> None:
    assert execs_line(EXECS, None) == "5 programs: cc x3, sh, curl; refused: curl"
    assert execs_line(EXECS[:1], None) == "1 program: sh"


def test_what_was_left_out_counts() -> None:
    assert execs_line(EXECS[:1], CUT) == "8 programs: sh; 7 not recorded one by one"


def test_an_action_without_programs_has_no_line() -> None:
    assert execs_line([], ToolResult(action_id="a", ok=True)) == ""


def test_many_names_are_not_all_in_the_line() -> None:
    line = execs_line([observed(f"/bin/p{number}") for number in range(20)], None)
    assert line.endswith("and 12 other names")


def test_hostile_names_cannot_drive_the_terminal() -> None:
    text = execs_line([observed("/bin/\x1b[2J")], None) + execs_in_full(
        [observed("/\x1b", argv=("\x1b]0;",))]
    )
    assert "\x1b" not in text


def test_each_exec_has_a_line_in_full() -> None:
    lines = execs_in_full([*EXECS[:1], EXECS[-1], observed("")]).splitlines()
    assert lines == [
        "     3 > 12     /bin/sh  x",
        "     3 > 12     REFUSED /usr/bin/curl  x",
        "     3 > 12     (unreadable)  x",
    ]


def test_machines_get_counts_and_on_request_all() -> None:
    data = execs_as_data(EXECS, CUT, in_full=False)
    assert data == {
        "count": 12, "unrecorded": 7, "refused": 1,
        "programs": {"/usr/bin/cc": 3, "/bin/sh": 1, "/usr/bin/curl": 1},
    }  # fmt: skip
    everything = execs_as_data(EXECS, CUT, in_full=True)["all"]
    assert isinstance(everything, list)
    assert len(everything) == 5
