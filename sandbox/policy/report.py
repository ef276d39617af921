"""Judge policy files as a whole: load every profile, lint it, say its reach. Reads files, prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.errors import PolicyError
from sandbox.policy.lint import Finding, lint_policy
from sandbox.policy.load import InvalidPolicy, LoadedPolicy, load_policy, profile_names
from sandbox.policy.model import Policy
from sandbox.policy.reach import ReachChange, reach, reach_change
from sandbox.policy.source import Problem
from sandbox.resources import shipped


@dataclass(frozen=True)
class PolicyReport:
    """What was found about one profile of one file."""

    source: Path
    profile: str | None
    """None when the file could not be read far enough to know its profiles."""
    policy: Policy | None
    """None when the file is invalid."""
    findings: tuple[Finding, ...]
    change: ReachChange | None = None
    """Against another version, when one was given and both are valid."""

    @property
    def has_errors(self) -> bool:
        """True when this policy must not be used as it is."""
        return any(finding.severity == "error" for finding in self.findings)

    def as_data(self) -> dict[str, Any]:
        """Return JSON-like data for machines."""
        data: dict[str, Any] = {
            "source": str(self.source),
            "profile": self.profile,
            "valid": not self.has_errors,
            "digest": self.policy.digest().as_dict() if self.policy else None,
            "findings": [vars(finding) for finding in self.findings],
            "reach": reach(self.policy) if self.policy else [],
        }
        if self.change is not None:
            data["change"] = {"added": list(self.change.added), "removed": list(self.change.removed)}
        return data


def policy_files(path: Path | None, working_dir: Path) -> list[Path]:
    """Return the files to judge: the one given, those of a directory, or what a run would choose from.

    Without a path: ``agent-policy/``, else ``agent-policy.yaml``, else the shipped policies.
    """
    if path is None:
        for candidate in (working_dir / "agent-policy", working_dir / "agent-policy.yaml"):
            if candidate.exists():
                path = candidate.relative_to(working_dir) if working_dir == Path.cwd() else candidate
                break
        else:
            path = shipped("policy")
    if not path.is_dir():
        return [path]
    files = sorted(file for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
    if not files:
        raise PolicyError(f"cannot validate {path}: it holds no .yaml file; name a policy file")
    return files


def report_on(file: Path, profile: str | None, against: Path | None) -> list[PolicyReport]:
    """Judge every profile of a file, or the one named. Raises PolicyError when a file cannot be read."""
    try:
        names = profile_names(file)
        chosen = [profile] if profile is not None else list(names)
        # One load per profile: each has its own tests and positions.
        loaded = [load_policy(file, name) for name in chosen]
    except InvalidPolicy as exc:
        return [PolicyReport(file, profile, None, tuple(_as_finding(problem) for problem in exc.problems))]
    return [_report(one, against, len(loaded) == 1) for one in loaded]


def _report(loaded: LoadedPolicy, against: Path | None, is_only: bool) -> PolicyReport:
    findings = [
        Finding("odd-name", "warning", problem.message, "metadata.environment", problem.line, problem.column)
        for problem in loaded.warnings
    ]
    findings += lint_policy(loaded.policy, loaded.position)
    change = None
    if against is not None:
        # The same profile of the other version; a lone profile is compared whatever it is called.
        other = None if is_only and loaded.policy.name not in profile_names(against) else loaded.policy.name
        change = reach_change(load_policy(against, other).policy, loaded.policy)
    return PolicyReport(loaded.source, loaded.policy.name, loaded.policy, tuple(findings), change)


def _as_finding(problem: Problem) -> Finding:
    rule = "test-failed" if problem.message.startswith("test failed:") else "invalid"
    return Finding(rule, "error", problem.message, "", problem.line, problem.column)
