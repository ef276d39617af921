"""Say in sentences what a policy grants, and how that changes from one policy to another. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.policy.model import MIB, HostEntry, Policy


@dataclass(frozen=True)
class ReachChange:
    """What the new policy grants that the old did not, and the other way round."""

    added: tuple[str, ...]
    """New grants, and restrictions that are gone."""
    removed: tuple[str, ...]
    """Grants that are gone, and new restrictions."""


def reach(policy: Policy) -> list[str]:
    """List what a session under this policy can reach: one sentence a kind, in a stable order."""
    grouped: dict[str, list[str]] = {}
    for point in _points(policy):
        grouped.setdefault(point.kind, []).append(point.item)
    return [f"{kind}: {', '.join(items)}" for kind, items in grouped.items()]


def reach_change(old: Policy, new: Policy) -> ReachChange:
    """Compare two policies point by point; losing a restriction counts as reach that was added."""
    before, after = _points(old), _points(new)
    came = [point for point in after if point not in before]
    went = [point for point in before if point not in after]
    return ReachChange(
        added=(
            *(f"{point.kind}: {point.item}" for point in came if not point.is_restriction),
            *(f"no longer {point.kind}: {point.item}" for point in went if point.is_restriction),
        ),
        removed=(
            *(f"{point.kind}: {point.item}" for point in went if not point.is_restriction),
            *(f"now {point.kind}: {point.item}" for point in came if point.is_restriction),
        ),
    )


@dataclass(frozen=True)
class _Point:
    kind: str
    item: str
    is_restriction: bool = False


def _points(policy: Policy) -> list[_Point]:
    return [*_network(policy), *_files(policy), *_commands(policy), *_spend(policy)]


def _network(policy: Policy) -> list[_Point]:
    network = policy.network
    points = [_Point("network may reach", _host(entry)) for entry in network.allowlist]
    points += [
        _Point("network may reach the hosts configured for", client) for client in network.package_indexes
    ]
    if not points:
        return [_Point("network may reach", "nothing", is_restriction=True)]
    points += [_Point("network never reaches", pattern, is_restriction=True) for pattern in network.denylist]
    points += [_Point("credentials are put on requests to", item.host) for item in network.inject]
    if not network.enforce_tls:
        points.append(_Point("network speaks", "plain HTTP too"))
    return points


def _host(entry: HostEntry) -> str:
    ports = "" if entry.ports == (443,) else f" (port {' '.join(map(str, entry.ports))})"
    return entry.host + ports + (" (listed requests only)" if entry.rules else "")


def _files(policy: Policy) -> list[_Point]:
    files = policy.filesystem
    points = [_Point("files", "read and change the workspace; changes become a patch")]
    points += [_Point("files hidden", pattern, is_restriction=True) for pattern in files.deny_patterns]
    if policy.shell.workspace_exec:
        points.append(_Point("files that can be executed", "those of the workspace too"))
    return points


def _commands(policy: Policy) -> list[_Point]:
    shell = policy.shell
    points = [_Point("commands allowed", name) for name in shell.allowed_binaries]
    if shell.mode == "open":
        points.append(_Point("programs that allowed ones may start", "any of the image that is not blocked"))
    points += [
        _Point("programs that nothing can run", name, is_restriction=True) for name in shell.blocked_commands
    ]
    if shell.require_confirmation:
        points.append(_Point("commands ask", "a person first", is_restriction=True))
        points += [_Point("commands that do not ask", pattern) for pattern in shell.pre_approved]
    return points


def _spend(policy: Policy) -> list[_Point]:
    routing, limits = policy.routing, policy.limits
    dollars = 5.0 if routing.max_budget_usd is None else routing.max_budget_usd
    calls = 200 if routing.max_tool_calls is None else routing.max_tool_calls
    return [
        _Point("spend", f"up to ${dollars:.2f} on models"),
        _Point("spend", f"up to {calls} tool calls"),
        _Point("limits", f"{limits.memory_bytes // MIB} MiB memory"),
        _Point("limits", f"{limits.cpus:g} CPUs"),
        _Point("limits", f"{limits.pids} processes"),
        _Point("limits", f"{limits.wall_seconds} s a session"),
        _Point("limits", f"{limits.command_seconds} s a command"),
        _Point("runs under", f"{policy.runtime} with seccomp profile {policy.seccomp}"),
    ]
