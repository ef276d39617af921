"""Containers to attack from the inside: one as the agent gets it, and weaker ones as controls. D2"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.container.control import held_capabilities
from sandbox.container.seccomp import load_seccomp
from sandbox.resources import shipped

ROOT = Path(__file__).resolve().parents[2]
Verdicts = dict[str, tuple[str, str]]
Run = Callable[..., subprocess.CompletedProcess[str]]

_tables: list[tuple[Verdicts, Verdicts, Verdicts]] = []


@pytest.fixture(scope="session")
def agent_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped profile as the engine gets it: its canonical text."""
    path = tmp_path_factory.mktemp("seccomp") / "agent.json"
    path.write_text(load_seccomp("agent", None).text)
    return path


@pytest.fixture(scope="session")
def run_container() -> Run:
    """Run a container to its end under a name of its own, and leave nothing of it."""
    if shutil.which("docker") is None:
        pytest.fail("tests marked docker need the docker command line; deselect them with -m 'not docker'")

    def run(*arguments: str, stdin: str = "", seconds: float = 120) -> subprocess.CompletedProcess[str]:
        name = f"agent-runner-escape-{uuid.uuid4().hex}"
        start = ["docker", "run", "--rm", "--interactive", "--pull", "never", "--log-driver", "none"]
        try:
            return subprocess.run(
                [*start, "--name", name, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        finally:
            subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)

    return run


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """D2 without its profile."""
    user = ["--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    limits = ["--pids-limit", "256", "--memory", "1g", "--ulimit", "core=0"]
    return [
        *user,
        *limits,
        "--network",
        "none",
        "--read-only",
        "--tmpfs",
        "/tmp:rw,noexec,nosuid,nodev,size=64m",
    ]


@pytest.fixture(scope="session")
def agent_flags(flags: list[str], agent_profile: Path) -> list[str]:
    """D2, whole."""
    return [*flags, "--security-opt", f"seccomp={agent_profile}"]


@pytest.fixture(scope="session")
def probe_image() -> Iterator[str]:
    """An image that holds the self-test's program and nothing else."""
    binary = shipped("images/guest/build/probe")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(binary, "probe")
    name = f"agent-runner/probe:{uuid.uuid4().hex}"
    entry = ["--change", 'ENTRYPOINT ["/probe"]']
    subprocess.run(
        ["docker", "import", *entry, "-", name], input=buffer.getvalue(), check=True, capture_output=True
    )
    yield name
    subprocess.run(["docker", "image", "rm", name], check=False, capture_output=True)


@pytest.fixture(scope="session")
def toolchain_image() -> str:
    """The image with compilers and package managers; built when absent or out of date."""
    script = ROOT / "images" / "toolchain.sh"
    built = subprocess.run([str(script)], capture_output=True, text=True, timeout=600, check=False)
    assert built.returncode == 0, f"{script} failed:\n{built.stderr[-2000:]}"
    return os.environ.get("TOOLCHAIN_IMAGE", "agent-runner/toolchain:latest")


@pytest.fixture(scope="session")
def agent(run_container: Run, agent_flags: list[str], probe_image: str) -> Verdicts:
    """What every probe met in the agent's container."""
    return _probe(run_container, agent_flags, 1000, probe_image)


@pytest.fixture(scope="session")
def flags_only(run_container: Run, flags: list[str], probe_image: str) -> Verdicts:
    """The same container without a profile: what the profile itself adds."""
    return _probe(run_container, [*flags, "--security-opt", "seccomp=unconfined"], 1000, probe_image)


@pytest.fixture(scope="session")
def control(run_container: Run, agent: Verdicts, flags_only: Verdicts, probe_image: str) -> Verdicts:
    """A permissive container: what can be proven on this kernel at all."""
    # Not --privileged: it asks for every capability, and an engine that lacks one itself then starts nothing.
    added = [f"--cap-add={name}" for name in held_capabilities()]
    opened = [f"--security-opt={option}=unconfined" for option in ("seccomp", "apparmor", "systempaths")]
    verdicts = _probe(run_container, ["--network", "none", *added, *opened], 0, probe_image)
    _tables.append((agent, flags_only, verdicts))
    return verdicts


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder of shared cases, where there is one."""
    folder = Path(os.environ.get("AGENT_RUNNER_CASES", ROOT.parent / "shared" / "cases"))
    if not folder.is_dir():
        pytest.skip(f"no shared cases at {folder}; set AGENT_RUNNER_CASES")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was blocked, by whom, and what could not be shown."""
    for agent, flags_only, control in _tables:
        attacks = [name for name in agent if not name.startswith("need-")]
        proven = [name for name in attacks if control[name][0] == "worked"]
        blocked = [name for name in proven if agent[name][0] == "blocked"]
        by_filter = [name for name in blocked if flags_only[name][0] == "worked"]
        terminalreporter.section("escape probes")
        terminalreporter.line(
            f"{len(attacks)} attempts: {len(blocked)} blocked ({len(by_filter)} by the profile alone), "
            f"{len(proven) - len(blocked)} worked, {len(attacks) - len(proven)} untestable here"
        )
        if config.get_verbosity() > 0:
            terminalreporter.line(f"{'probe':32}{'agent':18}{'no profile':18}{'control':18}")
            for name in agent:
                cells = (" ".join(table[name]) for table in (agent, flags_only, control))
                terminalreporter.line(f"{name:32}" + "".join(f"{cell:18}" for cell in cells))


def _probe(run: Run, options: list[str], uid: int, image: str) -> Verdicts:
    scratch = f"rw,nosuid,nodev,size=16m,uid={uid},gid={uid}"
    done = run(*options, "--tmpfs", f"/scratch:{scratch}", "--tmpfs", f"/mnt:{scratch}", image)
    assert done.returncode == 0, f"the probe program did not finish: {done.stderr}"
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (verdict, detail) for name, verdict, detail in lines}
