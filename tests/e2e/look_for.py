"""Look for a text wherever a process of the sandbox can look, and print each place that has it. Runs inside.

usage: look_for.py TEXT_BACKWARDS   (so that this program's own arguments are not among the places)
"""

import sys
from pathlib import Path

PLACES = ("/.agent-runner", "/etc", "/home", "/run", "/tmp", "/var/tmp", "/dev/shm", "/workspace")
OF_PROCESSES = ("environ", "cmdline", "mountinfo", "comm", "status")
LIMIT = 4 * 1024 * 1024


def main():
    needle = sys.argv[1][::-1].encode()
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    paths = [process / name for process in processes for name in OF_PROCESSES]
    paths += [Path("/proc/mounts"), Path("/proc/cmdline"), Path("/proc/keys")]
    for place in PLACES:
        paths += Path(place).rglob("*")
    looked = 0
    for path in paths:
        try:
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    looked += 1
                    if needle in file.read(LIMIT):
                        print(path)
        except OSError:
            continue
    print(f"looked at {looked} files", file=sys.stderr)


main()
