"""Which releases fall under which advisory."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sandbox.probe.advisories import ADVISORIES, fixed_by_package, known_bad

RUNC_2025 = {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}


@pytest.mark.parametrize(
    ("component", "version", "expected"),
    [
        ("runc", "1.1.5+ds1", RUNC_2025 | {"CVE-2024-21626"}),
        ("runc", "1.1.12", RUNC_2025),
        ("runc", "v1.2.7", RUNC_2025),
        ("runc", "1.2.8", set()),
        ("runc", "1.3.2", RUNC_2025),
        ("runc", "1.3.3", set()),
        ("runc", "1.4.0-rc.2", RUNC_2025),
        ("runc", "1.4.0-rc.3", set()),
        ("runc", "1.5.0", set()),
        ("runc", "0.1.1", {"CVE-2025-31133", "CVE-2025-52881"}),
        ("engine", "20.10.24+dfsg1", {"CVE-2024-29018", "CVE-2024-41110", "CVE-2026-34040"}),
        ("engine", "23.0.15", {"CVE-2026-34040"}),
        ("engine", "24.0.9", {"CVE-2024-29018", "CVE-2024-41110", "CVE-2026-34040"}),
        ("engine", "29.3.1", set()),
        ("containerd", "1.7.27", {"CVE-2024-25621"}),
    ],
)
def test_a_release_falls_under_what_was_fixed_after_it(
    component: str, version: str, expected: set[str]
) -> None:
    assert {advisory.id for advisory in known_bad(component, version)} == expected


def test_a_version_that_names_no_release_counts_as_bad() -> None:
    everything = {advisory.id for advisory in ADVISORIES if advisory.component == "runc"}
    assert {advisory.id for advisory in known_bad("runc", "unknown")} == everything


def test_only_the_changelog_of_the_installed_package_says_that_a_flaw_is_mended(tmp_path: Path) -> None:
    by_id = {advisory.id: advisory for advisory in ADVISORIES}
    (tmp_path / "runc").mkdir()
    with gzip.open(tmp_path / "runc" / "changelog.Debian.gz", "wt") as changelog:
        changelog.write("runc (1.1.5+ds1-1+deb12u1)\n  * fix CVE-2024-21626\n")
    assert fixed_by_package(by_id["CVE-2024-21626"], tmp_path)
    assert not fixed_by_package(by_id["CVE-2025-31133"], tmp_path)
    assert not fixed_by_package(by_id["CVE-2024-40635"], tmp_path)
