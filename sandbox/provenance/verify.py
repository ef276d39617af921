"""Judge a record: does the ledger hold, and do statement, patch and result agree with it? D7

A chain alone cannot show what was cut off its end, or that all of it was written anew: that needs the
head from somewhere the editor could not reach, which is what the signed statement is for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sandbox.digest import blake3_hex
from sandbox.errors import AgentRunnerError, RecordError
from sandbox.provenance.keys import PublicKey, trusted_keys
from sandbox.provenance.ledger import (
    GENESIS,
    MAX_LINE_BYTES,
    Entry,
    decode_line,
    open_ledger,
    read_entries,
    read_lines,
)
from sandbox.provenance.order import Order
from sandbox.provenance.statement import (
    LEDGER_NAME,
    MAX_ENVELOPE_BYTES,
    PATCH_NAME,
    RESULT_NAME,
    STATEMENT_NAME,
    SessionPredicate,
    Statement,
    build_predicate,
    digest_file,
    open_envelope,
)
from sandbox.provenance.tampering import Line, diagnose

MAX_RESULT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Verification:
    """What a ledger came to."""

    is_valid: bool
    """Every line holds, and head and count are the given ones. Without a given head and count this says
    nothing about lines cut off the end, nor about a ledger written anew as a whole."""
    entries: int
    """Lines that hold, from the first on."""
    head: str
    """Digest of the last line that holds."""
    problem: str | None
    """The first thing wrong, naming the line; None when valid."""
    line: int | None
    """Number of the line to look at, from 1; None when valid or when it is about the whole file."""
    status: Literal["complete", "interrupted"]
    """``interrupted``: SessionEnded is not among the lines that hold."""


@dataclass(frozen=True)
class Problem:
    """One thing that is broken."""

    part: Literal["ledger", "statement", "patch", "result", "session"]
    message: str
    line: int | None = None


@dataclass(frozen=True)
class SessionVerification:
    """What a session's record came to as a whole."""

    is_valid: bool
    """Nothing is wrong, and the session is complete and sealed."""
    status: Literal["complete", "interrupted"]
    ledger: Verification
    statement: Statement | None
    """None when there is none, or none that a trusted key signed."""
    keyid: str | None
    """The key that signed the statement."""
    problems: tuple[Problem, ...]
    """Everything that is broken, the ledger's first."""


def verify_ledger(path: Path, *, head: str | None = None, entries: int | None = None) -> Verification:
    """Read a ledger line by line and judge it.

    ``head`` and ``entries`` are what a trusted source says of the whole file; None: nothing is known.
    Never raises for what the file contains or lacks.
    """
    try:
        return _Reading(path).judge(head, entries)
    except RecordError as exc:
        return Verification(False, 0, GENESIS, str(exc), None, "interrupted")
    except OSError as exc:
        return Verification(False, 0, GENESIS, f"cannot read {path}: {exc.strerror}", None, "interrupted")


def verify_session(directory: Path, *, public_key: PublicKey | None = None) -> SessionVerification:
    """Check a session directory: statement, ledger, patch and result, each against the others.

    Without ``public_key`` the keys of the state directory that holds the session are trusted.
    """
    problems: list[Problem] = []
    statement, keyid = None, None
    try:
        keys = (public_key,) if public_key else trusted_keys(directory.absolute().parent.parent)
        statement, signer = open_envelope(_read(directory / STATEMENT_NAME, MAX_ENVELOPE_BYTES), keys)
        keyid = signer.keyid
    except AgentRunnerError as exc:
        problems.append(Problem("statement", str(exc)))
    sealed = statement.predicate if statement else None
    ledger = verify_ledger(
        directory / LEDGER_NAME,
        head=sealed.ledger.head if sealed else None,
        entries=sealed.ledger.entries if sealed else None,
    )
    if ledger.problem is not None:
        problems.insert(0, Problem("ledger", ledger.problem, ledger.line))
    elif ledger.status == "complete":
        predicate = build_predicate(
            read_entries(directory / LEDGER_NAME), sealed.runner_version if sealed else ""
        )
        problems += _check_against_ledger(directory, predicate, sealed)
    if statement:
        told = {problem.part for problem in problems}
        problems += [found for found in _check_subjects(directory, statement) if found.part not in told]
    return SessionVerification(
        is_valid=not problems and ledger.status == "complete",
        status=ledger.status,
        ledger=ledger,
        statement=statement,
        keyid=keyid,
        problems=tuple(problems),
    )


