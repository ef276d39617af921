"""Take a changed network policy over while a session runs: as a whole or not at all, and recorded first. D5

Only the gateway can change its mind. Everything else of a policy has become a container, its files and its
limits, so a policy that differs there needs a session of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from sandbox.errors import AgentRunnerError, PolicyError
from sandbox.events import PolicyReloaded, excerpt
from sandbox.policy.model import Policy
from sandbox.session.plan import RunPlan

if TYPE_CHECKING:
    from sandbox.session.opening import OpenSession

_DECIDE_NOTHING = {"tests", "metadata"}
"""Statements about the policy, checked when it is loaded, and text for its reader."""


async def reload_policy(session: OpenSession, read: Callable[[], RunPlan]) -> str:
    """Put the policy that ``read`` returns in force; return what changed, in one line.

    ``read`` runs in a thread and plans the run anew. Names it adds are reachable through the proxy only:
    ``/etc/hosts`` of the container stays as it is. Raises what ``read`` raises, PolicyError for a change
    that a running session cannot take over, and RecordError; in each case the old policy stays in force,
    and all but the last is recorded.
    """
    try:
        policy = (await asyncio.to_thread(_planned, session, read)).policy
        session.gateway.check_reload(policy.network)
    except Exception as exc:
        reason = str(exc) if isinstance(exc, AgentRunnerError) else f"internal error: {type(exc).__name__}"
        _record(session, session.policy_in_force, is_accepted=False, reason=reason)
        raise
    # From here on nothing awaits, so no connection is judged by half of it.
    changed = _changes(session.policy_in_force, policy)
    _record(session, policy, is_accepted=True, reason=changed)
    session.policy_in_force = policy
    session.egress_bytes.change_limits(policy.network)
    session.gateway.reload(policy.network)
    return changed


def _planned(session: OpenSession, read: Callable[[], RunPlan]) -> RunPlan:
    plan = read()
    before = session.plan.policy.model_dump(mode="json", exclude={"network", *_DECIDE_NOTHING})
    after = plan.policy.model_dump(mode="json", exclude={"network", *_DECIDE_NOTHING})
    if changed := sorted(key for key in before if before[key] != after[key]):
        raise PolicyError(
            f"cannot change {', '.join(changed)} of a running session, only network; undo that, or start a "
            "new session for it"
        )
    if plan.index_env != session.plan.index_env:
        raise PolicyError(
            "cannot change the package clients' own configuration in a running session; start a new one"
        )
    return plan


def _changes(before: Policy, after: Policy) -> str:
    old, new = (policy.network.model_dump(mode="json") for policy in (before, after))
    changed = [f"network.{key}" for key in new if new[key] != old[key]]
    return f"{', '.join(changed)} changed" if changed else "nothing changed"


def _record(session: OpenSession, in_force: Policy, *, is_accepted: bool, reason: str) -> None:
    session.recorder.record(
        PolicyReloaded(accepted=is_accepted, policy_blake3=in_force.digest().blake3, reason=excerpt(reason))
    )
