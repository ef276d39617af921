"""The ledger's writer: what it writes, when it is durable, and that it fails closed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from sandbox.digest import blake3_hex
from sandbox.errors import RecordError
from sandbox.events import (
    DecisionMade,
    ExecObserved,
    ModelCall,
    PhaseStarted,
    SessionEnded,
    SessionStarted,
    ToolCall,
)
from sandbox.provenance.ledger import (
    GENESIS,
    MAX_LINE_BYTES,
    SYNC_EVERY,
    SYNC_EVERY_EXECS,
    Ledger,
    decode_line,
    read_entries,
)
from sandbox.provenance.verify import verify_ledger
from tests.unit.provenance.recorded import events, name, started, ticking, write_ledger

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.create(tmp_path / "ledger.jsonl", clock=ticking())
    yield made
    with contextlib.suppress(RecordError):
        made.close()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the real fdatasync calls."""
    seen: list[int] = []
    real = os.fdatasync

    def counting(descriptor: int) -> None:
        seen.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", counting)
    return seen


def test_each_line_names_the_digest_of_the_line_above(ledger: Ledger) -> None:
    written = [ledger.append(event) for event in events()]
    lines = ledger.path.read_bytes().splitlines()
    assert len(lines) == len(written) == ledger.entries
    above = GENESIS
    for number, (line, entry) in enumerate(zip(lines, written, strict=True), start=1):
        data = json.loads(line)
        assert (data["seq"], data["prev"], entry.prev) == (number, above, above)
        above = blake3_hex(line)
        assert entry.digest == above
    assert ledger.head == above


def test_what_is_read_back_is_what_was_appended(ledger: Ledger) -> None:
    written = [ledger.append(event) for event in events()]
    assert list(read_entries(ledger.path)) == written


def test_the_golden_ledger_is_written_byte_for_byte(tmp_path: Path) -> None:
    """The vector for other verifiers; it may change only together with the version in ``GENESIS``."""
    written = write_ledger(tmp_path / "ledger.jsonl", events())
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert written.path.read_bytes() == (GOLDEN / "ledger.jsonl").read_bytes()
    assert expected == {"genesis": GENESIS, "head": written.head, "entries": written.entries}


def test_the_golden_ledger_verifies_with_nothing_but_json_and_blake3() -> None:
    from blake3 import blake3

    expected = json.loads((GOLDEN / "expected.json").read_text())
    prev = blake3(b"agent-runner/ledger/v1").hexdigest()
    for number, line in enumerate((GOLDEN / "ledger.jsonl").read_bytes().splitlines(), start=1):
        data = json.loads(line)
        assert (data["prev"], data["seq"]) == (prev, number)
        # For data without floats and with ASCII keys, RFC 8785 is just this.
        assert json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == line
        prev = blake3(line).hexdigest()
    assert (prev, number) == (expected["head"], expected["entries"])


def test_the_file_is_private_and_never_another_sessions(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, clock=ticking()).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RecordError, match="exists already"):
        Ledger.create(path, clock=ticking())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="exists already"):
        Ledger.create(tmp_path / "link", clock=ticking())
    with pytest.raises(RecordError, match="directory is missing"):
        Ledger.create(tmp_path / "absent" / "ledger.jsonl", clock=ticking())


def test_a_second_writer_finds_the_file_locked_until_it_is_closed(ledger: Ledger) -> None:
    with ledger.path.open("ab") as other:
        for lock in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, lock | fcntl.LOCK_NB)
        ledger.append(started())
        ledger.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_session_starts_once_first_and_nothing_follows_its_end(ledger: Ledger) -> None:
    with pytest.raises(RecordError, match="SessionStarted comes first"):
        ledger.append(PhaseStarted(phase="design"))
    ledger.append(started())
    with pytest.raises(RecordError, match="has started already"):
        ledger.append(started())
    ledger.append(SessionEnded(status="completed", reason="", spent={}))
    with pytest.raises(RecordError, match="has ended"):
        ledger.append(PhaseStarted(phase="design"))
    ledger.close()
    assert verify_ledger(ledger.path, head=ledger.head, entries=2).is_valid


