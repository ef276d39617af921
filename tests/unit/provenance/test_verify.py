"""Every edit of a record is found and named; each test has the untouched record as its control."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.digest import blake3_hex, canonical_json
from sandbox.provenance.keys import PublicKey, SigningKey, signing_key
from sandbox.provenance.ledger import GENESIS
from sandbox.provenance.statement import seal, seal_session
from sandbox.provenance.verify import Verification, verify_ledger, verify_session
from tests.unit.provenance.recorded import (
    SESSION,
    chain_anew,
    events,
    record_session,
    write_ledger,
    write_result,
)

COUNT = len(events())
LINES = range(1, COUNT + 1)


class Recorded:
    """An untouched ledger in memory, and the verdict on edited copies of it."""

    def __init__(self, directory: Path) -> None:
        written = write_ledger(directory / "untouched.jsonl", events())
        self.path = directory / "edited.jsonl"
        self.head = written.head
        self.lines = written.path.read_bytes().splitlines()

    def judge(self, content: bytes | list[bytes], *, is_sealed: bool = True) -> Verification:
        whole = content if isinstance(content, bytes) else b"".join(line + b"\n" for line in content)
        self.path.write_bytes(whole)
        if is_sealed:
            return verify_ledger(self.path, head=self.head, entries=COUNT)
        return verify_ledger(self.path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    made = Recorded(tmp_path_factory.mktemp("ledger"))
    for is_sealed in (True, False):
        control = made.judge(made.lines, is_sealed=is_sealed)
        assert control == Verification(True, COUNT, made.head, None, None, "complete")
    return made


@pytest.mark.parametrize("line", LINES)
def test_any_changed_byte_is_found_on_its_line(recorded: Recorded, line: int) -> None:
    original = recorded.lines[line - 1]
    for position in range(0, len(original), 5):
        edited = bytearray(original)
        edited[position] ^= 1
        content = [*recorded.lines]
        content[line - 1] = bytes(edited)
        found = recorded.judge(content)
        assert (found.is_valid, found.line) == (False, line), (position, found)
        assert "changed" in (found.problem or "") or "calls itself" in (found.problem or "")


@pytest.mark.parametrize("line", LINES)
def test_without_a_sealed_head_a_well_formed_change_is_found_unless_it_is_in_the_last_line(
    recorded: Recorded, line: int
) -> None:
    content = [*recorded.lines]
    time = json.loads(content[line - 1])["time"]
    content[line - 1] = content[line - 1].replace(time.encode(), time.replace("000Z", "001Z").encode())
    found = recorded.judge(content, is_sealed=False)
    if line == COUNT:
        assert found.is_valid  # why a record is sealed
    else:
        # The last two lines vouch for each other only: either may be the changed one.
        assert (found.is_valid, found.line) == (False, line)
    assert recorded.judge(content).line == line


@pytest.mark.parametrize("line", LINES)
def test_a_removed_line_is_found_where_it_is_missing(recorded: Recorded, line: int) -> None:
    content = recorded.lines[: line - 1] + recorded.lines[line:]
    found = recorded.judge(content)
    assert (found.is_valid, found.line) == (False, line)
    assert "removed" in (found.problem or "") or "cut off" in (found.problem or "")
    assert found.entries == line - 1


@pytest.mark.parametrize("line", range(2, COUNT - 3))
def test_several_removed_lines_are_named(recorded: Recorded, line: int) -> None:
    content = recorded.lines[: line - 1] + recorded.lines[line + 2 :]
    assert recorded.judge(content).problem == (
        f"entries {line} to {line + 2} were removed: line {line} is entry {line + 3}"
    )


def forged(recorded: Recorded, line: int, **changes: object) -> bytes:
    """Return an entry that is well-formed and claims this place, unless told otherwise."""
    above = recorded.lines[line - 2] if line > 1 else None
    entry = {
        "event": {"type": "PhaseStarted", "phase": "forged"},
        "prev": blake3_hex(above) if above else GENESIS,
        "seq": line,
        "time": json.loads(recorded.lines[min(line, COUNT) - 1])["time"],
    }
    return canonical_json(entry | changes)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"prev": "ab" * 32}, {"seq": 1}, {"seq": COUNT}, {"seq": 5, "prev": "00" * 32}, {"event": {}}],
    ids=["chained", "unchained", "seq_1", "seq_last", "out_of_place", "no_event"],
)
def test_an_inserted_line_is_named(recorded: Recorded, line: int, changes: dict[str, object]) -> None:
    content = [*recorded.lines]
    content.insert(line - 1, forged(recorded, line, **changes))
    found = recorded.judge(content)
    assert (found.is_valid, found.line) == (False, line), found
    assert "inserted" in (found.problem or "")
    assert not recorded.judge(content, is_sealed=False).is_valid


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("garbage", [b"", b"garbage", b"{}", b"\x00" * 9], ids=repr)
def test_inserted_garbage_is_named(recorded: Recorded, line: int, garbage: bytes) -> None:
    content = [*recorded.lines]
    content.insert(line - 1, garbage)
    found = recorded.judge(content)
    assert (found.is_valid, found.line) == (False, line)
    assert "inserted" in (found.problem or "")


def test_a_line_added_at_the_end_is_found(recorded: Recorded) -> None:
    for added in (forged(recorded, COUNT + 1), b"", b"garbage", recorded.lines[0]):
        for is_sealed in (True, False):
            found = recorded.judge([*recorded.lines, added], is_sealed=is_sealed)
            assert (found.is_valid, found.line) == (False, COUNT + 1), (added, found)


@pytest.mark.parametrize("line", LINES)
def test_two_swapped_lines_are_found_at_the_first(recorded: Recorded, line: int) -> None:
    for other in range(line + 1, COUNT + 1):
        content = [*recorded.lines]
        content[line - 1], content[other - 1] = content[other - 1], content[line - 1]
        for is_sealed in (True, False):
            found = recorded.judge(content, is_sealed=is_sealed)
            assert (found.is_valid, found.line) == (False, line)
            assert found.problem == f"lines were reordered: entry {line} stands on line {other}"


@pytest.mark.parametrize("line", LINES)
def test_a_repeated_line_is_named_wherever_it_stands(recorded: Recorded, line: int) -> None:
    for place in range(line, COUNT + 1):
        content = [*recorded.lines]
        content.insert(place, recorded.lines[line - 1])
        for is_sealed in (True, False):
            found = recorded.judge(content, is_sealed=is_sealed)
            assert found.line == place + 1
            assert found.problem == f"line {place + 1} repeats line {line}"


@pytest.mark.parametrize("kept", range(COUNT))
def test_an_end_cut_off_between_lines_is_found_by_the_sealed_head(recorded: Recorded, kept: int) -> None:
    found = recorded.judge(recorded.lines[:kept])
    assert (found.is_valid, found.line, found.entries) == (False, kept + 1, kept)
    assert "cut off" in (found.problem or "")
    unsealed = recorded.judge(recorded.lines[:kept], is_sealed=False)
    assert (unsealed.is_valid, unsealed.status) == (kept > 0, "interrupted")


@pytest.mark.parametrize("line", LINES)
def test_an_end_cut_off_within_a_line_is_found(recorded: Recorded, line: int) -> None:
    whole = b"".join(text + b"\n" for text in recorded.lines[: line - 1])
    last = recorded.lines[line - 1]
    for length in {1, len(last) // 2, len(last) - 1, len(last)}:
        found = recorded.judge(whole + last[:length])
        assert (found.is_valid, found.line, found.entries) == (False, line, line - 1)
        unsealed = recorded.judge(whole + last[:length], is_sealed=False)
        assert (unsealed.is_valid, unsealed.line, unsealed.status) == (False, line, "interrupted")
        assert "torn" in (unsealed.problem or "")


@pytest.mark.parametrize("line", LINES)
def test_a_chain_written_anew_is_found_only_by_the_sealed_head(recorded: Recorded, line: int) -> None:
    content = [*recorded.lines]
    time = json.loads(content[line - 1])["time"]
    content[line - 1] = content[line - 1].replace(time.encode(), time.replace("000Z", "001Z").encode())
    anew = chain_anew(content)
    assert recorded.judge(anew, is_sealed=False).is_valid
    found = recorded.judge(anew)
    assert (found.is_valid, found.line) == (False, COUNT)
    assert "sealed" in (found.problem or "")


@pytest.mark.parametrize("line", LINES[1:])
def test_a_time_before_the_line_above_is_found(recorded: Recorded, line: int) -> None:
    content = [*recorded.lines]
    content[line - 1] = content[line - 1].replace(b'"time":"2026', b'"time":"2025')
    found = recorded.judge(chain_anew(content), is_sealed=False)
    assert (found.is_valid, found.line) == (False, line)
    assert found.problem == f"line {line}: its time is before the line above"


def test_a_sealed_head_alone_tells_what_was_added_and_what_was_cut(recorded: Recorded) -> None:
    head = blake3_hex(recorded.lines[4])
    recorded.path.write_bytes(b"".join(line + b"\n" for line in recorded.lines[:7]))
    found = verify_ledger(recorded.path, head=head)
    assert (found.is_valid, found.line) == (False, 6)
    recorded.path.write_bytes(b"".join(line + b"\n" for line in recorded.lines[:5]))
    assert verify_ledger(recorded.path, head=head).is_valid
    recorded.path.write_bytes(b"".join(line + b"\n" for line in recorded.lines[:4]))
    assert not verify_ledger(recorded.path, head=head).is_valid


def test_an_absent_empty_or_planted_ledger_is_not_valid(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for planted in ("absent", "empty", "fifo", "directory"):
        found = verify_ledger(tmp_path / planted)
        assert (found.is_valid, found.entries) == (False, 0)
        assert found.problem


def test_a_line_without_end_is_not_read_into_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    found = verify_ledger(path)
    assert (found.is_valid, found.line) == (False, 1)


# The session as a whole


@pytest.fixture
def session(tmp_path: Path) -> Path:
    directory = record_session(tmp_path / "state")
    control = verify_session(directory)
    assert (control.is_valid, control.problems, control.status) == (True, (), "complete")
    return directory


def problems(directory: Path, public_key: PublicKey | None = None) -> set[str]:
    found = verify_session(directory, public_key=public_key)
    assert found.is_valid == (not found.problems)
    return {problem.part for problem in found.problems}


def other_key(tmp_path: Path) -> SigningKey:
    return signing_key(tmp_path / "elsewhere")


def edit_lines(directory: Path, edit: Callable[[list[bytes]], list[bytes]]) -> None:
    path = directory / "ledger.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in edit(path.read_bytes().splitlines())))


def test_a_verified_session_names_the_key_that_signed_it(session: Path) -> None:
    key = signing_key(session.parent.parent).public
    assert verify_session(session).keyid == key.keyid
    assert verify_session(session, public_key=key).is_valid


def test_an_edited_ledger_line_is_named_with_its_number(session: Path) -> None:
    edit_lines(session, lambda lines: [line.replace(b"curl evil", b"curl good") for line in lines])
    found = verify_session(session)
    assert [(problem.part, problem.line) for problem in found.problems] == [("ledger", 12)]
    assert "line 12 was changed" in found.problems[0].message


def test_a_ledger_chained_anew_does_not_match_the_statement(session: Path) -> None:
    edit_lines(
        session,
        lambda lines: chain_anew([line.replace(b"curl evil.example", b"true") for line in lines]),
    )
    assert verify_ledger(session / "ledger.jsonl").is_valid
    assert "ledger" in problems(session)


def test_a_statement_signed_anew_with_another_key_is_refused(session: Path, tmp_path: Path) -> None:
    thief = other_key(tmp_path)
    edit_lines(
        session,
        lambda lines: chain_anew([line.replace(b"curl evil.example", b"true") for line in lines]),
    )
    ledger = verify_ledger(session / "ledger.jsonl")
    write_result(session, head=ledger.head, entries=ledger.entries)
    seal_session(session, thief, head=ledger.head, entries=ledger.entries, runner_version="0.1.0")
    assert problems(session, thief.public) == set()  # complete in itself: only the key gives it away
    assert problems(session) == {"statement"}


@pytest.mark.parametrize(
    "lie",
    [{"spent": {}}, {"status": "refused"}, {"image_id": "sha256:other"}, {"models": []}, {"patch": None}],
)
def test_a_signed_statement_that_says_something_else_than_the_ledger_is_found(
    session: Path, lie: dict[str, object]
) -> None:
    statement = verify_session(session).statement
    assert statement is not None
    lying = statement.model_copy(update={"predicate": statement.predicate.model_copy(update=lie)})
    (session / "statement.json").write_bytes(seal(lying, signing_key(session.parent.parent)))
    found = verify_session(session)
    assert [problem.message for problem in found.problems] == [
        f"the statement's {next(iter(lie))} is not the ledger's"
    ]


def test_a_statement_about_no_ledger_is_not_enough(session: Path) -> None:
    statement = verify_session(session).statement
    assert statement is not None
    without = statement.model_copy(update={"subject": statement.subject[1:]})
    (session / "statement.json").write_bytes(seal(without, signing_key(session.parent.parent)))
    assert problems(session) == {"statement"}


def test_a_record_is_not_verified_with_a_key_that_did_not_sign_it(session: Path, tmp_path: Path) -> None:
    assert problems(session, other_key(tmp_path).public) == {"statement"}


def test_without_any_trusted_key_nothing_is_verified(session: Path) -> None:
    shutil.rmtree(session.parent.parent / "keys")
    assert problems(session) == {"statement"}


def test_a_record_stays_verified_when_the_key_was_replaced_and_its_public_half_kept(session: Path) -> None:
    keys = session.parent.parent / "keys"
    (keys / "signing.pub").rename(keys / "2026.pub")
    (keys / "signing.pem").unlink()
    signing_key(session.parent.parent)
    assert problems(session) == set()
    (keys / "2026.pub").unlink()
    assert problems(session) == {"statement"}


@pytest.mark.parametrize(
    ("file", "edit", "part"),
    [
        ("patch.diff", lambda text: text.replace(b"+a+b", b"+a*b"), "patch"),
        ("patch.diff", lambda text: b"", "patch"),
        ("patch.diff", None, "patch"),
        ("result.json", lambda text: text.replace(b"completed", b"refused"), "result"),
        ("result.json", lambda text: text + b" ", "result"),
        ("result.json", lambda text: b"[" * 100_000, "result"),
        ("result.json", None, "result"),
        ("statement.json", lambda text: text.replace(b'"sig":"', b'"sig":"A'), "statement"),
        ("statement.json", lambda text: text[:-40], "statement"),
        ("statement.json", lambda text: b"{}", "statement"),
        ("statement.json", lambda text: text.replace(b"vnd.in-toto", b"vnd.other"), "statement"),
        ("statement.json", None, "statement"),
        ("ledger.jsonl", None, "ledger"),
        ("ledger.jsonl", lambda text: text[:-1], "ledger"),
        ("ledger.jsonl", lambda text: text + b"\n", "ledger"),
    ],
)
def test_each_file_of_the_session_is_bound(
    session: Path, file: str, edit: Callable[[bytes], bytes] | None, part: str
) -> None:
    path = session / file
    if edit is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(edit(before))
        assert path.read_bytes() != before
    assert problems(session) == {part}


def test_any_changed_byte_of_the_statement_is_found(session: Path) -> None:
    path = session / "statement.json"
    original = path.read_bytes()
    refused = 0
    for position in range(0, len(original) - 1, 37):
        edited = bytearray(original)
        edited[position] ^= 1
        path.write_bytes(edited)
        found = verify_session(session)
        # The key id is a hint that nobody signed and nobody trusts: it alone may change.
        if found.is_valid:
            envelope = json.loads(edited)
            assert envelope["payload"] == json.loads(original)["payload"]
            assert envelope["signatures"][0]["sig"] == json.loads(original)["signatures"][0]["sig"]
            assert found.keyid == signing_key(session.parent.parent).public.keyid
        else:
            assert {problem.part for problem in found.problems} == {"statement"}
            refused += 1
    assert refused > 50
    path.write_bytes(original)
    assert problems(session) == set()


def test_another_sessions_statement_does_not_fit(session: Path) -> None:
    other = record_session(session.parent.parent, "20261122-123457-aaaaaa", status="cancelled")
    shutil.copy(other / "statement.json", session / "statement.json")
    assert "ledger" in problems(session)


def test_a_whole_record_under_another_sessions_name_is_found(session: Path) -> None:
    moved = session.with_name("20261122-123457-aaaaaa")
    session.rename(moved)
    assert problems(moved) == {"session"}


def test_a_patch_that_the_record_does_not_know_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "sessions" / SESSION
    directory.mkdir(parents=True)
    without = [event for event in events() if event.type != "PatchExported"]
    ledger = write_ledger(directory / "ledger.jsonl", without)
    key = signing_key(tmp_path / "state")
    seal_session(directory, key, head=ledger.head, entries=ledger.entries, runner_version="0.1.0")
    assert problems(directory) == set()
    (directory / "patch.diff").write_bytes(b"+ os.system('evil')\n")
    assert problems(directory) == {"patch"}


def test_a_result_written_after_sealing_must_still_agree_with_the_ledger(tmp_path: Path) -> None:
    directory = record_session(tmp_path / "state", with_result=False)
    ledger = verify_ledger(directory / "ledger.jsonl")
    write_result(directory, head=ledger.head, entries=ledger.entries)
    assert problems(directory) == set()
    for lie in (
        {"status": "refused"},
        {"spent": {"usd_nano": 1}},
        {"ledger": {"head": "0" * 64}},
        {"patch": None},
    ):
        path = directory / "result.json"
        honest = path.read_text()
        path.write_text(json.dumps(json.loads(honest) | lie))
        assert problems(directory) == {"result"}
        path.write_text(honest)


def test_a_planted_link_is_not_followed(session: Path) -> None:
    for name in ("patch.diff", "statement.json", "ledger.jsonl"):
        path = session / name
        real = path.rename(session / f"{name}.real")
        path.symlink_to(real)
        assert problems(session), name
        path.unlink()
        real.rename(path)
    assert problems(session) == set()


def test_an_interrupted_session_holds_up_to_its_last_line_and_is_not_verified(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "sessions" / SESSION
    directory.mkdir(parents=True)
    write_ledger(directory / "ledger.jsonl", events()[:12])
    found = verify_session(directory)
    assert (found.is_valid, found.status) == (False, "interrupted")
    assert (found.ledger.is_valid, found.ledger.entries) == (True, 12)
    assert {problem.part for problem in found.problems} == {"statement"}
