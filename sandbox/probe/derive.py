"""Derive a self-test from a policy and an image: pure, printable, the same for the same input."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.container.image_index import ImageIndex
from sandbox.errors import PolicyError
from sandbox.policy.model import Policy
from sandbox.probe.catalogue import load_catalogue
from sandbox.probe.files import Decoys, file_probes
from sandbox.probe.inspection import stand_in_credentials
from sandbox.probe.limits import limit_probes
from sandbox.probe.model import Difference, Probe
from sandbox.probe.network import network_probes
from sandbox.probe.shell import shell_probes


@dataclass(frozen=True)
class SelftestPlan:
    """What will be tried, and what must be there for it."""

    probes: tuple[Probe, ...]
    decoys: Decoys
    accepted: dict[str, str]
    differences: dict[str, Difference]


def derive(policy: Policy, index: ImageIndex) -> SelftestPlan:
    """Return every probe for a policy on an image. Raises PolicyError when two would have one id."""
    catalogue = load_catalogue(policy)
    files, decoys = file_probes(policy.filesystem)
    probes = (
        *network_probes(policy.network, stand_in_credentials(policy.network)),
        *files,
        *shell_probes(policy.shell, index),
        *limit_probes(policy.limits, is_gvisor=policy.runtime == "runsc"),
        *catalogue.probes,
    )
    seen: set[str] = set()
    for probe in probes:
        if probe.id in seen:
            raise PolicyError(
                f"cannot derive probes: two would be called {probe.id}; remove the double entry"
            )
        seen.add(probe.id)
    return SelftestPlan(probes, decoys, catalogue.accepted, catalogue.differences)
