"""What a changed network policy means for a gateway that runs. Pure: decides, cuts nothing. D5"""

from __future__ import annotations

from typing import Any

from sandbox.errors import PolicyError
from sandbox.policy.hosts import Authority, EgressDecision, decide_egress, inspected_hosts, is_denied
from sandbox.policy.model import HostEntry, NetworkPolicy

_REMEDY = "start a new session for it"


def refuse_what_needs_a_new_session(first: NetworkPolicy, new: NetworkPolicy) -> None:
    """Raise PolicyError for what a container cannot learn any more: trust in TLS that is opened, credentials.

    ``first`` is the policy that the session began with, which its certificate authority was made for.
    """
    covered = inspected_hosts(first)
    for host in inspected_hosts(new):
        if host not in covered:
            raise PolicyError(
                f"cannot inspect {host} in a running session: its container trusts the session's "
                f"certificates for what was inspected at its start only; {_REMEDY}"
            )
    if new.inject != first.inject:
        raise PolicyError(f"cannot change network.inject in a running session; {_REMEDY}")
    if new.package_indexes != first.package_indexes:
        raise PolicyError(
            "cannot change network.package_indexes in a running session: its clients were told theirs; "
            + _REMEDY
        )


def judge_again(
    before: NetworkPolicy,
    now: NetworkPolicy,
    old: EgressDecision,
    target: Authority,
    addresses: tuple[str, ...],
) -> EgressDecision | None:
    """Return the new decision on a connection under way when it may go on just as it is, else None.

    Just as it is: matched by the same entry, which asks for the same inspection and rules, and led to
    addresses that nobody denies. ``old`` is a decision that allowed it.
    """
    new = decide_egress(now, target.host, target.port)
    if not new.is_allowed or new.entry is None or old.entry is None:
        return None
    if now.enforce_tls and not before.enforce_tls:
        return None  # nobody has looked at its first bytes
    if _meaning(new.entry) != _meaning(old.entry):
        return None
    if any(is_denied(now, address) for address in addresses):
        return None
    return new


def _meaning(entry: HostEntry) -> dict[str, Any]:  # JSON data of the entry
    # Ports and budgets are judged apart: a port more, or bytes that still are left, change nothing.
    return entry.model_dump(exclude={"ports", "max_bytes"})
