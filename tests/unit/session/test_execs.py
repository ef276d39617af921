"""The record of execs: verdicts, bounds, and what the agent is told."""

from __future__ import annotations

import pytest

from sandbox.container.spec import ClosedShell
from sandbox.errors import RecordError
from sandbox.events import Event, ExecObserved
from sandbox.guest.messages import ExecSeen
from sandbox.session import execs as execs_module
from sandbox.session.execs import ExecRecord

CLOSED = ClosedShell(("/usr/bin/make", "/workspace"), (), (), (), {"/bin": "usr/bin"})


def seen(path: bytes, found: bytes = b"", argv: tuple[bytes, ...] = (b"x",)) -> ExecSeen:
    return ExecSeen(7, 6, path, argv, is_cut=False, found=found)


class Recorded:
    """A record over a list."""

    def __init__(
        self, blocked: tuple[str, ...] = ("/usr/bin/curl",), closed: ClosedShell | None = None
    ) -> None:
        self.events: list[ExecObserved] = []
        self.execs = ExecRecord(self._take, blocked, closed).of_action("a1")

    def _take(self, event: Event) -> None:
        assert isinstance(event, ExecObserved)
        self.events.append(event)

    @property
    def verdicts(self) -> list[str]:
        return [event.verdict for event in self.events]


def test_an_exec_is_recorded_as_it_was_claimed() -> None:
    record = Recorded()
    record.execs(ExecSeen(7, 6, b"./a\xff", (b"a\n", b""), is_cut=True, found=b"/workspace/a"))
    assert record.events == [
        ExecObserved(
            action_id="a1", claimed_pid=7, claimed_parent=6, claimed_path="./a\ufffd", argv=["a\n", ""],
            argv_is_cut=True, verdict="allowed",
        )
    ]  # fmt: skip


def test_a_covered_program_is_refused_by_whatever_path_it_was_called() -> None:
    record = Recorded()
    for path, found in (
        (b"/usr/bin/curl", b""),
        (b"/bin/curl", b"/usr/bin/curl"),
        (b"./c", b"/usr/bin/curl"),
    ):
        record.execs(seen(path, found))
    record.execs(seen(b"/workspace/curl"))
    assert record.verdicts == ["refused"] * 3 + ["allowed"]


def test_what_a_closed_shell_does_not_list_is_refused() -> None:
    record = Recorded((), CLOSED)
    for path in (b"/usr/bin/make", b"/bin/make", b"/workspace/out/test", b"/usr/bin/git", b""):
        record.execs(seen(path))
    assert record.verdicts == ["allowed", "allowed", "allowed", "refused", "allowed"]


def test_guidance_names_each_refused_program_once_unless_the_output_did() -> None:
    record = Recorded(closed=CLOSED)
    for path in (b"/usr/bin/curl", b"/usr/bin/curl", b"/usr/bin/gi\x1bt"):
        record.execs(seen(path))
    blocked = "'curl' is blocked by policy (shell.blocked_commands)"
    closed = "'gi?t' is not allowed by policy (shell.mode closed)"
    assert record.execs.guidance("") == [blocked, closed]
    assert record.execs.guidance(f"agent-runner: {blocked}\n") == [closed]


def test_guidance_stays_short() -> None:
    record = Recorded((), CLOSED)
    for number in range(50):
        record.execs(seen(b"/opt/%d" % number))
    assert len(record.execs.guidance("")) == 5


def test_a_session_records_so_many_execs_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execs_module, "MAX_EXECS", 3)
    record = Recorded()
    for _ in range(5):
        record.execs(seen(b"/bin/true"))
    assert (len(record.events), record.execs.unrecorded) == (3, 2)


def test_a_session_records_so_much_text_as_json_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execs_module, "MAX_TEXT_BYTES", 1000)
    record = Recorded()
    record.execs(seen(b"/p", argv=(b"\0" * 100, b"\0" * 60)))
    assert record.events[0].model_dump_json().count("\\u0000") == 160
    record.execs(seen(b"/p", argv=(b"\0" * 100,)))
    record.execs(seen(b"/p"))
    assert (len(record.events), record.execs.unrecorded) == (2, 1)


def test_two_commands_share_the_bound_of_their_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execs_module, "MAX_EXECS", 1)
    events: list[Event] = []
    record = ExecRecord(events.append)
    first, second = record.of_action("a1"), record.of_action("a2")
    first(seen(b"/bin/true"))
    second(seen(b"/bin/true"))
    assert (len(events), first.unrecorded, second.unrecorded) == (1, 0, 1)


def test_what_cannot_be_recorded_is_not_swallowed() -> None:
    def full(event: Event) -> None:
        raise RecordError("the disk is full")

    with pytest.raises(RecordError):
        ExecRecord(full).of_action("a1")(seen(b"/bin/true"))
