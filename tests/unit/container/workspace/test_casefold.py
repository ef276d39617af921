"""Folders that fold case. Few kernels can mount one; where this one can, the real thing is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sandbox.container.workspace import casefold, survey
from sandbox.container.workspace.casefold import is_casefolded, may_fold
from sandbox.container.workspace.prepare import check_workspace
from sandbox.errors import WorkspaceError


def test_an_ordinary_folder_does_not_fold(tmp_path: Path) -> None:
    assert not is_casefolded(bytes(tmp_path))
    assert not may_fold("xfs")


def test_a_folder_that_folds_case_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "folded").mkdir(parents=True)
    check_workspace(tmp_path / "project", tmp_path / "state" / "s1")  # the control
    monkeypatch.setattr(survey, "may_fold", lambda filesystem: True)
    monkeypatch.setattr(
        casefold,
        "_read_flags",
        lambda directory: (
            casefold._FS_CASEFOLD_FL * Path(f"/proc/self/fd/{directory}").readlink().match("folded")
        ),
    )
    with pytest.raises(WorkspaceError, match=r"folded compares names without regard to case"):
        check_workspace(tmp_path / "project", tmp_path / "state" / "s1")


def test_a_real_folder_that_folds_case_is_refused(tmp_path: Path) -> None:
    image, disk = tmp_path / "disk.img", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "casefold", "-E", "encoding=utf8", str(image)]
    for command in (make, ["mount", "-o", "loop", str(image), str(disk)]):
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip(
                "no case-insensitive ext4 can be mounted here (kernel without Unicode tables, or no root)"
            )
    try:
        folded = disk / "project" / "folded"
        folded.mkdir(parents=True)
        subprocess.run(["chattr", "+F", str(folded)], check=True)
        (folded / ".env").write_text("secret")
        assert (folded / ".ENV").read_text() == "secret"
        with pytest.raises(WorkspaceError, match="without regard to case"):
            check_workspace(disk / "project", tmp_path / "state" / "s1")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
