"""Known-bad versions of what runs containers, and what each flaw means for a session. Data and pure rules.

Releases are the projects' own; a distribution that mends an old release says so in its changelog, which is
where ``fixed_by_package`` looks.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

Version = tuple[tuple[int, ...], int]
"""Numbers, and the number of the release candidate; a release proper counts above all of its candidates."""
RELEASE = 1_000_000
PACKAGES = {
    "engine": ("docker.io", "docker-ce"),
    "runc": ("runc", "containerd.io"),
    "containerd": ("containerd",),
}


@dataclass(frozen=True)
class Advisory:
    """One published flaw."""

    id: str
    component: str
    """``engine``, ``runc`` or ``containerd``."""
    summary: str
    fixed: tuple[str, ...]
    """The first good release of each line, in ascending order; lines above the last are good."""
    bearing: str
    """What it means for a session of ours."""
    since: str = "0"
    """The first bad release."""


ADVISORIES: tuple[Advisory, ...] = (
    Advisory(
        "CVE-2024-21626",
        "runc",
        "a descriptor of the host leaks into the container; a working directory through it escapes",
        ("1.1.12",),
        "would let a hostile image out: the working directory is ours, the image may be anybody's",
        since="1.0.0-rc93",
    ),
    Advisory(
        "CVE-2025-31133",
        "runc",
        "masked paths can be replaced through /dev/null while a container starts",
        ("1.2.8", "1.3.3", "1.4.0-rc.3"),
        "needs a second container that races the start on a shared mount, which sessions have none of; "
        "no policy relies on /dev/null masks",
    ),
    Advisory(
        "CVE-2025-52565",
        "runc",
        "the console's bind mount can be redirected while a container starts",
        ("1.2.8", "1.3.3", "1.4.0-rc.3"),
        "sessions have no console",
        since="1.0.0-rc3",
    ),
    Advisory(
        "CVE-2025-52881",
        "runc",
        "writes to /proc can be redirected while a container starts",
        ("1.2.8", "1.3.3", "1.4.0-rc.3"),
        "needs a second container that races the start on a shared mount, which sessions have none of",
    ),
    Advisory(
        "CVE-2024-29018",
        "engine",
        "internal networks forward DNS to the outside",
        ("23.0.11", "25.0.5", "26.0.0"),
        "sessions have no network and no resolver",
    ),
    Advisory(
        "CVE-2024-41110",
        "engine",
        "authorization plugins can be bypassed",
        ("23.0.15", "25.0.6", "26.1.5", "27.1.1"),
        "concerns who may talk to the engine; nothing in a session can",
    ),
    Advisory(
        "CVE-2026-34040",
        "engine",
        "authorization plugins can be bypassed with oversized requests",
        ("29.3.1",),
        "concerns who may talk to the engine; nothing in a session can",
    ),
    Advisory(
        "CVE-2024-40635",
        "containerd",
        "a user id beyond the 32-bit range runs as root",
        ("1.6.38", "1.7.27", "2.0.4"),
        "the user of a session is set and checked by number; an image cannot choose it",
    ),
    Advisory(
        "CVE-2024-25621",
        "containerd",
        "directories of the engine are readable by local users",
        ("1.7.29", "2.0.7", "2.1.5", "2.2.0"),
        "concerns local users of this host; give only trusted ones an account",
    ),
)


def known_bad(component: str, version: str) -> tuple[Advisory, ...]:
    """Return the advisories that a release falls under, by its number alone."""
    number = _parse(version)
    return tuple(
        advisory
        for advisory in ADVISORIES
        if advisory.component == component
        and (number is None or (_parsed(advisory.since) <= number and not _is_fixed(advisory, number)))
    )


def fixed_by_package(advisory: Advisory, documents: Path = Path("/usr/share/doc")) -> bool:
    """Tell whether the distribution's changelog of the installed package says that the flaw is mended."""
    for package in PACKAGES[advisory.component]:
        try:
            with gzip.open(documents / package / "changelog.Debian.gz", "rt", errors="replace") as changelog:
                if re.search(rf"\b{re.escape(advisory.id)}\b", changelog.read()):
                    return True
        except (OSError, EOFError):
            continue  # no such package, or no documents: nothing says that it is mended
    return False


def _is_fixed(advisory: Advisory, number: Version) -> bool:
    fixed = [_parsed(text) for text in advisory.fixed]
    same_line = [known for known in fixed if known[0][:2] == number[0][:2]]
    return number >= fixed[-1] or any(number >= known for known in same_line)


def _parse(version: str) -> Version | None:
    """``1.1.5+ds1`` and ``v1.4.0-rc.3``; None for what names no release: it counts as bad."""
    match = re.match(r"v?(\d+(?:\.\d+)+)(?:[-~]?rc\.?(\d+))?", version)
    if match is None:
        return None
    return tuple(int(part) for part in match[1].split(".")), int(match[2]) if match[2] else RELEASE


def _parsed(version: str) -> Version:
    return _parse(version) or ((0,), 0)
