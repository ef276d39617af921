"""Blocked counts only where it was expected and where the control works."""

from __future__ import annotations

import pytest

from sandbox.probe.judge import judge
from sandbox.probe.model import Act, Difference, Outcome, Probe, Seen

DENY = Probe("p", "files", "deny", "do it", "a wall", Act("read"), frozenset(("EPERM",)))
KERNEL = Probe("k", "kernel", "deny", "do it", "a wall", Act("probe"), may_be_untestable=True)
ALLOW = Probe("a", "files", "allow", "do it", "a door", Act("read"))
WORKED, BLOCKED = Seen("worked"), Seen("blocked", "EPERM")
OTHER, BROKEN = Seen("blocked", "ENOENT"), Seen("failed", "EFAULT")


@pytest.mark.parametrize(
    ("probe", "seen", "control", "outcome"),
    [
        (DENY, BLOCKED, WORKED, "blocked"),
        (DENY, WORKED, WORKED, "worked"),
        (DENY, WORKED, None, "worked"),
        (DENY, OTHER, WORKED, "failed"),
        (DENY, BROKEN, WORKED, "failed"),
        (DENY, None, WORKED, "failed"),
        (DENY, BLOCKED, BLOCKED, "failed"),
        (DENY, BLOCKED, None, "failed"),
        (KERNEL, BLOCKED, WORKED, "blocked"),
        (KERNEL, BLOCKED, BLOCKED, "untestable"),
        (KERNEL, BLOCKED, BROKEN, "untestable"),
        (KERNEL, BLOCKED, None, "failed"),
        (KERNEL, BROKEN, BROKEN, "untestable"),
        (KERNEL, BROKEN, WORKED, "failed"),
        (KERNEL, WORKED, BLOCKED, "worked"),
        (ALLOW, WORKED, None, "works"),
        (ALLOW, BLOCKED, None, "refused"),
        (ALLOW, BROKEN, None, "failed"),
        (ALLOW, None, None, "failed"),
    ],
)
def test_an_outcome_follows_from_both_containers(
    probe: Probe, seen: Seen | None, control: Seen | None, outcome: Outcome
) -> None:
    finding = judge(probe, seen, control, {})
    assert finding.outcome == outcome
    assert finding.is_failure == (outcome in ("worked", "refused", "failed"))


def test_what_is_accepted_is_shown_with_its_reason_and_only_where_it_works() -> None:
    accepted = judge(DENY, WORKED, WORKED, {"p": "known"})
    assert (accepted.outcome, accepted.reason, accepted.is_failure) == ("accepted", "known", False)
    assert judge(DENY, BLOCKED, WORKED, {"p": "known"}).outcome == "blocked"
    assert judge(DENY, OTHER, WORKED, {"p": "known"}).outcome == "failed"


def test_what_a_runtime_does_otherwise_is_accepted_as_listed_and_not_in_another_way() -> None:
    difference = Difference("failed", "it has none")
    listed = judge(DENY, BROKEN, WORKED, {}, difference=difference)
    assert (listed.outcome, listed.reason) == ("accepted", "it has none")
    assert judge(DENY, WORKED, WORKED, {}, difference=difference).outcome == "worked"
    assert judge(DENY, BLOCKED, WORKED, {}, difference=difference).outcome == "blocked"


def test_what_was_not_tried_never_passes() -> None:
    assert judge(DENY, None, None, {}, "no memory").outcome == "untestable"
