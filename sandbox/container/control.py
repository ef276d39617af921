"""The self-test's permissive container: the same image with every control taken away that can be. D2

It exists to show that a probe would succeed without the sandbox. Only the self-test's own static program
has its privileges; before that runs a program of the image, which nobody need trust, it becomes a user
without any. The container has no network, no file of the user's and no device. ``sandbox.probe`` is its only
user.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox.container.docker import DockerRuntime
from sandbox.container.spec import Bind, ContainerSpec, OverlayVolume
from sandbox.policy.model import MIB

# Every capability that engines since 20.10 can name, by its bit.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL"),
    *("SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST"),
    *("NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
    *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE"),
    *("AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM"),
    *("BLOCK_SUSPEND", "AUDIT_READ"),
)
TMPFS_OPTIONS = "rw,exec,suid,dev,mode=1777"
SPARE_TMPFS_BYTES = 64 * MIB
DECOY_VARIABLE = ("SELFTEST_TOKEN", "a decoy: what the controls look for")


class ControlRuntime(DockerRuntime):
    """Creates containers that are weak on purpose, and therefore checks nothing about them."""

    # Any: the SDK's client, whose types stay in the adapter.
    def _container_options(self, client: Any, spec: ContainerSpec) -> dict[str, Any]:
        options = super()._container_options(client, spec)
        options["user"] = "0:0"
        sizes = {mount.target: mount.size_bytes + SPARE_TMPFS_BYTES for mount in spec.tmpfs}
        options["host_config"].update(
            CapDrop=[],
            CapAdd=held_capabilities(),
            SecurityOpt=["seccomp=unconfined", "apparmor=unconfined"],
            # What the engine itself hides of /proc and /sys.
            MaskedPaths=[],
            ReadonlyPaths=[],
            ReadonlyRootfs=False,
            Memory=0,
            MemorySwap=0,
            NanoCpus=0,
            PidsLimit=0,
            Ulimits=[],  # the engine's own: it may not be able to give more
            Tmpfs={target: f"{TMPFS_OPTIONS},size={size}" for target, size in sizes.items()},
        )
        return options

    def _find_refused(self, spec: ContainerSpec, inspected: dict[str, Any], *, has_swap: bool) -> list[str]:
        return []

    def _find_unenforced(self, spec: ContainerSpec, pid: int, container_id: str) -> list[str]:
        return []


def control_spec(
    spec: ContainerSpec, workspace: OverlayVolume, binds: tuple[Bind, ...], command: tuple[str, ...]
) -> ContainerSpec:
    """Return what a control has of a session's spec: image and places, none of what covers anything."""
    return replace(
        spec,
        name=f"{spec.name}-control",
        workspace=replace(workspace, flags=()),
        binds=binds,
        command=command,
        env=(*spec.env, DECOY_VARIABLE),
    )


def held_capabilities() -> list[str]:
    """Return this process's bounding set: an engine that lacks a capability itself can give it to nobody."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            held = int(line.split()[1], 16)
            return [name for bit, name in enumerate(CAPABILITIES) if held >> bit & 1]
    return []
