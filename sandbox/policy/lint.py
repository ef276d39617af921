"""Find what a policy says that its author may not mean, and say what it grants. Pure; prints nothing.

Rule ids are stable; ``RULES`` lists them. An *error* contradicts itself or cannot work, a *warning* grants or
promises something other than it seems to, *info* says what a reader should know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sandbox.policy.commands.programs import (
    HARMLESS_BUILTINS,
    OTHER_SHELLS,
    REFUSED_BUILTINS,
    SHELLS,
)
from sandbox.policy.injections import references
from sandbox.policy.model import MIB, HostEntry, Policy
from sandbox.policy.paths import DenyPatterns
from sandbox.policy.shell_remarks import remark_on_shell

Severity = Literal["error", "warning", "info"]

RULES: dict[str, tuple[Severity, str]] = {
    "allowed-and-blocked": ("error", "a program is both allowed and blocked"),
    "root-hidden": ("error", "a deny pattern hides the whole workspace"),
    "literal-credential": ("warning", "an injected value stands in the policy itself"),
    "unbound-key": ("info", "a client's own key for an injected host is let through"),
    "shadowed-pattern": ("warning", "a deny pattern hides nothing that another does not"),
    "shadowed-host": ("warning", "a host entry allows nothing that another does not"),
    "unreachable-host": ("warning", "a host entry is undone by the denylist"),
    "duplicate": ("warning", "the same value is listed twice"),
    "launcher": ("warning", "an allowed program runs others by design while something is blocked"),
    "same-work": ("warning", "an allowed program can do the work of a blocked one"),
    "unlisted-work": ("warning", "a program of a closed shell can do the work of those that are not listed"),
    "built-programs-run": ("warning", "a closed shell runs what is built in the workspace"),
    "unrunnable-path": ("warning", "a listed program of the workspace can never be executed"),
    "docker-without-socket": ("warning", "docker is allowed, but no socket is ever mounted"),
    "plain-http": ("warning", "enforce_tls is off"),
    "wide-wildcard": ("warning", "a host pattern covers names of any depth"),
    "unjudged-program": ("warning", "an allowed program is refused on every command line"),
    "needless-listing": ("info", "a listed name is a builtin that needs no listing"),
    "limits-too-low": ("warning", "limits are so low that ordinary work fails"),
    "no-tool-calls": ("warning", "no tool call or no dollar can be spent"),
    "no-budget": ("info", "a budget is not stated, so the shipped default counts"),
    "nothing-allowed": ("warning", "no program is allowed"),
    "confirmation-unattended": ("info", "confirmation without a terminal denies"),
    "pre-approved-unused": ("warning", "pre_approved has no effect"),
    "helpers-unused": ("warning", "helpers have no effect"),
    "secrets-visible": ("info", "no deny pattern hides common secret files"),
    "no-tests": ("info", "the policy carries no tests"),
}
"""Rule id to severity and summary."""


@dataclass(frozen=True)
class Finding:
    """One remark about a policy."""

    rule: str
    severity: Severity
    message: str
    where: str
    """Dotted key of the policy, list indices included: ``shell.allowed_binaries.3``."""
    line: int = 0
    """Counted from 1; 0 when the policy did not come from a file, or the key is not written there."""
    column: int = 0


Position = Callable[[str], tuple[int, int]]
_Remark = tuple[str, str, str]


def lint_policy(policy: Policy, position: Position | None = None) -> list[Finding]:
    """Return findings, errors first, then in file order. ``position`` gives a key's line and column."""
    findings = []
    for rule, where, message in _remarks(policy):
        line, column = position(where) if position else (0, 0)
        findings.append(Finding(rule, RULES[rule][0], message, where, line, column))
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: (order[finding.severity], finding.line, finding.column))


def _remarks(policy: Policy) -> Iterator[_Remark]:
    yield from _programs(policy)
    yield from remark_on_shell(policy.shell)
    yield from _confirmation(policy)
    yield from _files(policy)
    yield from _hosts(policy)
    yield from _budgets(policy)
    yield from _limits(policy)
    if not policy.tests:
        yield (
            "no-tests",
            "tests",
            "no tests: add a few lines of what must stay denied; they run at every load",
        )


