"""Say what an attempt means, given what its control did. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sandbox.probe.model import Difference, Finding, Probe, Seen

LISTED = 6


def judge(
    probe: Probe,
    seen: Seen | None,
    control_seen: Seen | None,
    accepted: Mapping[str, str],
    untried: str = "",
    difference: Difference | None = None,
) -> Finding:
    """Return what a probe found.

    ``seen`` is None for one that was not tried, ``untried`` then says why. ``difference`` is how it is known
    to end under the runtime at hand. Only a forbidden thing that was
    refused in the expected way *and* works in the permissive container counts as blocked.
    """
    if probe.skip:
        return Finding(probe, "skipped", reason=probe.skip)
    if untried:
        return Finding(probe, "untestable", reason=untried)
    if seen is None:
        return Finding(probe, "failed", None, control_seen, "no answer came from the container")
    if probe.side == "allow":
        if seen.verdict == "worked":
            return Finding(probe, "works", seen)
        outcome = "refused" if seen.verdict == "blocked" else "failed"
        return Finding(probe, outcome, seen, reason="it must work")  # type: ignore[arg-type]  # one of two literals
    if difference is not None and seen.verdict == difference.verdict:
        return Finding(probe, "accepted", seen, control_seen, difference.reason)
    if seen.verdict == "worked":
        if probe.id in accepted:
            return Finding(probe, "accepted", seen, control_seen, accepted[probe.id])
        return Finding(probe, "worked", seen, control_seen, _expected(probe))
    if seen.verdict == "failed" or (probe.refusals and seen.detail not in probe.refusals):
        # A kernel that has no such thing answers the same everywhere.
        if probe.may_be_untestable and seen == control_seen:
            return Finding(probe, "untestable", seen, control_seen, "this kernel cannot show it")
        return Finding(probe, "failed", seen, control_seen, _expected(probe))
    if control_seen is not None and control_seen.verdict == "worked":
        return Finding(probe, "blocked", seen, control_seen)
    answer = f"{control_seen.verdict} {control_seen.detail}" if control_seen else "no answer"
    if probe.may_be_untestable and control_seen is not None:
        return Finding(
            probe, "untestable", seen, control_seen, f"the permissive container answers {answer} too"
        )
    return Finding(
        probe, "failed", seen, control_seen, f"its control must work, and the permissive container: {answer}"
    )


def _expected(probe: Probe) -> str:
    words = sorted(probe.refusals)
    if not words:
        return "it must be refused"
    return "expected " + " or ".join(words[:LISTED])
