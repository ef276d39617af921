"""A workspace of 100,000 files: prepared for the engine, and seen in a running container, against ``cp -a``.

``prepare_workspace`` is everything the host does before the engine mounts: checks, the walk, the mask, the
id-mapped mount when run as root. The digest of the tree is taken beside the engine's work: it is in the
second figure, which opens a whole session on the same tree, until its guest has listed it.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from benchmarks.measure import Series, interleave
from benchmarks.place import Place, time_long_command
from benchmarks.report import Findings, Row, Target
from benchmarks.sessions import benchmark_plan, opened_session
from sandbox.container.docker import DockerRuntime
from sandbox.container.workspace.prepare import prepare_workspace, release_workspace
from sandbox.guest.messages import Listing
from sandbox.policy.paths import DenyPatterns

FILES = 100_000
ROUNDS = 3
PREPARES = 2
"""In each round: the copy takes most of it."""
SECONDS = 45.0
MAX_RATIO = 1 / 10


async def measure(place: Place) -> Findings:
    """Build the tree and run the rounds."""
    tree = place.directory / "tree"
    place.progress(f"building a tree of {FILES} files")
    await build_tree(tree, FILES)
    plan = benchmark_plan(place, tree)
    patterns = DenyPatterns(plan.policy.filesystem.deny_patterns)
    runtime = DockerRuntime()
    session, copied = place.state / "sessions" / "prepared", place.directory / "copy"

    async def prepare(series: Series) -> None:
        os.sync()
        for _ in range(PREPARES):
            started = time.perf_counter()
            prepared = prepare_workspace(tree, patterns, session)
            series.add("prepare", time.perf_counter() - started)
            release_workspace(session)
            assert prepared.files == FILES, prepared

    async def mount(series: Series) -> None:
        os.sync()
        started = time.perf_counter()
        async with opened_session(plan, runtime, place.state) as opened:
            guest = await opened.guest()
            listing = await guest.list_files(".", is_recursive=False, max_entries=100)
            series.add("mounted", time.perf_counter() - started)
            assert isinstance(listing, Listing) and listing.entries, listing

    async def copy(series: Series) -> None:
        os.sync()
        try:
            series.add("copy", await time_long_command(["cp", "-a", str(tree), str(copied)]))
        finally:
            # A program of its own: removing takes as long as copying, and nothing is learnt from it.
            await time_long_command(["rm", "-rf", str(copied)])

    try:
        series = await interleave((prepare, copy, mount), ROUNDS, place.progress, warmups=0, seconds=SECONDS)
    finally:
        await runtime.close()
    copies = series.times("copy")
    target = Target(MAX_RATIO)
    return Findings(
        rows=(
            Row(f"workspace, {FILES:,} files", series.times("prepare"), "cp -a", copies, target=target),
            Row("… and mounted in a started container", series.times("mounted"), "cp -a", copies),
        ),
        notes=(
            "workspace: the first row is prepare_workspace (checks, walk, mask, id-mapped mount), "
            "the second a whole session opened on the same tree, its digest taken, until its guest listed "
            "the top. The tree is in the page cache and nothing waits to be written when a side begins.",
        ),
    )


async def build_tree(tree: Path, files: int) -> None:
    """Make a tree like a source checkout: 100 files a folder of 2 kB each, a secret in every tenth folder."""
    content = b"some line of source code\n" * 80
    for number in range(files):
        folder = tree / f"package{number // 10_000}" / f"module{number // 100}"
        if number % 100 == 0:
            await asyncio.sleep(0)  # not in a thread, which would go on building after a Ctrl-C
            folder.mkdir(parents=True)
            if number % 1000 == 0:
                (folder / ".env").write_bytes(content)
        (folder / f"file{number}.py").write_bytes(content)
