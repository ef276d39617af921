"""Derive what lies just under and just over each limit of a policy. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from sandbox.container.spec import HOME, WORKSPACE
from sandbox.policy.model import MIB, Limits
from sandbox.probe.model import Act, Attempt, Probe, Timed

FULL = frozenset(("ENOSPC", "EDQUOT", "EFBIG"))
SPARE_PIDS = 16
"""The guest, the keeper of the command and the probe itself."""
SPARE_FILES = 64
SPARE_INODES = 64
"""What the file system keeps for itself, before it rounds up."""
ENDED = "ended"
"""What is seen of a sandbox that ends as a whole, as gVisor's does over its memory limit."""
MOST_FILES = 32 * 1024
"""More are not made in a self-test."""
CPU_SECONDS = 0.6


def limit_probes(limits: Limits, *, is_gvisor: bool = False) -> tuple[Probe, ...]:
    """Return the probes of all limits that can be met in seconds; the one that may end it all comes last."""
    memory, most_memory = limits.memory_bytes, _most_memory(limits.memory_bytes, is_gvisor=is_gvisor)
    killed = frozenset(("SIGKILL", "ENOMEM", ENDED)) if is_gvisor else frozenset(("SIGKILL", "ENOMEM"))
    probes = [
        _under("memory", "limits.memory_bytes", f"use {_mib(most_memory)}",
               Act("memory", (str(most_memory),)), memory_bytes=memory + 256 * MIB),
        _over("memory", "limits.memory_bytes", f"use {_mib(memory + 64 * MIB)}",
              Act("memory", (str(memory + 64 * MIB),)), killed,
              memory_bytes=memory + 256 * MIB),
        _under("pids", "limits.pids", f"have {limits.pids // 2} processes at a time",
               Act("processes", (str(limits.pids // 2),))),
        _over("pids", "limits.pids", f"have {limits.pids} processes beside those there are",
              Act("processes", (str(limits.pids),)), frozenset(("EAGAIN",))),
        _under("nofile", "limits.nofile", f"open {limits.nofile - SPARE_FILES} files",
               Act("descriptors", (str(limits.nofile - SPARE_FILES),))),
        _over("nofile", "limits.nofile", f"open {limits.nofile} files beside those that are open",
              Act("descriptors", (str(limits.nofile),)), frozenset(("EMFILE",))),
    ]  # fmt: skip
    for word, directory in (("tmp", "/tmp"), ("home", HOME)):  # noqa: S108
        size = limits.tmpfs_bytes
        probes += [
            _under(word, "limits.tmpfs_bytes", f"write 1 MiB to {directory}",
                   Act("space", (directory, str(min(size // 2, MIB))))),
            _over(word, "limits.tmpfs_bytes", f"write {_mib(size + MIB)} to {directory}",
                  Act("space", (directory, str(size + MIB))), FULL),
        ]  # fmt: skip
    most = limits.workspace_bytes
    kept = min(limits.output_bytes, MIB)
    probes += [
        _under("command-seconds", "limits.command_seconds", "end a command before its time is over",
               Act("time", ("10",))),
        _over("command-seconds", "the guest's timer, limits.command_seconds",
              "go on after a command's time is over (0.3 s here)",
              Timed(Act("time", ("10000",)), 0.3), frozenset(("timeout",)), control=Act("time", ("600",))),
        _under("output-bytes", "limits.output_bytes", "write output beneath the cap, all of it kept",
               Timed(Act("output", (str(kept // 8192 * 4096),)), 30, kept, "whole")),
        _over("output-bytes", "the guest, limits.output_bytes", f"have more than {kept} bytes of output kept",
              Timed(Act("output", (str(kept // 4096 * 4096 + 65536),)), 30, kept, "cut"),
              frozenset(("cut",)), control=Act("output", ("0",))),
        _under("workspace-bytes", "limits.workspace_bytes", "write 1 MiB to the workspace",
               Act("space", (WORKSPACE, str(MIB)))),
        _over("workspace-bytes", "limits.workspace_bytes", f"write {_mib(most + 16 * MIB)} to the workspace",
              Act("space", (WORKSPACE, str(most + 16 * MIB))), FULL, disk_bytes=2 * most + 256 * MIB),
        _over("workspace-files", "limits.workspace_files", _say_files(limits.workspace_files),
              _all_files(limits.workspace_files), FULL),
        replace(_over("cpus", "limits.cpus", f"be on more than {limits.cpus:g} CPUs at a time",
                      Act("cpus", (str(CPU_SECONDS), str(_spinners(limits)), str(_most_cpu(limits.cpus)))),
                      frozenset(("throttled",))), may_be_untestable=True,
                skip="gVisor counts time itself; its quota is read back from the Sentry's cgroup" if is_gvisor
                else ""),
    ]  # fmt: skip
    return tuple(sorted(probes, key=lambda probe: probe.id == "limits-memory"))


def _say_files(most: int) -> str:
    if most > MOST_FILES:
        return f"be told of room for more than {most} files in the workspace"
    return f"make more than {most} files in the workspace"


def _all_files(most: int) -> Act:
    """Making them all takes long where there may be many; the file system is asked then."""
    if most > MOST_FILES:
        return Act("count-files", (WORKSPACE, str(most + SPARE_INODES + most // 32)))
    return Act("files", (WORKSPACE, str(most + SPARE_INODES + most // 32)))


def _spinners(limits: Limits) -> int:
    # Several for each CPU: on a busy machine one process gets a share only.
    return max(1, min(4 * math.ceil(limits.cpus) + 4, limits.pids // 4))


def _most_cpu(cpus: float) -> int:
    """Thousandths of a CPU that a quota of so many may come to in a moment: a period's worth is a burst."""
    return round((cpus * (1 + 0.1 / CPU_SECONDS) + 0.1) * 1000)


def _most_memory(limit: int, *, is_gvisor: bool) -> int:
    """Under the limit by what guest, page tables and other commands take; gVisor itself takes some, too."""
    return max(limit - max(limit // 16, 24 * MIB) - (96 * MIB if is_gvisor else 0), 4 * MIB)


def _under(word: str, control: str, what: str, attempt: Attempt, memory_bytes: int = 0) -> Probe:
    return Probe(f"limits-{word}-under", "limits", "allow", what, control, attempt, is_alone=True,
                 needs_memory_bytes=memory_bytes)  # fmt: skip


def _over(
    word: str,
    stopped_by: str,
    what: str,
    attempt: Attempt,
    refusals: frozenset[str],
    *,
    control: Attempt | None = None,
    memory_bytes: int = 0,
    disk_bytes: int = 0,
) -> Probe:
    return Probe(f"limits-{word}", "limits", "deny", what, stopped_by, attempt, refusals, control,
                 is_alone=True, needs_memory_bytes=memory_bytes, needs_disk_bytes=disk_bytes)  # fmt: skip


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"
