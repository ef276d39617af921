"""What was created is compared with what was asked for; here each control is made to differ, one by one."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.docker import DockerRuntime
from sandbox.container.spec import ContainerSpec
from sandbox.container.verify import find_refused_settings, find_unenforced
from tests.containers import IMAGE, make_places, make_spec

pytestmark = pytest.mark.docker


def inspect(container: str) -> dict[str, Any]:
    done = subprocess.run(["docker", "inspect", container], capture_output=True, check=True)
    return dict(json.loads(done.stdout)[0])


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> tuple[ContainerSpec, dict[str, Any], list[str]]:
    """A spec, the engine's account of its running container, and what the kernel is said to lack."""

    async def create() -> tuple[ContainerSpec, dict[str, Any], list[str]]:
        runtime = DockerRuntime()
        places = make_places(tmp_path_factory.mktemp("sessions"))
        spec = make_spec(places, await runtime.image_id(IMAGE), blocked_paths=("/usr/bin/curl",))
        spec = replace(spec, command=("/bin/cat",))
        container = await runtime.create(spec)
        try:
            stream = await runtime.start(container)
            inspected = inspect(container)
            changed = [
                replace(spec, pids=spec.pids + 1),
                replace(spec, memory_bytes=spec.memory_bytes * 2),
                replace(spec, cpus=1.0),
                replace(spec, uid=1001),
                replace(spec, gid=1001),
                replace(spec, workspace=replace(spec.workspace, flags=("noexec",))),
                replace(spec, binds=(*spec.binds, replace(spec.binds[0], target="/etc/passwd"))),
            ]
            pid = inspected["State"]["Pid"]
            assert find_unenforced(spec, pid, container) == []
            found = [find_unenforced(one, pid, container) for one in changed]
            # Another user would have other memory filesystems, too.
            others = [
                [line for line in one if " no uid=" not in line and " no gid=" not in line] for one in found
            ]
            assert all(len(one) == 1 for one in others), found
            assert [len(one) - 1 for one in found] == [0, 0, 0, len(spec.tmpfs), len(spec.tmpfs), 0, 0]
            await stream.close()
            return spec, inspected, [one[0].split(":")[0] for one in found]
        finally:
            await runtime.remove(container, spec.workspace.name)
            await runtime.close()

    return asyncio.run(create())


def test_the_kernel_is_asked_about_each_limit_and_mount(created: tuple[Any, Any, list[str]]) -> None:
    assert created[2] == [
        "pids limit",
        "memory limit",
        "cpu limit",
        "uid",
        "gid",
        "mount /workspace",
        "mount /etc/passwd",
    ]


TAMPERINGS: list[tuple[str, str, Any]] = [
    ("network", "HostConfig.NetworkMode", "bridge"),
    ("read-only root", "HostConfig.ReadonlyRootfs", False),
    ("dropped capabilities", "HostConfig.CapDrop", None),
    ("added capabilities", "HostConfig.CapAdd", ["SYS_ADMIN"]),
    ("privileged", "HostConfig.Privileged", True),
    ("security options", "HostConfig.SecurityOpt", ["no-new-privileges"]),
    ("security options", "HostConfig.SecurityOpt", None),
    ("runtime", "HostConfig.Runtime", "other"),
    ("memory limit", "HostConfig.Memory", 0),
    ("swap limit", "HostConfig.MemorySwap", -1),
    ("CPU limit", "HostConfig.NanoCpus", 0),
    ("pids limit", "HostConfig.PidsLimit", None),
    ("hard ulimits", "HostConfig.Ulimits", None),
    ("tmpfs", "HostConfig.Tmpfs", {"/tmp": "rw,exec"}),
    ("shared memory size", "HostConfig.ShmSize", 1 << 40),
    ("names of hosts", "HostConfig.ExtraHosts", ["evil.example:10.0.0.1"]),
    ("IPC namespace", "HostConfig.IpcMode", "host"),
    ("PID namespace", "HostConfig.PidMode", "host"),
    ("cgroup namespace", "HostConfig.CgroupnsMode", "host"),
    ("log driver", "HostConfig.LogConfig", {"Type": "json-file"}),
    ("devices", "HostConfig.Devices", [{"PathOnHost": "/dev/kvm"}]),
    ("OOM killer", "HostConfig.OomKillDisable", True),
    ("user", "Config.User", ""),
    ("terminal", "Config.Tty", True),
    ("working directory", "Config.WorkingDir", "/"),
    ("health check", "Config.Healthcheck", None),
    ("labels", "Config.Labels", None),
    ("environment", "Config.Env", ["PATH=/evil"]),
    ("image", "Image", "sha256:other"),
    ("command", "Path", "/bin/sh"),
    ("command", "Args", ["-c", "evil"]),
    ("mounts", "Mounts", []),
]


@pytest.mark.parametrize(("control", "field", "value"), TAMPERINGS)
def test_a_control_that_the_engine_dropped_is_named(
    created: tuple[ContainerSpec, dict[str, Any], list[str]], control: str, field: str, value: Any
) -> None:
    spec, inspected, _ = created
    assert find_refused_settings(spec, inspected, has_swap=True) == []
    tampered = copy.deepcopy(inspected)
    *parents, name = field.split(".")
    place = tampered
    for parent in parents:
        place = place[parent]
    place[name] = value
    found = [problem.split(":")[0] for problem in find_refused_settings(spec, tampered, has_swap=True)]
    assert control in found
    assert set(found) <= {control, "soft ulimits"}


def test_a_missing_swap_limit_counts_only_on_a_host_that_swaps(
    created: tuple[ContainerSpec, dict[str, Any], list[str]],
) -> None:
    spec, inspected, _ = created
    tampered = copy.deepcopy(inspected)
    tampered["HostConfig"]["MemorySwap"] = -1
    assert find_refused_settings(spec, tampered, has_swap=False) == []


def test_a_container_without_controls_is_seen_for_what_it_is(
    created: tuple[ContainerSpec, dict[str, Any], list[str]],
) -> None:
    command = ["docker", "run", "-d", "--security-opt", "seccomp=unconfined", IMAGE, "sleep", "60"]
    container = subprocess.run(command, capture_output=True, check=True).stdout.decode().strip()
    try:
        found = find_unenforced(created[0], inspect(container)["State"]["Pid"], container)
    finally:
        subprocess.run(["docker", "rm", "-f", container], capture_output=True, check=True)
    names = {problem.split(":")[0] for problem in found}
    assert {
        "uid",
        "gid",
        "seccomp filter",
        "no_new_privs",
        "capabilities CapEff",
        "capabilities CapBnd",
    } <= names
    assert {"memory limit", "pids limit", "cpu limit", "mount /", "mount /tmp", "mount /workspace"} <= names


def test_a_process_that_is_not_the_containers_verifies_nothing(
    created: tuple[ContainerSpec, dict[str, Any], list[str]],
) -> None:
    (problem,) = find_unenforced(created[0], 1, "f" * 64)
    assert "the engine is not on this machine" in problem


def test_a_process_that_is_gone_is_an_os_error(
    created: tuple[ContainerSpec, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(OSError):
        find_unenforced(created[0], 999_999_999, "f" * 64, tmp_path)
