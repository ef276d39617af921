"""Say in sentences what a policy grants, and how that changes from one policy to another. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.policy.model import MIB, HostEntry, Policy


@dataclass(frozen=True)
class ReachChange:
    """What the new policy grants that the old did not, and the other way round."""

    added: tuple[str, ...]
    removed: tuple[str, ...]


def reach(policy: Policy) -> list[str]:
    """List what a session under this policy can reach, one grant a sentence, in a stable order."""
    return [*_network(policy), *_files(policy), *_commands(policy), *_spend(policy), *_limits(policy)]


def reach_change(old: Policy, new: Policy) -> ReachChange:
    """Compare two policies grant by grant."""
    before, after = reach(old), reach(new)
    return ReachChange(
        added=tuple(grant for grant in after if grant not in before),
        removed=tuple(grant for grant in before if grant not in after),
    )


def _network(policy: Policy) -> list[str]:
    network = policy.network
    grants = [_host(entry) for entry in network.allowlist]
    grants += [
        f"network: the hosts this machine's {client} is configured for" for client in network.package_indexes
    ]
    grants += [f"network: never {pattern}" for pattern in network.denylist]
    grants += [f"network: a credential is put on requests to {item.host}" for item in network.inject]
    if not grants:
        return ["network: no destination"]
    return [*grants, "network: TLS only" if network.enforce_tls else "network: plain HTTP too"]


def _host(entry: HostEntry) -> str:
    depth = ""
    if entry.host.startswith("**."):
        depth = " (names of any depth)"
    elif entry.host.startswith("*."):
        depth = " (one more label)"
    limited = ", only its listed requests" if entry.rules else ""
    return f"network: {entry.host}{depth} on port {', '.join(map(str, entry.ports))}{limited}"


def _files(policy: Policy) -> list[str]:
    hidden = [f"files: {pattern} does not exist" for pattern in policy.filesystem.deny_patterns]
    everything = "files: read and change the workspace (changes become a patch)"
    built = ["files: programs in the workspace can be executed"] if policy.shell.workspace_exec else []
    return [everything, *hidden, *built]


def _commands(policy: Policy) -> list[str]:
    shell = policy.shell
    grants = [f"commands: {name}" for name in shell.allowed_binaries] or ["commands: none"]
    if shell.mode == "open":
        grants.append("commands: allowed programs may start any program of the image that is not blocked")
    grants += [f"commands: {name} cannot run, in the whole container" for name in shell.blocked_commands]
    if shell.require_confirmation:
        grants.append("commands: each asks a person first")
        grants += [f"commands: {pattern!r} runs without asking" for pattern in shell.pre_approved]
    return grants


def _spend(policy: Policy) -> list[str]:
    routing = policy.routing
    dollars = 5.0 if routing.max_budget_usd is None else routing.max_budget_usd
    calls = 200 if routing.max_tool_calls is None else routing.max_tool_calls
    return [f"spend: up to ${dollars:.2f} on models", f"spend: up to {calls} tool calls"]


def _limits(policy: Policy) -> list[str]:
    limits = policy.limits
    return [
        f"limits: {limits.memory_bytes / MIB:.0f} MiB memory, {limits.cpus:g} CPUs, {limits.pids} processes",
        f"limits: {limits.wall_seconds} s a session, {limits.command_seconds} s a command",
        f"runtime: {policy.runtime}, seccomp profile {policy.seccomp}",
    ]
