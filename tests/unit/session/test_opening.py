"""What a session asks of its guest, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sandbox.guest.messages import Relay
from sandbox.policy.load import load_policy
from sandbox.session.opening import _relays
from sandbox.session.plan import RunRequest, plan_run


@pytest.mark.parametrize(
    ("allowlist", "expected"),
    [
        (["docs.test"], [("docs.test", 443)]),
        (["Docs.TEST."], [("docs.test", 443)]),
        ([{"host": "docs.test", "ports": [443, 443]}], [("docs.test", 443)]),
        (
            [{"host": "docs.test", "ports": [443, 8443]}, {"host": "DOCS.test"}, "*.docs.test"],
            [("docs.test", 443), ("docs.test", 8443)],
        ),
    ],
)
def test_each_exact_name_and_port_has_one_relay_however_it_is_spelt(
    allowlist: list[object], expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"p": {"network": {"allowlist": allowlist}}}}))
    plan = plan_run(RunRequest(task="t", loaded=load_policy(path, None), model="script:x"), {}, tmp_path)
    direct = [Relay("127.77.0.1", port, f"{name}:{port}") for name, port in expected]
    assert list(_relays(plan))[1:] == direct
