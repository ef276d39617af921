"""Time the preparation of a workspace against copying it: ``python benchmarks/workspace.py [FILES]``.

One run, one tree, both sides warm, best of three each. ``prepare`` is everything the host does before
the engine mounts: checks, the walk with its digest, the mask, the id-mapped mount when run as root.
Mounting the overlay itself does not depend on the number of files; with Docker it is part of the
container's start, and ``--docker`` times creating and removing the volume on top.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sandbox.container.workspace import PreparedWorkspace, prepare_workspace, release_workspace
from sandbox.policy.paths import DenyPatterns

PATTERNS = DenyPatterns(["**/.env*", "**/secrets/**", "**/node_modules/**"])
ROUNDS = 3


def main() -> None:
    """Build the tree, time both sides, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="?", type=int, default=100_000)
    parser.add_argument("--docker", action="store_true", help="also create and remove the volume")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="agent-runner-bench-"))
    try:
        tree = root / "tree"
        build_tree(tree, arguments.files)
        copy = best(lambda: copy_tree(tree, root / "copy"), lambda: shutil.rmtree(root / "copy"))
        session = root / "state" / "sessions" / "bench"

        def prepare() -> None:
            prepared = prepare_workspace(tree, PATTERNS, session)
            if arguments.docker:
                create_volume(prepared)

        ready = best(prepare, lambda: release_workspace(session))
    finally:
        shutil.rmtree(root)
    print(f"{'files':>9}  {'cp -a':>9}  {'prepare':>9}  ratio")
    print(
        f"{arguments.files:>9}  {copy:>7.2f} s  {ready:>7.2f} s  1/{copy / ready:.1f}  (target: under 1/10)"
    )


def build_tree(tree: Path, files: int) -> None:
    """Make a tree like a source checkout: 100 files a folder, a secret in every tenth, 2 KB each."""
    content = b"some line of source code\n" * 80
    for number in range(files):
        folder = tree / f"package{number // 10_000}" / f"module{number // 100}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
            if number % 1000 == 0:
                (folder / ".env").write_bytes(content)
        (folder / f"file{number}.py").write_bytes(content)


def copy_tree(source: Path, target: Path) -> None:
    """Copy as the obvious alternative does."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def create_volume(prepared: PreparedWorkspace) -> None:
    """Create the volume in the engine and remove it again."""
    volume = prepared.volume
    layers = f"lowerdir={':'.join(volume.lower)},upperdir={volume.upper},workdir={volume.work}"
    options = ["type=overlay", "device=overlay", "o=" + ",".join([layers, *volume.flags])]
    arguments = [part for option in options for part in ("--opt", option)]
    create = ["docker", "volume", "create", "--driver", "local", *arguments, volume.name]
    subprocess.run(create, check=True, capture_output=True)
    subprocess.run(["docker", "volume", "rm", volume.name], check=True, capture_output=True)


def best(action: Callable[[], None], undo: Callable[[], None]) -> float:
    """Return the seconds of the fastest round."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
        undo()
    return min(taken)


if __name__ == "__main__":
    main()