def _programs(policy: Policy) -> Iterator[_Remark]:
    allowed, blocked = policy.shell.allowed_binaries, policy.shell.blocked_commands
    if not allowed:
        yield "nothing-allowed", "shell", "allowed_binaries is empty: every program is refused"
    yield from _duplicates("shell.allowed_binaries", allowed)
    yield from _duplicates("shell.blocked_commands", blocked)
    for index, name in enumerate(allowed):
        where = f"shell.allowed_binaries.{index}"
        if name.rpartition("/")[2] in blocked:
            yield (
                "allowed-and-blocked",
                where,
                f"{name!r} is allowed and blocked; the block wins, so drop one",
            )
        if name in ("docker", "podman", "nerdctl"):
            yield (
                "docker-without-socket",
                where,
                (f"{name!r} is allowed, but no engine socket is ever mounted, so it can reach no engine"),
            )
        if name in REFUSED_BUILTINS or name in OTHER_SHELLS:
            yield (
                "unjudged-program",
                where,
                f"{name!r} is refused on every command line; listing it does nothing",
            )
        elif name in HARMLESS_BUILTINS:
            yield "needless-listing", where, f"{name!r} is a harmless shell builtin and needs no listing"


def _confirmation(policy: Policy) -> Iterator[_Remark]:
    if policy.shell.require_confirmation:
        yield (
            "confirmation-unattended",
            "shell.require_confirmation",
            ("without a terminal each command is denied unless pre_approved matches or --yes is given"),
        )
    elif policy.shell.pre_approved:
        yield (
            "pre-approved-unused",
            "shell.pre_approved",
            "pre_approved does nothing unless require_confirmation is true",
        )
    yield from _duplicates("shell.pre_approved", policy.shell.pre_approved)
    for index, pattern in enumerate(policy.shell.pre_approved):
        if "*" in pattern and not pattern.endswith(" *"):
            yield (
                "pre-approved-unused",
                f"shell.pre_approved.{index}",
                (f"{pattern!r} is compared byte for byte; a prefix ends in a space and a star"),
            )


def _files(policy: Policy) -> Iterator[_Remark]:
    patterns = policy.filesystem.deny_patterns
    yield from _duplicates("filesystem.deny_patterns", patterns)
    for index, pattern in enumerate(patterns):
        where = f"filesystem.deny_patterns.{index}"
        own = DenyPatterns((pattern,))
        if own.match(b"") or all(own.match(probe) for probe in _ROOT_PROBES):
            yield (
                "root-hidden",
                where,
                f"{pattern!r} hides the whole workspace; nothing would be left to work on",
            )
            continue
        others = [other for other in patterns if other != pattern]
        samples = [sample for sample in _samples(pattern) if own.match(sample)]
        hiding = next(
            (o for o in others if samples and all(DenyPatterns((o,)).match(s) for s in samples)), None
        )
        if hiding is not None:
            yield (
                "shadowed-pattern",
                where,
                f"{pattern!r} hides nothing that {hiding!r} does not hide already",
            )
    every = DenyPatterns(patterns)
    if not every.match(b".env"):
        yield "secrets-visible", "filesystem.deny_patterns", "no pattern hides .env files; add '**/.env*'"


_ROOT_PROBES = (b"a", b"README.md", b"src/main.py", b".hidden", b"x/y/z.txt")


def _samples(pattern: str) -> list[bytes]:
    """Paths a simple pattern hides; empty when the pattern is too clever to be compared by samples."""
    if any(character in pattern for character in "[]?\\!{}"):
        return []
    inner = pattern.strip("/")
    found = []
    for deep in ("", "q7", "q7/w8"):
        for star in ("", "e9"):
            text = inner.replace("**/", f"{deep}/" if deep else "").replace(
                "/**", "/r4" + ("/t5" if deep else "")
            )
            text = text.replace("*", star).strip("/")
            if text:
                found += [text.encode(), f"{deep}/{text}".strip("/").encode()]
    return found