def test_a_clock_that_is_set_back_does_not_reorder_the_ledger(tmp_path: Path) -> None:
    times = iter(datetime(2026, 1, 1, 12, minute, tzinfo=UTC) for minute in (5, 3, 9))
    ledger = Ledger.create(tmp_path / "ledger.jsonl", clock=lambda: next(times))
    seen = [ledger.append(event).time.minute for event in (started(), *[PhaseStarted(phase="p")] * 2)]
    ledger.close()
    assert seen == [5, 5, 9]
    assert verify_ledger(ledger.path).is_valid


def test_times_are_written_in_utc_with_six_digits(tmp_path: Path) -> None:
    local = datetime(2026, 1, 1, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    ledger = Ledger.create(tmp_path / "ledger.jsonl", clock=lambda: local)
    ledger.append(started())
    ledger.close()
    assert json.loads(ledger.path.read_bytes())["time"] == "2025-12-31T23:00:00.000000Z"
    naive = Ledger.create(tmp_path / "naive.jsonl", clock=lambda: datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="time zone"):
        naive.append(started())
    naive.close()


def test_denials_model_calls_and_the_end_are_durable_at_once(ledger: Ledger, syncs: list[int]) -> None:
    call = ModelCall(
        call_id="m", attempt=1, model="m", request_blake3=name(""), input_tokens_bound=1, max_tokens=1
    )
    deny = DecisionMade(action_id="a", verdict="deny", rule="r", reason="")
    allow = DecisionMade(action_id="a", verdict="allow", rule="r", reason="")
    counts = []
    for event in (started(), allow, deny, allow, call, SessionEnded(status="x", reason="", spent={})):
        ledger.append(event)
        counts.append(len(syncs))
    assert counts == [0, 0, 1, 1, 2, 3]
    ledger.close()
    assert len(syncs) == 3


def test_everything_else_is_durable_within_a_stated_number_of_entries(
    ledger: Ledger, syncs: list[int]
) -> None:
    ledger.append(started())
    for _ in range(SYNC_EVERY - 2):
        ledger.append(PhaseStarted(phase="p"))
    assert syncs == []
    ledger.append(PhaseStarted(phase="p"))
    assert len(syncs) == 1
    ledger.append(PhaseStarted(phase="p"))
    ledger.close()
    assert len(syncs) == 2


def test_a_flood_of_execs_waits_for_the_disk_less_often(ledger: Ledger, syncs: list[int]) -> None:
    """The sandbox chooses how many there are, and each sync holds up every session of this controller."""
    exec_ = ExecObserved(action_id="a", claimed_pid=1, argv=[])
    ledger.append(started())
    for _ in range(SYNC_EVERY_EXECS - 2):
        ledger.append(exec_)
    assert syncs == []
    ledger.append(exec_)
    assert len(syncs) == 1
    for _ in range(SYNC_EVERY):
        ledger.append(exec_)
    ledger.append(PhaseStarted(phase="p"))  # the control: any other entry has them written at once
    assert len(syncs) == 2


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size``: a write across it is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_cut_short_refuses_every_later_append(ledger: Ledger) -> None:
    ledger.append(started())
    whole = ledger.path.stat().st_size
    head = ledger.head
    with file_size_limit(whole + 100), pytest.raises(RecordError, match="only 100 of"):
        ledger.append(started_phase(500))
    # The room is back, the ledger stays closed: what follows a gap would prove nothing.
    with pytest.raises(RecordError, match="an earlier write failed"):
        ledger.append(PhaseStarted(phase="p"))
    with pytest.raises(RecordError, match="an earlier write failed"):
        ledger.sync()
    ledger.close()
    assert (ledger.entries, ledger.head, ledger.path.stat().st_size) == (1, head, whole + 100)
    found = verify_ledger(ledger.path)
    assert (found.is_valid, found.entries, found.line, found.status) == (False, 1, 2, "interrupted")
    assert found.problem is not None
    assert "torn" in found.problem


def test_a_write_refused_as_a_whole_refuses_every_later_append(ledger: Ledger) -> None:
    ledger.append(started())
    whole = ledger.path.stat().st_size
    with file_size_limit(whole), pytest.raises(RecordError, match="may not grow"):
        ledger.append(PhaseStarted(phase="p"))
    with pytest.raises(RecordError, match="an earlier write failed"):
        ledger.append(PhaseStarted(phase="p"))
    ledger.close()
    assert ledger.path.stat().st_size == whole
    assert verify_ledger(ledger.path).is_valid


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_ends_the_ledger_and_room_made_later_does_not_revive_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this root may not mount: {mounted.stderr.strip()}")
    try:
        (disk / "ballast").write_bytes(b"x" * 16_384)
        ledger = Ledger.create(disk / "ledger.jsonl", clock=ticking())
        ledger.append(started())
        appended = 1
        with pytest.raises(RecordError, match=r"full|space"):
            while appended < 10_000:
                ledger.append(started_phase(900))
                appended += 1
        (disk / "ballast").unlink()
        with pytest.raises(RecordError, match="an earlier write failed"):
            ledger.append(PhaseStarted(phase="p"))
        ledger.close()
        assert ledger.entries == appended > 10
        assert verify_ledger(ledger.path).entries == appended
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failed_sync_refuses_every_later_append(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    ledger.append(started())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(RecordError, match="Input/output error"):
            ledger.append(DecisionMade(action_id="a", verdict="deny", rule="r", reason=""))
    with pytest.raises(RecordError, match="an earlier write failed"):
        ledger.append(PhaseStarted(phase="p"))


def test_an_event_that_cannot_be_written_is_refused_and_the_next_one_is_not(ledger: Ledger) -> None:
    ledger.append(started())
    for bad in (
        PhaseStarted(phase="x" * MAX_LINE_BYTES),
        PhaseStarted.model_construct(type="PhaseStarted", phase="\ud800"),
        SessionEnded(status="completed", reason="", spent={"tokens": 2**53}),
    ):
        with pytest.raises(RecordError, match="cannot append"):
            ledger.append(bad)
    ledger.append(PhaseStarted(phase="p"))
    ledger.close()
    assert verify_ledger(ledger.path, head=ledger.head, entries=2).is_valid


def test_a_closed_ledger_refuses_and_closing_again_is_fine(ledger: Ledger) -> None:
    ledger.append(started())
    ledger.close()
    ledger.close()
    with pytest.raises(RecordError, match="is closed"):
        ledger.append(PhaseStarted(phase="p"))


def test_a_line_of_the_longest_length_is_read_back(ledger: Ledger) -> None:
    ledger.append(started())
    room = MAX_LINE_BYTES - 1 - len(_line_of(PhaseStarted(phase=""), ledger))
    ledger.append(PhaseStarted(phase="x" * room))
    ledger.append(PhaseStarted(phase="p"))
    ledger.close()
    assert max(map(len, ledger.path.read_bytes().splitlines(keepends=True))) == MAX_LINE_BYTES
    assert verify_ledger(ledger.path, head=ledger.head, entries=3).is_valid


def test_a_writer_killed_at_any_moment_leaves_a_ledger_that_holds_to_its_last_line(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sandbox.provenance.ledger import Ledger;"
        "from tests.unit.provenance.recorded import started, ticking;"
        "from sandbox.events import PhaseStarted;"
        "ledger = Ledger.create(Path(sys.argv[1]), clock=ticking()); ledger.append(started());\n"
        "while True: print(ledger.append(PhaseStarted(phase='p')).digest, flush=True)"
    )
    for count in (1, 7, 100):
        path = tmp_path / f"{count}.jsonl"
        with subprocess.Popen(
            [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            acknowledged = [writer.stdout.readline().strip() for _ in range(count)]
            writer.kill()
        found = verify_ledger(path)
        assert (found.is_valid, found.status) == (True, "interrupted")
        assert [entry.digest for entry in read_entries(path)][1 : count + 1] == acknowledged


def test_reading_a_fifo_or_a_link_in_place_of_a_ledger_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    written = write_ledger(tmp_path / "ledger.jsonl", events())
    (tmp_path / "link").symlink_to(written.path)
    assert len(list(read_entries(written.path))) == written.entries
    for planted in ("fifo", "device", "link", "absent"):
        with pytest.raises(RecordError, match="cannot read ledger"):
            list(read_entries(tmp_path / planted))


VALID = (GOLDEN / "ledger.jsonl").read_bytes().splitlines()[0] if GOLDEN.exists() else b""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line.replace(b'":"', b'": "', 1), "canonical"),
        (lambda line: line + b"\r", "canonical"),
        (lambda line: b"\xef\xbb\xbf" + line, "JSON"),
        (lambda line: line.replace(b'"seq":1', b'"seq":1.0'), "seq"),
        (lambda line: line.replace(b'"seq":1', b'"seq":true'), "seq"),
        (lambda line: line.replace(b'"seq":1', b'"seq":1,"seq":1'), "canonical"),
        (lambda line: line.replace(b'"seq":1', b'"seq":1,"more":1'), "exactly the fields"),
        (lambda line: line.replace(b".000000Z", b".000Z"), "RFC 3339"),
        (lambda line: line.replace(b"2026-11", b"2026-13"), "month"),
        (lambda line: line.replace(b'{"event":{', b'{"event":{"a":1,'), "a: Extra inputs"),
        (lambda line: line.replace(b'"profile":"production"', b'"profile":7'), "knows"),
        (lambda line: line.replace(b'"profile":"production",', b""), "knows"),
        (lambda line: line.replace(b'"SessionStarted"', b'"SessionBegun"'), "knows"),
        (lambda line: line.replace(b"fix the sum", b"\\ud800"), "canonical"),
        (lambda line: line.replace(b"fix the sum", b"\xff"), "JSON"),
        (lambda line: b"[" * 100_000, "JSON"),
        (lambda line: b"[]", "object"),
        (lambda line: b"9" * 5000, "JSON"),
        (lambda line: b"NaN", "object"),
        (lambda line: b"", "JSON"),
        (lambda line: line.decode().encode("utf-16"), "JSON"),
    ],
)
def test_a_line_is_read_strictly(change: object, reason: str) -> None:
    assert isinstance(decode_line(VALID).event, SessionStarted)
    assert callable(change)
    changed = change(VALID)
    assert changed != VALID
    with pytest.raises(ValueError, match=reason):
        decode_line(changed)


def test_a_tool_call_with_its_optional_fields_absent_is_still_read() -> None:
    """Fields added later are optional: a ledger of an older version still verifies."""
    from sandbox.digest import canonical_json

    event = {"type": "ToolCall", "action_id": "a", "tool": "t", "arguments_blake3": "", "summary": ""}
    line = canonical_json({"event": event, "prev": GENESIS, "seq": 1, "time": "2026-01-01T00:00:00.000000Z"})
    assert isinstance(decode_line(line).event, ToolCall)


def started_phase(length: int) -> PhaseStarted:
    return PhaseStarted(phase="x" * length)


def _line_of(event: PhaseStarted, ledger: Ledger) -> bytes:
    from sandbox.provenance.ledger import encode_line

    return encode_line(ledger.entries + 1, datetime(2026, 1, 1, tzinfo=UTC), ledger.head, event)
