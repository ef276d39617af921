"""Compare what was asked for with what is there: the engine's account of a container, and the kernel's.

Pure but for reading /proc and the cgroup files; names each control that differs. Nothing is repaired:
a container that differs in one control is not used. D2
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox.container.spec import PAGE_BYTES, ContainerSpec

CPU_PERIOD_US = 100_000
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def find_refused_settings(spec: ContainerSpec, inspected: Mapping[str, Any], *, has_swap: bool) -> list[str]:
    """Name the settings that the engine did not take over, from ``GET /containers/ID/json``.

    ``has_swap``: whether the host swaps; without swap a missing swap limit weakens nothing.
    """
    config, host = inspected["Config"], inspected["HostConfig"]
    asked_and_got: list[tuple[str, object, object]] = [
        ("image", spec.image_id, inspected["Image"]),
        ("command", [*spec.command], [inspected["Path"], *inspected["Args"]]),
        ("user", first_user(spec), config["User"]),
        ("working directory", spec.working_dir, config["WorkingDir"]),
        ("terminal", False, config["Tty"]),
        ("health check", ["NONE"], (config.get("Healthcheck") or {}).get("Test")),
        ("labels", {}, _missing(dict(spec.labels), config["Labels"] or {})),
        ("environment", {}, _missing(dict(spec.env), pairs(config["Env"] or []))),
        ("network", spec.network, host["NetworkMode"]),
        ("read-only root", spec.read_only_root, host["ReadonlyRootfs"]),
        ("dropped capabilities", [*spec.dropped_capabilities], host["CapDrop"] or []),
        ("added capabilities", [*spec.added_capabilities], sorted(host["CapAdd"] or [])),
        ("privileged", False, host["Privileged"]),
        ("security options", sorted(security_options(spec)), sorted(host["SecurityOpt"] or [])),
        ("runtime", spec.runtime, host["Runtime"]),
        ("memory limit", spec.memory_bytes, host["Memory"]),
        ("CPU limit", nano_cpus(spec), host["NanoCpus"]),
        ("pids limit", spec.pids, host["PidsLimit"]),
        ("hard ulimits", ulimits(spec), {u["Name"]: u["Hard"] for u in host["Ulimits"] or []}),
        ("soft ulimits", ulimits(spec), {u["Name"]: u["Soft"] for u in host["Ulimits"] or []}),
        ("tmpfs", tmpfs_options(spec), host["Tmpfs"] or {}),
        ("shared memory size", spec.shm_bytes, host["ShmSize"]),
        ("names of hosts", sorted(f"{n}:{a}" for n, a in spec.extra_hosts), sorted(host["ExtraHosts"] or [])),
        ("IPC namespace", "private", host["IpcMode"]),
        ("PID namespace", "", host["PidMode"]),
        ("cgroup namespace", "private", host.get("CgroupnsMode")),
        ("log driver", "none", host["LogConfig"]["Type"]),
        ("devices", [], host["Devices"] or []),
        ("OOM killer", False, bool(host["OomKillDisable"])),
        ("mounts", sorted(_asked_mounts(spec)), sorted(_mounts(inspected))),
    ]
    if has_swap:
        asked_and_got.append(("swap limit", spec.memory_bytes, host["MemorySwap"]))
    return differences(asked_and_got)


def find_unenforced(
    spec: ContainerSpec, pid: int, container_id: str, proc: Path = Path("/proc")
) -> list[str]:
    """Name the controls that the kernel does not report as in force on PID 1 of a started container.

    ``pid`` is the host's number for it. Raises OSError when the process is gone; a process that is not
    this container's (an engine on another machine) counts as a control that cannot be verified.
    """
    cgroup = (proc / str(pid) / "cgroup").read_text()
    if container_id not in cgroup:
        return [f"all of them: process {pid} is not the container's, so the engine is not on this machine"]
    status = pairs((proc / str(pid) / "status").read_text().splitlines(), separator=":")
    asked_and_got: list[tuple[str, object, object]] = [
        ("uid", {str(spec.uid)}, set(status["Uid"].split())),
        ("gid", {str(spec.gid)}, set(status["Gid"].split())),
        ("seccomp filter", "2", status["Seccomp"]),
        ("no_new_privs", "1", status["NoNewPrivs"]),
        *((f"capabilities {name}", 0, int(status[name], 16)) for name in CAPABILITY_SETS),
    ]
    return (
        differences(asked_and_got)
        + find_unlimited(spec, cgroup, proc)
        + _find_weak_mounts(spec, proc / str(pid) / "mountinfo")
        + _find_unbounded(spec, proc / str(pid) / "root")
    )


def is_process_alive(pid: int) -> bool:
    """Tell whether a process of this machine runs; a corpse that waits for its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def security_options(spec: ContainerSpec) -> list[str]:
    """Return Docker's ``SecurityOpt`` for a spec."""
    return ["no-new-privileges", f"seccomp={spec.seccomp}"]


def first_user(spec: ContainerSpec) -> str:
    """Return Docker's ``User``: what PID 1 starts as."""
    return "0:0" if spec.is_root_at_start else f"{spec.uid}:{spec.gid}"


def nano_cpus(spec: ContainerSpec) -> int:
    """Return CPUs in units of 10**-9."""
    return round(spec.cpus * 1_000_000_000)


def ulimits(spec: ContainerSpec) -> dict[str, int]:
    """Return limits, hard and soft alike. A core dump would feed untrusted bytes to a handler of the host."""
    return {"nofile": spec.nofile, "core": 0}