def _hosts(policy: Policy) -> Iterator[_Remark]:
    network = policy.network
    if not network.enforce_tls and (network.allowlist or network.package_indexes):
        yield (
            "plain-http",
            "network.enforce_tls",
            ("enforce_tls is off: plain HTTP is let through, and names are not checked against TLS"),
        )
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, entry in enumerate(network.allowlist):
        where = f"network.allowlist.{index}"
        same = seen.setdefault((entry.host.lower(), entry.ports), index)
        if same != index:
            yield "duplicate", where, f"{entry.host!r} is already entry {same + 1} of the allowlist"
            continue
        if entry.host.startswith("**."):
            yield "wide-wildcard", where, f"{entry.host!r} covers every name beneath it, at any depth"
        cover = next((o for o in network.allowlist if o is not entry and _covers(o, entry)), None)
        if cover is not None:
            yield (
                "shadowed-host",
                where,
                f"{entry.host!r} allows nothing that {cover.host!r} does not allow already",
            )
        undone = next((d for d in network.denylist if _pattern_covers(d, entry.host)), None)
        if undone is not None:
            yield "unreachable-host", where, f"{entry.host!r} can never be reached: denylist {undone!r} wins"
    yield from _duplicates("network.denylist", network.denylist)
    for index, injection in enumerate(network.inject):
        where = f"network.inject.{index}"
        if not any(references(injection.value)):
            yield (
                "literal-credential",
                where,
                f"{injection.header} for {injection.host!r} is spelt out: whoever reads the policy or its "
                "record reads it; use ${NAME} or ${file:/path}",
            )
        if injection.mode == "replace_placeholder":
            yield (
                "unbound-key",
                where,
                f"{injection.header} for {injection.host!r} without the placeholder passes as the client "
                "sent it, with another account's key too; mode replace_always does not let it",
            )


def _covers(wide: HostEntry, narrow: HostEntry) -> bool:
    if wide.host.lower() == narrow.host.lower():
        return set(wide.ports) > set(narrow.ports) and not wide.rules
    return _pattern_covers(wide.host, narrow.host) and set(wide.ports) >= set(narrow.ports) and not wide.rules


def _pattern_covers(wide: str, narrow: str) -> bool:
    wide, narrow = wide.lower(), narrow.lower()
    if wide == narrow:
        return True
    if wide.startswith("**."):
        return narrow.endswith(wide[2:]) and narrow != wide[3:]
    if wide.startswith("*."):
        return narrow.partition(".")[2] == wide[2:] and not narrow.startswith("*")
    return False


def _budgets(policy: Policy) -> Iterator[_Remark]:
    routing = policy.routing
    if routing.max_budget_usd is None:
        yield "no-budget", "routing", "max_budget_usd is not stated; a session may spend 5.00"
    elif routing.max_budget_usd == 0:
        yield (
            "no-tool-calls",
            "routing.max_budget_usd",
            "max_budget_usd is 0: only models priced at zero can be asked",
        )
    if routing.max_tool_calls is None:
        yield "no-budget", "routing", "max_tool_calls is not stated; a session may make 200"
    elif routing.max_tool_calls == 0:
        yield "no-tool-calls", "routing.max_tool_calls", "max_tool_calls is 0: the agent can do nothing"


def _limits(policy: Policy) -> Iterator[_Remark]:
    limits = policy.limits
    low = (
        ("memory_bytes", limits.memory_bytes, 128 * MIB),
        ("pids", limits.pids, 16),
        ("cpus", limits.cpus, 0.1),
        ("tmpfs_bytes", limits.tmpfs_bytes, 8 * MIB),
        ("wall_seconds", limits.wall_seconds, 10),
        ("command_seconds", limits.command_seconds, 2),
    )
    for name, value, least in low:
        if value < least:
            yield "limits-too-low", f"limits.{name}", f"{name} {value} is less than most tools need ({least})"
    if limits.command_seconds > limits.wall_seconds:
        yield "limits-too-low", "limits.command_seconds", "one command may take longer than the whole session"
    shells = [name for name in policy.shell.allowed_binaries if name in SHELLS]
    if shells and limits.pids < 32:
        yield "limits-too-low", "limits.pids", "pids is low for a policy that allows a shell"


def _duplicates(where: str, values: tuple[str, ...]) -> Iterator[_Remark]:
    for index, value in enumerate(values):
        if value in values[:index]:
            yield "duplicate", f"{where}.{index}", f"{value!r} is listed twice"
