"""The probes that no policy names, as ``images/probe/probes.yaml`` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sandbox.policy.model import Policy
from sandbox.probe.model import Act, Area, Probe
from sandbox.resources import shipped

NEEDS = "need-"
SHIPPED_PROFILE = "agent"


@dataclass(frozen=True)
class Catalogue:
    """What is tried under every policy."""

    probes: tuple[Probe, ...]
    accepted: dict[str, str]
    """Id to reason: what may work although it would better not."""


def load_catalogue(policy: Policy) -> Catalogue:
    """Read the shipped list, as it applies to a policy. Raises StateError when it is missing."""
    data = _read()
    probes: list[Probe] = []
    for group in data["system_calls"]:
        # Which of its answers another profile gives, its author decides.
        expect = group["expect"] if policy.seccomp == SHIPPED_PROFILE else ()
        probes += _group(group, "kernel", expect)
    for group in data["surroundings"]:
        if group.get("when") == "workspace_noexec" and policy.shell.workspace_exec:
            probes += [
                Probe(name, group["area"], "allow", what, "shell.workspace_exec: true", Act("probe"))
                for name, what in group["probes"].items()
            ]
        else:
            probes += _group(group, group["area"], group.get("expect", ("absent", "EPERM", "EACCES")))
    return Catalogue(tuple(probes), dict(data["accepted"]))


@cache
def _read() -> Any:  # YAML
    import yaml

    return yaml.safe_load(shipped("images/probe/probes.yaml").read_text(encoding="utf-8"))


def _group(group: Any, area: Area, expect: Any) -> list[Probe]:  # YAML
    return [
        Probe(
            name,
            area,
            "deny",
            what,
            group["control"],
            Act("probe"),
            frozenset(expect),
            may_be_untestable=True,
        )
        for name, what in group["probes"].items()
    ]
