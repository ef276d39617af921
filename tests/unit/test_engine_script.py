"""images/engine.sh with stand-ins for docker and dockerd: an engine that is there, absent or dying."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "images" / "engine.sh"

DOCKER = """#!/bin/sh
case "$1" in
info) test -e "$STAND_IN/answers" ;;
version) echo 1.2.3 ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    program(tmp_path, "docker", DOCKER)
    program(tmp_path, "iptables", "#!/bin/sh\n")
    program(tmp_path, "apt-get", '#!/bin/sh\necho "apt-get $*" >>"$STAND_IN/apt"\nexit 1\n')
    program(tmp_path, "dpkg", "#!/bin/sh\nexit 1\n")
    program(tmp_path, "systemctl", "#!/bin/sh\nexit 1\n")
    return tmp_path


def program(place: Path, name: str, text: str) -> None:
    (place / "bin" / name).write_text(text)
    (place / "bin" / name).chmod(0o755)


def run(place: Path, **env: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": f"{place}/bin:{os.environ['PATH']}", "STAND_IN": str(place), "ENGINE_WAIT_SECONDS": "3"}
    return subprocess.run(
        ["sh", str(SCRIPT)],
        env=base | {"ENGINE_LOG": str(place / "log"), "ENGINE_PID_FILE": str(place / "pid")} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_engine_that_answers_is_left_alone(stand_in: Path) -> None:
    (stand_in / "answers").touch()
    program(stand_in, "dockerd", "#!/bin/sh\ntouch $STAND_IN/started\n")
    done = run(stand_in)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (stand_in / "started").exists()


def test_an_engine_that_somebody_chose_is_not_replaced(stand_in: Path) -> None:
    program(stand_in, "dockerd", "#!/bin/sh\ntouch $STAND_IN/started\n")
    done = run(stand_in, DOCKER_HOST="unix:///nowhere")
    assert done.returncode == 1
    assert done.stderr == (
        "no Docker engine answers at DOCKER_HOST=unix:///nowhere: start it, or unset DOCKER_HOST\n"
    )
    assert not (stand_in / "started").exists()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root installs or starts an engine")


@pytest.mark.root
@needs_root
def test_an_engine_that_is_installed_is_started_and_waited_for(stand_in: Path) -> None:
    program(stand_in, "dockerd", "#!/bin/sh\nsleep 1; touch $STAND_IN/answers; sleep 2\n")
    done = run(stand_in, ENGINE_WAIT_SECONDS="30")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "engine   Docker 1.2.3 started\n"


@pytest.mark.root
@needs_root
def test_an_engine_that_dies_is_told_at_once_with_its_last_words(stand_in: Path) -> None:
    program(stand_in, "dockerd", "#!/bin/sh\necho 'no cgroups here' >&2; exit 1\n")
    done = run(stand_in, ENGINE_WAIT_SECONDS="50")
    assert done.returncode == 1
    assert "no cgroups here" in done.stderr
    assert f"see {stand_in}/log" in done.stderr.splitlines()[-1]


@pytest.mark.root
@needs_root
def test_a_docker_command_alone_is_no_engine(stand_in: Path) -> None:
    clean = stand_in / "system"  # the system's programs, but no dockerd
    clean.mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for tool in Path(folder).iterdir():
            if not tool.name.startswith("docker") and not (clean / tool.name).exists():
                (clean / tool.name).symlink_to(tool)
    done = run(stand_in, PATH=f"{stand_in}/bin:{clean}")
    assert done.returncode == 1
    assert "cannot install a Docker engine: apt-get install docker.io failed" in done.stderr
    assert (stand_in / "apt").read_text().startswith("apt-get update")


@pytest.mark.root
@needs_root
def test_an_ordinary_user_is_told_what_to_do_in_one_line(stand_in: Path) -> None:
    program(stand_in, "id", "#!/bin/sh\necho 1000\n")
    done = run(stand_in)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "group docker" in done.stderr
