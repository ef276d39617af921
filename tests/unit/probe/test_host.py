"""What is read of a kernel, from files a test can write and from the kernel itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.probe.host import read_host


def host(tmp_path: Path, mounts: str = "", core: str = "core", memory: str = "", modules: str = "") -> Path:
    for name, text in (
        ("proc/self/mountinfo", mounts),
        ("proc/sys/kernel/core_pattern", core),
        ("proc/meminfo", memory),
        ("sys/kernel/security/lsm", modules),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


V1 = "30 24 0:26 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
V2 = "29 24 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "expected"), [(V1, "v1"), (V2, "v2"), (V1 + V2, "v1 and v2 (hybrid)"), ("", "none")]
)
def test_cgroups_are_told_by_what_is_mounted(tmp_path: Path, mounts: str, expected: str) -> None:
    made = host(tmp_path, mounts)
    assert read_host(made / "proc", made / "sys").cgroups == expected


def test_a_core_handler_modules_and_swap_are_read(tmp_path: Path) -> None:
    made = host(
        tmp_path, core="|/usr/lib/catch %p %u", memory="SwapTotal:  2048 kB\n", modules="lockdown,apparmor"
    )
    facts = read_host(made / "proc", made / "sys")
    assert (facts.core_handler, facts.swap_bytes) == ("/usr/lib/catch", 2048 * 1024)
    assert facts.security_modules == ("lockdown", "apparmor")


def test_what_cannot_be_read_counts_as_absent(tmp_path: Path) -> None:
    facts = read_host(tmp_path / "proc", tmp_path / "sys")
    assert (facts.cgroups, facts.core_handler, facts.security_modules) == ("none", "", ())


def test_the_kernel_itself_is_asked() -> None:
    facts = read_host()
    assert facts.kernel and facts.release > (3, 0)
    if facts.release >= (6, 12):
        assert facts.has_user_notification == facts.has_fast_notification