class _Reading:
    """One pass over a ledger; what it remembers for the verdict."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._order = Order()
        self._last: Entry | None = None
        self._time = datetime.min.replace(tzinfo=UTC)
        self._misplaced: tuple[int, str] | None = None
        """First line whose chain holds but whose content breaks a rule; reported if the chain holds."""
        self._sealed_line: int | None = None
        """The line that has the sealed head."""

    def judge(self, head: str | None, entries: int | None) -> Verification:
        with open_ledger(self._path) as file:
            for number, raw in enumerate(read_lines(file), start=1):
                if not raw.endswith(b"\n") and len(raw) < MAX_LINE_BYTES:
                    return self._torn(number, head is not None or entries is not None)
                if not self._take(number, raw.removesuffix(b"\n"), head):
                    return self._broken(number, head)
        if found := self._compare(head, entries) or self._misplaced:
            return self._verdict(found[1], found[0])
        if self._last is None:
            return self._verdict("the ledger is empty", None)
        return self._verdict(None, None)

    def _take(self, number: int, raw: bytes, head: str | None) -> bool:
        try:
            entry = decode_line(raw)
        except ValueError:
            return False
        if entry.seq != number or entry.prev != (self._last.digest if self._last else GENESIS):
            return False
        problem = self._order.check(entry.event)
        if entry.time < self._time:
            problem = "its time is before the line above"
        if problem and self._misplaced is None:
            self._misplaced = (number, f"line {number}: {problem}")
        if entry.digest == head:
            self._sealed_line = number
        self._last, self._time = entry, max(entry.time, self._time)
        return True

    def _compare(self, head: str | None, entries: int | None) -> tuple[int | None, str] | None:
        count, digest = (self._last.seq, self._last.digest) if self._last else (0, GENESIS)
        if entries is None and self._sealed_line is not None:
            entries = self._sealed_line
        if entries is not None and count < entries:
            missing = f"line {entries} is" if count + 1 == entries else f"lines {count + 1} to {entries} are"
            return count + 1, f"the end was cut off: {missing} missing"
        if entries is not None and count > entries:
            added = f"line {count} was" if entries + 1 == count else f"lines {entries + 1} to {count} were"
            return entries + 1, f"{added} added after the record was sealed"
        if head is not None and digest != head:
            return count or None, (
                f"line {count} is not the sealed last line: it was changed, or lines were cut off or changed "
                "and the chain written anew"
            )
        return None

    def _torn(self, number: int, is_sealed: bool) -> Verification:
        if is_sealed or self._order.has_ended:
            return self._verdict(f"line {number} was changed: it does not end where it did", number)
        return self._verdict(
            f"line {number} is torn: it has no end, as a crash or a full disk in mid-write leaves it; "
            "the lines above hold",
            number,
        )

    def _broken(self, number: int, head: str | None) -> Verification:
        with open_ledger(self._path) as file:
            lines = list(_outline(read_lines(file)))
        found = diagnose(lines, number, genesis=GENESIS, sealed_head=head)
        return self._verdict(found.problem, found.line)

    def _verdict(self, problem: str | None, line: int | None) -> Verification:
        last = self._last
        return Verification(
            is_valid=problem is None,
            entries=last.seq if last else 0,
            head=last.digest if last else GENESIS,
            problem=problem,
            line=line,
            status="complete" if self._order.has_ended else "interrupted",
        )


def _outline(lines: Iterator[bytes]) -> Iterator[Line]:
    for raw in lines:
        line = raw.removesuffix(b"\n")
        try:
            entry = decode_line(line)
        except ValueError as exc:
            yield Line(blake3_hex(line), None, None, str(exc))
        else:
            yield Line(entry.digest, entry.seq, entry.prev)


def _check_against_ledger(
    directory: Path, predicate: SessionPredicate, sealed: SessionPredicate | None
) -> Iterator[Problem]:
    if predicate.session_id != directory.name:
        message = f"the record is of session {predicate.session_id}, its directory is named {directory.name}"
        yield Problem("session", message)
    if sealed:
        for name in SessionPredicate.model_fields:
            if getattr(sealed, name) != getattr(predicate, name):
                message = f"the statement's {name} is not the ledger's"
                yield Problem("statement", message)
    yield from _check_patch(directory, predicate)
    yield from _check_result(directory, predicate)


def _check_patch(directory: Path, predicate: SessionPredicate) -> Iterator[Problem]:
    path = directory / PATCH_NAME
    if predicate.patch is None:
        if path.is_symlink() or path.exists():
            yield Problem("patch", f"there is a {PATCH_NAME}, and the ledger records none")
        return
    try:
        if digest_file(path) != predicate.patch:
            yield Problem("patch", f"{PATCH_NAME} is not the patch that was recorded: it was changed")
    except RecordError as exc:
        yield Problem("patch", str(exc))


def _check_subjects(directory: Path, statement: Statement) -> Iterator[Problem]:
    sealed = {subject.name: subject.digest for subject in statement.subject}
    if LEDGER_NAME not in sealed:
        yield Problem("statement", f"the statement does not name {LEDGER_NAME}")
    files: tuple[tuple[Literal["ledger", "patch", "result"], str], ...] = (
        ("ledger", LEDGER_NAME),
        ("patch", PATCH_NAME),
        ("result", RESULT_NAME),
    )
    for part, name in files:
        if name not in sealed:
            continue
        try:
            if digest_file(directory / name) != sealed[name]:
                yield Problem(part, f"{name} is not the file that was sealed: it was changed")
        except RecordError as exc:
            yield Problem(part, str(exc))


def _check_result(directory: Path, predicate: SessionPredicate) -> Iterator[Problem]:
    path = directory / RESULT_NAME
    if not path.is_symlink() and not path.exists():
        return
    try:
        result = json.loads(_read(path, MAX_RESULT_BYTES))
    except (ValueError, RecursionError, RecordError) as exc:
        yield Problem("result", f"cannot read {RESULT_NAME}: {exc}")
        return
    recorded = {
        "session": predicate.session_id,
        "status": predicate.status,
        "profile": predicate.profile,
        "ledger.head": predicate.ledger.head,
        "ledger.entries": predicate.ledger.entries,
        "patch.blake3": predicate.patch.blake3 if predicate.patch else None,
        "patch.sha256": predicate.patch.sha256 if predicate.patch else None,
        "spent": predicate.spent,
    }
    for name, expected in recorded.items():
        is_stated, stated = _lookup(result, name)
        if is_stated and stated != expected:
            yield Problem("result", f"{RESULT_NAME} says {name} is {stated!r}, the ledger {expected!r}")


def _lookup(document: Any, dotted: str) -> tuple[bool, Any]:  # JSON of any shape
    for part in dotted.split("."):
        if document is None:
            return True, None
        if not isinstance(document, dict) or part not in document:
            return False, None
        document = document[part]
    return True, document


def _read(path: Path, limit: int) -> bytes:
    try:
        with open_ledger(path) as file:
            content = file.read(limit + 1)
    except RecordError:
        if not path.exists():
            raise RecordError(f"{path.name} is missing") from None
        raise
    if len(content) > limit:
        raise RecordError(f"{path.name} is longer than {limit} bytes")
    return content