def tmpfs_options(spec: ContainerSpec) -> dict[str, str]:
    """Return Docker's ``Tmpfs``: target to mount options."""
    options = {}
    for mount in spec.tmpfs:
        # runc gives it the mode of the image's directory, whatever is asked (/run: 0755): so it has to be
        # the user's own to be of use.
        owner = f"mode={'0700' if mount.is_private else '1777'},uid={spec.uid},gid={spec.gid}"
        room = f"size={mount.size_bytes},nr_inodes={mount.files}"
        options[mount.target] = f"rw,noexec,nosuid,nodev,{room},{owner}"
    return options


def _asked_mounts(spec: ContainerSpec) -> list[tuple[str, str, str, bool]]:
    """Type, source, target, writable."""
    volume = ("volume", spec.workspace.name, spec.workspace.target, True)
    return [volume, *(("bind", bind.source, bind.target, not bind.is_read_only) for bind in spec.binds)]


def _mounts(inspected: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """An image's own VOLUME shows up here as well: writable, executable, and asked for by nobody."""
    return [
        (m["Type"], m["Name"] if m["Type"] == "volume" else m.get("Source", ""), m["Destination"], m["RW"])
        for m in inspected["Mounts"]
        if m["Type"] != "tmpfs"
    ]


def _missing(wanted: Mapping[str, str], got: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if got.get(name) != value}


def pairs(lines: list[str], separator: str = "=") -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(separator) for line in lines)}


def differences(asked_and_got: list[tuple[str, object, object]]) -> list[str]:
    found = []
    for name, want, got in asked_and_got:
        if want == got:
            continue
        if isinstance(want, list) and isinstance(got, list):  # what both have says nothing
            want, got = [item for item in want if item not in got], [item for item in got if item not in want]
        found.append(f"{name}: asked {_short(want)}, got {_short(got)}")
    return found


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def find_unlimited(spec: ContainerSpec, cgroup: str, proc: Path) -> list[str]:
    """Compare limits with the cgroup files, of either version; ``cgroup`` as ``/proc/PID/cgroup`` has it."""
    quota = round(spec.cpus * CPU_PERIOD_US)
    paths = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    mounts = _cgroup_mounts(proc)
    found = []
    for control, v1_file, v2_file, wanted in (
        ("memory", "memory.limit_in_bytes", "memory.max", spec.memory_bytes),
        ("pids", "pids.max", "pids.max", spec.pids),
        ("cpu", "cpu.cfs_quota_us", "cpu.max", quota),
    ):
        if control in paths and control in mounts:
            file = mounts[control] / paths[control].lstrip("/") / v1_file
        else:
            file = mounts.get("", Path("/sys/fs/cgroup")) / paths.get("", "/").lstrip("/") / v2_file
        try:
            got = file.read_text().split()[0]
        except OSError as exc:
            found.append(f"{control} limit: cannot be read ({exc.strerror}: {file})")
            continue
        # The kernel rounds memory down to whole pages.
        slack = PAGE_BYTES if control == "memory" else 1
        if not got.isdigit() or not wanted - slack < int(got) <= wanted:
            found.append(f"{control} limit: asked {wanted}, got {got}")
    return found


def _find_unbounded(spec: ContainerSpec, root: Path) -> list[str]:
    """Ask the workspace's filesystem, as the container has it mounted, for its size."""
    most = spec.workspace.most_bytes
    if not most:  # no filesystem bounds it; whoever made the spec says so
        return []
    # An overlay answers for its upper layer. Only root gets here, so /proc/PID/root can be passed.
    got = os.statvfs(f"{root}{spec.workspace.target}")
    size = got.f_blocks * got.f_frsize
    return [] if 0 < size <= most else [f"size of {spec.workspace.target}: asked {most}, got {size}"]


def _cgroup_mounts(proc: Path) -> dict[str, Path]:
    """Where each v1 controller is mounted on the host; the unified hierarchy under the empty name."""
    mounts = {}
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        target = Path(before.split(" ")[4])
        if kind == "cgroup":
            mounts.update(dict.fromkeys(options.split(","), target))
        elif kind == "cgroup2":
            mounts[""] = target
    return mounts


def _find_weak_mounts(spec: ContainerSpec, mountinfo: Path) -> list[str]:
    """Compare mount flags with what was asked: engines have been seen to drop ``noexec`` in silence."""
    wanted: dict[str, set[str]] = {"/": {"ro"}, spec.workspace.target: set(spec.workspace.flags)}
    for tmpfs in spec.tmpfs:
        pages = -(-tmpfs.size_bytes // PAGE_BYTES)
        room = {f"size={pages * PAGE_BYTES // 1024}k", f"nr_inodes={tmpfs.files}"}
        owner = {f"uid={spec.uid}", f"gid={spec.gid}"}
        wanted[tmpfs.target] = {"noexec", "nosuid", "nodev"} | room | owner
    wanted |= {bind.target: {"ro"} for bind in spec.binds if bind.is_read_only}
    wanted["/dev/shm"] = {"noexec", "nosuid", "nodev"}  # noqa: S108
    got: dict[str, set[str]] = {}
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields = mount.split(" ")
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        # Options of the mount, then those of its filesystem (``userxattr``). Only the mount's own ``ro``
        # and ``noexec`` count: those of a filesystem hold for all its mounts, so neither hides a gap.
        # The last mount of a target is on top.
        got[target] = {*fields[5].split(","), *filesystem.split(" ")[-1].split(",")}
    return [
        f"mount {target}: no {','.join(sorted(flags - got.get(target, set())))}"
        for target, flags in wanted.items()
        if not flags <= got.get(target, set())
    ]
