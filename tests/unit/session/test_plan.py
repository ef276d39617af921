"""What a run settles before anything is created."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.budget import MAX_AMOUNT, Meter
from sandbox.errors import PolicyError
from sandbox.policy.load import load_policy
from sandbox.session.plan import NANO, RunPlan, RunRequest, plan_run


def plan(directory: Path, profile: dict[str, Any] | None = None, **asked: Any) -> RunPlan:
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"production": profile or {}}}))
    asked = {"task": "t", "model": "script:x", **asked}
    return plan_run(RunRequest(loaded=load_policy(path, None), **asked), {}, directory)


def test_defaults_are_written_into_the_policy_that_is_recorded(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.policy.routing.max_budget_usd == 5.0
    assert made.limits == {
        "usd_nano": 5 * NANO,
        "tool_calls": 200,
        "wall_ms": 3_600_000,
        "written_bytes": 4 << 30,
    }
    assert made.policy.digest() != load_policy(tmp_path / "policy.yaml", None).policy.digest()


def test_the_command_line_lowers_a_ceiling(tmp_path: Path) -> None:
    routing = {"routing": {"max_budget_usd": 3.0, "max_tool_calls": 9}}
    made = plan(tmp_path, routing, budget_usd=0.5, max_tool_calls=0, context_window=5)
    assert (made.limits["usd_nano"], made.limits["tool_calls"]) == (NANO // 2, 0)
    assert made.policy.session.max_tokens == 5


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"budget_usd": 3.01}, "--budget-limit"),
        ({"max_tool_calls": 10}, "--max-tool-calls"),
        ({"context_window": 64_001}, "--context-window"),
    ],
)
def test_the_command_line_cannot_raise_a_ceiling(tmp_path: Path, asked: dict[str, Any], option: str) -> None:
    with pytest.raises(PolicyError, match=f"cannot raise {option}"):
        plan(tmp_path, {"routing": {"max_budget_usd": 3.0, "max_tool_calls": 9}}, **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"budget_usd": float("nan")},
        {"budget_usd": float("inf")},
        {"budget_usd": 1e300},
        {"budget_usd": 1e7},
        {"max_tool_calls": 10**30},
        {"task": "\udcff"},
        {"model": "script:\udcff"},
        {"fallback_model": "\udcff"},
        {"image": "\udcff"},
        {"image": " "},
        {"model": None},
    ],
)
def test_what_cannot_be_counted_or_recorded_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(PolicyError) as refused:
        plan(tmp_path, **asked)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "asked", [{"budget_usd": 9_007_199}, {"budget_usd": 0}, {"max_tool_calls": MAX_AMOUNT}]
)
def test_every_limit_of_a_plan_is_one_a_meter_takes(tmp_path: Path, asked: dict[str, Any]) -> None:
    made = plan(tmp_path, {"limits": {"wall_seconds": 31_536_000}}, **asked)
    assert Meter(made.limits).limits == made.limits


def test_the_package_clients_that_are_asked_are_given_no_key(tmp_path: Path) -> None:
    """Whoever may read ``/proc/PID/environ`` of such a child would have it."""
    (tmp_path / "bin").mkdir()
    npm, seen = tmp_path / "bin" / "npm", tmp_path / "seen"
    npm.write_text(f'#!/bin/sh\nenv >> {seen}\necho \'{{"registry": "https://npm.test/"}}\'\n')
    npm.chmod(0o755)
    path = tmp_path / "policy.yaml"
    network = {
        "allowlist": [{"host": "api.test", "inspect": True}],
        "package_indexes": ["npm"],
        "inject": [{"host": "api.test", "header": "Authorization", "value": "Bearer ${API_TOKEN}"}],
    }
    path.write_text(yaml.safe_dump({"profiles": {"production": {"network": network}}}))
    secrets = {"API_TOKEN": "the-secret-value", "ANTHROPIC_API_KEY": "the-secret-key"}
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "npm_config_x": "kept", **secrets}
    made = plan_run(RunRequest(task="t", loaded=load_policy(path, None), model="script:x"), environ, tmp_path)
    assert made.index_env == {"npm_config_registry": "https://npm.test/"}
    assert "npm_config_x=kept" in seen.read_text()
    assert "the-secret" not in seen.read_text()
    assert "the-secret" not in repr(made)
