"""images/gvisor.sh with stand-ins for docker, runsc and dockerd: what it registers, what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.container.gvisor import find_wrong_args

SCRIPT = Path(__file__).parents[2] / "images" / "gvisor.sh"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root configures an engine"),
]

DOCKER = '#!/bin/sh\ncat "$STAND_IN/runtimes" 2>/dev/null || true\n'
DOCKERD = """#!/bin/sh
trap 'cat "$STAND_IN/daemon.json" >"$STAND_IN/read"; echo "runc runsc" >"$STAND_IN/runtimes"' HUP
echo ready
while :; do sleep 0.05; done
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("docker", DOCKER),
        ("runsc", "#!/bin/sh\necho runsc version 1\n"),
        ("dockerd", DOCKERD),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    engine = subprocess.Popen(
        [tmp_path / "bin" / "dockerd"], env=os.environ | {"STAND_IN": str(tmp_path)}, stdout=subprocess.PIPE
    )
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"ready\n"
    (tmp_path / "pid").write_text(str(engine.pid))
    yield tmp_path
    engine.kill()
    engine.wait()
    engine.stdout.close()


def run(place: Path, **env: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": f"{place}/bin:{os.environ['PATH']}", "STAND_IN": str(place)}
    places = {"ENGINE_CONFIG": str(place / "daemon.json"), "ENGINE_PID_FILE": str(place / "pid")}
    return subprocess.run(
        ["sh", str(SCRIPT)],
        env=base | places | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_runsc_is_added_to_what_the_engine_has_and_the_engine_reads_it(stand_in: Path) -> None:
    (stand_in / "daemon.json").write_text('{"debug": true, "runtimes": {"crun": {"path": "/crun"}}}')
    done = run(stand_in)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "gvisor   runsc version 1 registered\n"
    read = json.loads((stand_in / "read").read_text())
    assert read["debug"] is True
    assert read["runtimes"]["crun"] == {"path": "/crun"}
    assert find_wrong_args(read["runtimes"]["runsc"]["runtimeArgs"]) == []


def test_what_somebody_registered_is_left_alone(stand_in: Path) -> None:
    (stand_in / "runtimes").write_text("runc runsc\n")
    done = run(stand_in)
    assert (done.returncode, done.stdout) == (0, "")
    assert not (stand_in / "daemon.json").exists()


def test_a_configuration_that_cannot_be_read_is_left_alone(stand_in: Path) -> None:
    (stand_in / "daemon.json").write_text("{broken")
    done = run(stand_in)
    assert done.returncode == 0
    assert "is not available" in done.stdout
    assert (stand_in / "daemon.json").read_text() == "{broken"


@pytest.mark.parametrize(
    ("env", "pid", "words"),
    [({"DOCKER_HOST": "unix:///x"}, None, "DOCKER_HOST"), ({}, "1", "no dockerd runs")],
)
def test_an_engine_that_is_not_ours_is_left_alone(
    stand_in: Path, env: dict[str, str], pid: str | None, words: str
) -> None:
    if pid:
        (stand_in / "pid").write_text(pid)
    done = run(stand_in, **env)
    assert done.returncode == 0
    assert words in done.stdout
    assert not (stand_in / "daemon.json").exists()
