"""A session whose closing failed somewhere is no success."""

import pytest

from sandbox.session.closing import Ending


def test_a_run_that_could_not_be_closed_did_not_complete() -> None:
    ended = Ending("completed", "", "done").after(["cannot seal the record: no space"])
    assert ended == Ending("sandbox_failed", "cannot seal the record: no space", "done")


@pytest.mark.parametrize("ending", [Ending("timed_out", "late"), Ending("cancelled", "stopped")])
def test_any_other_ending_keeps_its_own_reason(ending: Ending) -> None:
    assert ending.after(["cannot seal the record"]) == ending


def test_without_a_problem_nothing_changes() -> None:
    assert Ending("completed", "").after([]).status == "completed"
