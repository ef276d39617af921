"""``python -m benchmarks`` as a command: what it refuses, and that a run leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*arguments: str, temporary: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_absent_engine_is_one_clear_line(tmp_path: Path) -> None:
    ended = run("tool_call", temporary=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("benchmarks: cannot ")
    assert not list(tmp_path.iterdir())


@pytest.mark.docker
def test_an_absent_image_is_one_clear_line(tmp_path: Path) -> None:
    ended = run("cold_start", "--image", "no-such-image:here", temporary=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "no-such-image:here" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    ended = run("warp_speed", temporary=tmp_path)
    assert ended.returncode == 2
    assert "no benchmark warp_speed; there are cold_start" in ended.stderr


def test_a_run_without_an_engine_prints_one_document_and_leaves_nothing(tmp_path: Path) -> None:
    ended = run(
        "record", "egress", "--output", "json", temporary=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none.sock"
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert {"record one event", "egress, gateway, bulk"} <= {row["what"] for row in rows}
    assert all(row["ours"]["p50"] > 0 and row["peer"]["p50"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.docker
def test_a_cold_start_is_measured_with_all_its_steps_and_leaves_nothing(tmp_path: Path) -> None:
    ended = run("cold_start", "--output", "json", temporary=tmp_path)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["rows"][0]["what"] == "cold start to first tool result"
    steps = {step["what"]: step["p50"] for step in document["steps"]}
    assert len(steps) == 9
    assert all(seconds > 0 for seconds in steps.values())
    assert not list(tmp_path.iterdir())
