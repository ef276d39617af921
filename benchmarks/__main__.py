"""Run the benchmarks and print one table: ``python -m benchmarks [NAME…] [--output json]``."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import cold_start, egress, execs, neighbour, record, tool_call, workspace
from benchmarks.place import Place, file_system, working_place
from benchmarks.report import Findings, Report
from sandbox.container.docker import DockerRuntime
from sandbox.container.image import DEFAULT_IMAGE, find_image
from sandbox.errors import AgentRunnerError, EngineError

BENCHMARKS: dict[str, Callable[[Place], Awaitable[Findings]]] = {
    "cold_start": cold_start.measure,
    "tool_call": tool_call.measure,
    "execs": execs.measure,
    "workspace": workspace.measure,
    "egress": egress.measure,
    "record": record.measure,
    "neighbour": neighbour.measure,
}
NEED_ENGINE = frozenset(("cold_start", "tool_call", "execs", "workspace", "neighbour"))
FAILED, INTERRUPTED = 1, 130


def main() -> int:
    """Parse, measure, print; return the exit code. A target that is not met is a finding, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    parser.add_argument("--image", default=DEFAULT_IMAGE, help="image to run in (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    try:
        report = asyncio.run(_run(arguments.names or list(BENCHMARKS), arguments.image))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("benchmarks: stopped; everything was removed", file=sys.stderr)
        return INTERRUPTED
    except AgentRunnerError as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return FAILED
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        words = " ".join((exc.stderr or b"").decode(errors="replace").split())
        print(f"benchmarks: a peer's command failed: {exc} {words}", file=sys.stderr)
        return FAILED
    except OSError as exc:
        print(f"benchmarks: cannot go on: {exc}; free space there, or set TMPDIR elsewhere", file=sys.stderr)
        return FAILED
    print(report.as_json() if arguments.output == "json" else report.as_text())
    return 0


async def _run(names: list[str], image: str) -> Report:
    task = asyncio.current_task()
    assert task is not None
    # Ctrl-C cancels by itself (asyncio.run); a plain kill must clean up as well.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    engine = "no engine asked"
    if NEED_ENGINE & set(names):
        engine = await _check_engine(image)
    with working_place(image, partial(_tell, "benchmarks")) as unnamed:
        report = Report(f"{_machine()}, {engine}, temporary files on {file_system(unnamed.directory)}")
        for name in names:
            place = replace(unnamed, progress=partial(_tell, name))
            report.findings.append(await BENCHMARKS[name](place))
    return report


async def _check_engine(image: str) -> str:
    """Return what the engine is. Raises EngineError or ImageError with the remedy."""
    if shutil.which("docker") is None:
        raise EngineError("cannot measure against docker: there is no docker command; install docker.io")
    runtime = DockerRuntime()
    try:
        version = (await runtime.facts()).version
        await find_image(runtime, image)
    finally:
        await runtime.close()
    return f"Docker engine {version}"


def _machine() -> str:
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = os.getloadavg()[0]
    return (
        f"Linux {platform.release()}, {os.cpu_count()} CPUs ({model}), load {load:.1f} at the start, "
        f"Python {platform.python_version()}"
    )


def _tell(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
