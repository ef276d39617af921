"""The record: one event appended, with and without waiting for the disk, and a whole ledger verified.

The peers do the least that could be done with the same bytes: a bare write, a write with ``fdatasync``,
``json.loads`` of every line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import Series, interleave
from benchmarks.place import Place
from benchmarks.recorded import allowed_action, denied_action, session_started
from benchmarks.report import Findings, Row
from sandbox.provenance.ledger import Ledger
from sandbox.provenance.verify import verify_ledger

ROUNDS = 5
ACTIONS, DENIALS = 700, 40


async def measure(place: Place) -> Findings:
    """Run the rounds."""
    directory = place.directory / "record"
    directory.mkdir()
    ledger_file, bare_file = directory / "ledger.jsonl", directory / "bare.jsonl"

    async def append(series: Series) -> None:
        ledger_file.unlink(missing_ok=True)
        ledger = Ledger.create(ledger_file, clock=lambda: datetime.now(UTC))
        try:
            ledger.append(session_started())
            _append_timed(ledger, series)
        finally:
            ledger.close()

    async def write(series: Series) -> None:
        lines = ledger_file.read_bytes().splitlines(keepends=True)
        with _fresh(bare_file) as descriptor:
            for line in lines:
                started = time.perf_counter()
                os.write(descriptor, line)
                series.add("write", time.perf_counter() - started)
            for line in lines[:DENIALS]:
                started = time.perf_counter()
                os.write(descriptor, line)
                os.fdatasync(descriptor)
                series.add("write and sync", time.perf_counter() - started)

    async def verify(series: Series) -> None:
        started = time.perf_counter()
        verified = verify_ledger(ledger_file)
        seconds = time.perf_counter() - started
        assert verified.is_valid, verified.problem
        series.add("verify", seconds / verified.entries)

    async def parse(series: Series) -> None:
        started = time.perf_counter()
        parsed = [json.loads(line) for line in ledger_file.read_bytes().splitlines()]
        series.add("parse", (time.perf_counter() - started) / len(parsed))

    series = await interleave((append, write, verify, parse), ROUNDS, place.progress)
    return Findings(
        rows=(
            Row("record one event", series.times("append"), "write the same line", series.times("write")),
            Row(
                "record a denial, durable",
                series.times("append durable"),
                "write, fdatasync",
                series.times("write and sync"),
            ),
            Row("verify, per entry", series.times("verify"), "json.loads, per line", series.times("parse")),
        ),
        notes=(
            "record: validated events as canonical JSON with a blake3 chain; every 64th append waits for the "
            "disk as well, and lies beyond this p95.",
        ),
    )


def _append_timed(ledger: Ledger, series: Series) -> None:
    for number in range(ACTIONS):
        for event in allowed_action(number):
            started = time.perf_counter()
            ledger.append(event)
            series.add("append", time.perf_counter() - started)
    for number in range(DENIALS):
        asked, denial = denied_action(number)
        ledger.append(asked)
        started = time.perf_counter()
        ledger.append(denial)
        series.add("append durable", time.perf_counter() - started)


@contextmanager
def _fresh(path: Path) -> Iterator[int]:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
