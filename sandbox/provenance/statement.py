"""Seal a finished session: an in-toto Statement v1 in a DSSE envelope, signed with Ed25519. D7

The predicate is folded from the ledger itself, so no caller can bind what was not recorded; subjects are
the files of the session directory. Format: in-toto Statement v1; DSSE v1 with pre-authentication encoding.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from sandbox.digest import Digest, canonical_json, digest_chunks
from sandbox.errors import RecordError
from sandbox.events import ModelCall, PatchExported, SessionEnded, SessionStarted
from sandbox.provenance.keys import PublicKey, SigningKey, find_signer
from sandbox.provenance.ledger import GENESIS, Entry, read_entries, sync_directory

LEDGER_NAME: Final = "ledger.jsonl"
PATCH_NAME: Final = "patch.diff"
RESULT_NAME: Final = "result.json"
STATEMENT_NAME: Final = "statement.json"

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://agent-runner.dev/session/v1"
"""A name, never fetched."""
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES: Final = 1024 * 1024

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SealedPart(BaseModel):
    """Frozen, strict, no key beyond the declared; lowerCamelCase in JSON, as in-toto predicates are."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, validate_by_name=True
    )


class DigestSet(SealedPart):
    """The same bytes under two algorithms."""

    blake3: Hex64
    sha256: Hex64


class LedgerEnd(SealedPart):
    """What the ledger's last line must be."""

    head: Hex64
    entries: int


class SessionPredicate(SealedPart):
    """All that decided what could happen, and what it came to. Times are RFC 3339, UTC, microseconds."""

    session_id: str
    task_blake3: str
    profile: str
    policy_blake3: str
    spec_blake3: str
    image: str
    image_id: str
    seccomp_blake3: str
    """The profile in effect, as given to the engine."""
    base_tree_blake3: str
    models: list[str]
    """Models that were called, in the order of their first call."""
    limits: dict[str, int]
    spent: dict[str, int]
    status: str
    reason: str
    patch: DigestSet | None
    """None: no patch was exported."""
    ledger: LedgerEnd
    started_at: str
    ended_at: str
    runner_version: str


class Subject(SealedPart):
    """A file of the session directory, by digest."""

    name: str
    digest: DigestSet


class Statement(SealedPart):
    """in-toto Statement v1."""

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = STATEMENT_TYPE
    subject: list[Subject]
    predicate_type: Literal["https://agent-runner.dev/session/v1"] = PREDICATE_TYPE
    predicate: SessionPredicate


class Signature(SealedPart):
    """One DSSE signature; ``keyid`` is a hint and decides nothing."""

    keyid: str
    sig: str


class Envelope(SealedPart):
    """DSSE envelope."""

    payload: str
    payload_type: Literal["application/vnd.in-toto+json"] = PAYLOAD_TYPE
    signatures: list[Signature]


def seal_session(
    directory: Path, key: SigningKey, *, head: str, entries: int, runner_version: str
) -> Statement:
    """Bind and sign a finished session; writes ``statement.json`` and returns what it says.

    To be called once the ledger is closed; ``head`` and ``entries`` are what its writer knows them to be,
    so a ledger that was edited meanwhile is not sealed. Subjects are the ledger, the patch when one was
    exported, and ``result.json`` when it is written already. Raises RecordError when anything disagrees.
    """
    predicate = build_predicate(read_entries(directory / LEDGER_NAME), runner_version)
    if (predicate.ledger.head, predicate.ledger.entries) != (head, entries):
        raise RecordError(
            f"cannot seal {directory}: its ledger has {predicate.ledger.entries} entries with head "
            f"{predicate.ledger.head}, its writer made {entries} with head {head}"
        )
    names = [LEDGER_NAME, *([PATCH_NAME] if predicate.patch else [])]
    if (directory / RESULT_NAME).exists():
        names.append(RESULT_NAME)
    subjects = [Subject(name=name, digest=digest_file(directory / name)) for name in names]
    if predicate.patch and subjects[1].digest != predicate.patch:
        raise RecordError(f"cannot seal {directory}: {PATCH_NAME} is not the patch that was recorded")
    statement = Statement(subject=subjects, predicate=predicate)
    _write_atomically(directory / STATEMENT_NAME, seal(statement, key))
    return statement


