"""The probes that no policy names, as ``images/probe/probes.yaml`` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sandbox.policy.model import Policy
from sandbox.probe.model import Act, Area, Difference, Probe
from sandbox.resources import shipped

SHIPPED_PROFILE = "agent"
GVISOR_ANSWERS = frozenset(("EPERM", "ENOSYS"))
"""What gVisor answers to whatever a profile refuses, whichever errno that names."""


@dataclass(frozen=True)
class Catalogue:
    """What is tried under every policy."""

    probes: tuple[Probe, ...]
    accepted: dict[str, str]
    """Id to reason: what may work although it would better not."""
    differences: dict[str, Difference]
    """By id: what ends otherwise under this policy's runtime."""


def load_catalogue(policy: Policy) -> Catalogue:
    """Read the shipped list, as it applies to a policy. Raises StateError when it is missing."""
    data = _read("probes.yaml")
    is_gvisor = policy.runtime == "runsc"
    probes: list[Probe] = []
    for group in data["system_calls"]:
        # Which of its answers another profile gives, its author decides.
        expect = frozenset(group["expect"]) if policy.seccomp == SHIPPED_PROFILE else frozenset()
        if expect and is_gvisor:
            expect |= GVISOR_ANSWERS
        probes += _group(group, "kernel", expect)
    for group in data["surroundings"]:
        if group.get("when") == "workspace_noexec" and policy.shell.workspace_exec:
            probes += [
                Probe(name, group["area"], "allow", what, "shell.workspace_exec: true", Act("probe"))
                for name, what in group["probes"].items()
            ]
        else:
            probes += _group(group, group["area"], group.get("expect", ("absent", "EPERM", "EACCES")))
    known = {probe.id for probe in probes}
    differences = {
        name: Difference(entry["runsc"], entry["reason"])
        for name, entry in (_read("runsc.yaml") if is_gvisor else {}).items()
        if name in known
    }
    return Catalogue(tuple(probes), dict(data["accepted"]), differences)


@cache
def _read(name: str) -> Any:  # YAML
    import yaml

    return yaml.safe_load(shipped(f"images/probe/{name}").read_text(encoding="utf-8"))


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
