"""A filesystem of the quota's size, made, filled and taken away again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.container.workspace import quota
from sandbox.container.workspace.mounts import list_mounts_beneath, unmount_beneath
from sandbox.container.workspace.quota import (
    Disk,
    DiskQuota,
    LayersFilesystem,
    find_quota_obstacle,
    show_bytes,
)
from sandbox.errors import StateError
from tests.e2e.harness import loop_devices_of

MIB = 1024 * 1024
SMALL = DiskQuota(16 * MIB, 1024)

needs_loop = pytest.mark.skipif(bool(quota.find_obstacle_at_sight()), reason=quota.find_obstacle_at_sight())


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    unmount_beneath(os.fsencode(tmp_path))


def fill(path: Path) -> int:
    written = 0
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                written += file.write(bytes(MIB))
        except OSError:
            return written


@needs_loop
def test_a_write_over_the_quota_fails_and_what_is_used_up_is_said(session: Path) -> None:
    disk = LayersFilesystem(session, SMALL).finish()
    assert (disk.enforced_by, disk.measure().shortage, disk.measure().written_files) == (
        "filesystem",
        None,
        0,
    )
    assert disk.measure().written_bytes < MIB
    assert 15 * MIB < fill(disk.layers / "junk") < 18 * MIB
    shortage = disk.measure().shortage
    assert (
        shortage and shortage.reason == "the workspace quota of 16.0 MiB (limits.workspace_bytes) is used up"
    )
    (disk.layers / "junk").unlink()
    assert disk.measure().shortage is None  # what tidied up after itself goes on
    disk.flush()
    assert disk.most_bytes >= os.statvfs(disk.layers).f_blocks * 4096


@needs_loop
def test_the_number_of_files_is_bounded_too(session: Path) -> None:
    disk = LayersFilesystem(session, SMALL).finish()
    made = 0
    with pytest.raises(OSError, match="No space"):
        for made in range(5000):
            (disk.layers / str(made)).touch()
    assert 1000 < made < 1100
    shortage = disk.measure().shortage
    assert shortage and "1024 files (limits.workspace_files)" in shortage.reason


@needs_loop
def test_the_mount_is_the_only_thing_that_holds_the_device(session: Path) -> None:
    LayersFilesystem(session, SMALL).finish()
    assert len(loop_devices_of(session)) == 1  # the control
    options = next(line for line in Path("/proc/mounts").read_text().splitlines() if f"{session}/" in line)
    assert {"nosuid", "nodev"} <= set(options.split()[3].split(","))
    unmount_beneath(os.fsencode(session))
    assert loop_devices_of(session) == []


@needs_loop
def test_a_controller_that_is_killed_while_it_makes_one_leaves_no_device(session: Path) -> None:
    script = (
        "import os,signal,sys; from pathlib import Path; from sandbox.container.workspace import loop;"
        "from sandbox.container.workspace.quota import *;"
        "loop._mount=lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        "LayersFilesystem(Path(sys.argv[1]), DiskQuota(16<<20, 1024)).finish()"
    )
    killed = subprocess.run([sys.executable, "-c", script, session], check=False)
    assert killed.returncode == -9
    assert loop_devices_of(session) == []
    assert not list_mounts_beneath(os.fsencode(session))


def test_where_the_kernel_cannot_be_asked_the_strong_form_is_refused_and_the_weak_one_told(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "find_obstacle_at_sight", lambda: "no loop devices")
    with pytest.raises(StateError, match=r"no loop devices.*workspace_quota: watched"):
        LayersFilesystem(session, DiskQuota(16 * MIB, 1024, "filesystem")).finish()
    disk = LayersFilesystem(session, SMALL).finish()
    assert "watched" in disk.warnings[0]
    assert "no loop devices" in disk.warnings[0]
    (session / "upper").mkdir()
    assert disk.measure().shortage is None
    (session / "upper" / "junk").write_bytes(bytes(17 * MIB))
    shortage = disk.measure().shortage
    assert shortage and shortage.what == "workspace_bytes"


def test_the_trial_for_doctor_says_what_a_session_would_get_and_leaves_nothing(session: Path) -> None:
    obstacle = find_quota_obstacle(session)
    assert (obstacle is None) is not bool(quota.find_obstacle_at_sight())
    assert not list(session.iterdir())


def test_a_host_without_room_is_said(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(session, SMALL, "watched", "x")
    assert disk.find_host_shortage() is None  # the control
    assert len(disk.warnings) == 1
    monkeypatch.setattr(quota, "_free", lambda directory: MIB)
    shortage = disk.find_host_shortage()
    assert shortage and "the host's disk is full: 1.0 MiB" in shortage.reason
    assert "16.0 MiB are granted and 1.0 MiB are free" in disk.warnings[1]
    with pytest.raises(StateError, match="no space left there"):
        quota.check_free_space(session / "not" / "there")


def test_sizes_are_shown_as_a_person_says_them() -> None:
    assert [show_bytes(count) for count in (4096 * MIB, 16 * MIB, 12345)] == ["4.0 GiB", "16.0 MiB", "12 KiB"]