def seal(statement: Statement, key: SigningKey) -> bytes:
    """Return the signed envelope as JSON."""
    payload = canonical_json(statement.model_dump(mode="json", by_alias=True))
    signature = key.sign(_pre_authentication(payload))
    envelope = Envelope(
        payload=base64.b64encode(payload).decode(),
        signatures=[Signature(keyid=key.public.keyid, sig=base64.b64encode(signature).decode())],
    )
    return canonical_json(envelope.model_dump(mode="json", by_alias=True)) + b"\n"


def open_envelope(envelope: bytes, keys: Iterable[PublicKey]) -> tuple[Statement, PublicKey]:
    """Return the statement and the key, of those given, that signed it.

    The signature is checked before the payload is read. Raises RecordError saying what is wrong.
    """
    trusted = tuple(keys)
    try:
        opened = Envelope.model_validate_json(envelope)
        payload = base64.b64decode(opened.payload, validate=True)
        signatures = [base64.b64decode(signature.sig, validate=True) for signature in opened.signatures]
    except (ValidationError, binascii.Error) as exc:
        raise RecordError("the statement is not a DSSE envelope of an in-toto statement") from exc
    message = _pre_authentication(payload)
    signer = next(filter(None, (find_signer(trusted, message, signature) for signature in signatures)), None)
    if signer is None:
        named = opened.signatures[0].keyid[:16] if opened.signatures else "nobody"
        known = ", ".join(key.keyid[:16] for key in trusted) or "none is known; give --key FILE"
        raise RecordError(
            f"the statement has no valid signature of a trusted key (it names {named!r}; trusted: {known})"
        )
    try:
        return Statement.model_validate_json(payload), signer
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"the statement cannot be read by this version ({where}: {first['msg']})") from exc


def build_predicate(entries: Iterable[Entry], runner_version: str) -> SessionPredicate:
    """Fold a finished ledger into what the statement says of it.

    Raises RecordError when the entries do not chain or the session has not ended.
    """
    started: SessionStarted | None = None
    patch: DigestSet | None = None
    models: dict[str, None] = {}
    started_at, head, last = "", GENESIS, None
    for entry in entries:
        if entry.prev != head:
            raise RecordError(f"cannot seal: entry {entry.seq} does not continue the chain")
        head, last = entry.digest, entry
        match entry.event:
            case SessionStarted():
                started, started_at = entry.event, format_time(entry.time)
            case ModelCall(model=model):
                models[model] = None
            case PatchExported(patch_blake3=blake3, patch_sha256=sha256):
                patch = DigestSet(blake3=blake3, sha256=sha256)
    if started is None or last is None or not isinstance(last.event, SessionEnded):
        raise RecordError("cannot seal: the session has not ended")
    return SessionPredicate(
        **started.model_dump(include=set(SessionPredicate.model_fields)),
        models=list(models),
        spent=last.event.spent,
        status=last.event.status,
        reason=last.event.reason,
        patch=patch,
        ledger=LedgerEnd(head=head, entries=last.seq),
        started_at=started_at,
        ended_at=format_time(last.time),
        runner_version=runner_version,
    )


def digest_file(path: Path) -> DigestSet:
    """Digest a regular file without holding it. Raises RecordError when it cannot be read."""
    try:
        digest: Digest = digest_chunks(_chunks(path))
    except OSError as exc:
        raise RecordError(f"cannot read {path.name}: {exc.strerror or exc}") from exc
    return DigestSet(blake3=digest.blake3, sha256=digest.sha256)


def format_time(time: datetime) -> str:
    """Write a UTC time as ledger lines do."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _pre_authentication(payload: bytes) -> bytes:
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _chunks(path: Path) -> Iterator[bytes]:
    # NOFOLLOW and NONBLOCK: a link or FIFO planted under this name is neither followed nor waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        while chunk := file.read(1024 * 1024):
            yield chunk


def _write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        sync_directory(path.parent)
    except OSError as exc:
        draft.unlink(missing_ok=True)
        raise RecordError(f"cannot write {path}: {exc.strerror or exc}") from exc
