"""The sealed statement: what it binds, its format, and that a tool other than ours can check it."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sandbox.digest import digest_bytes
from sandbox.errors import RecordError
from sandbox.provenance.keys import SigningKey, signing_key
from sandbox.provenance.ledger import read_entries
from sandbox.provenance.statement import (
    PREDICATE_TYPE,
    build_predicate,
    open_envelope,
    seal_session,
)
from sandbox.provenance.verify import verify_ledger
from tests.unit.provenance.recorded import PATCH, SESSION, events, record_session, write_ledger

SEED = bytes(range(32))
"""A fixed key, for vectors only."""


def test_the_statement_binds_everything_that_decided_and_what_it_came_to(tmp_path: Path) -> None:
    directory = record_session(tmp_path)
    envelope = json.loads((directory / "statement.json").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == PREDICATE_TYPE
    subjects = {subject["name"]: subject["digest"] for subject in statement["subject"]}
    assert subjects == {
        name: digest_bytes((directory / name).read_bytes()).as_dict()
        for name in ("ledger.jsonl", "patch.diff", "result.json")
    }
    first, last = json.loads(_lines(directory)[0])["event"], json.loads(_lines(directory)[-1])["event"]
    ledger = verify_ledger(directory / "ledger.jsonl")
    assert statement["predicate"] == {
        "sessionId": SESSION,
        "taskBlake3": first["task_blake3"],
        "profile": "production",
        "policyBlake3": first["policy_blake3"],
        "specBlake3": first["spec_blake3"],
        "image": "agent:dev",
        "imageId": first["image_id"],
        "seccompBlake3": first["seccomp_blake3"],
        "baseTreeBlake3": first["base_tree_blake3"],
        "models": ["script:demo"],
        "limits": first["limits"],
        "spent": last["spent"],
        "status": "completed",
        "reason": "",
        "patch": digest_bytes(PATCH).as_dict(),
        "ledger": {"head": ledger.head, "entries": ledger.entries},
        "startedAt": "2026-11-22T12:34:56.000000Z",
        "endedAt": "2026-11-22T12:35:01.000000Z",
        "runnerVersion": "0.1.0",
    }
    assert stat.S_IMODE((directory / "statement.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in directory.iterdir()) == [
        "ledger.jsonl",
        "patch.diff",
        "result.json",
        "statement.json",
    ]


def test_the_same_session_under_the_same_key_gives_the_golden_statement(tmp_path: Path) -> None:
    """Ed25519 is deterministic and every input is fixed: a vector for other verifiers."""
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(SEED))
    directory = record_session(tmp_path, key=key, with_result=False)
    golden = Path(__file__).parent / "golden" / "statement.json"
    assert (directory / "statement.json").read_bytes() == golden.read_bytes()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_agrees_that_the_golden_statement_is_signed(tmp_path: Path) -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(SEED))
    envelope = json.loads((Path(__file__).parent / "golden" / "statement.json").read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    # The pre-authentication encoding, written out from the DSSE specification.
    message = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    (tmp_path / "key").write_bytes(key.public.as_pem())
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    verify = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-rawin",
        "-inkey",
        "key",
        "-sigfile",
        "sig",
        "-in",
        "message",
    ]
    (tmp_path / "message").write_bytes(message)
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "message").write_bytes(message.replace(b"completed", b"Completed"))
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True).returncode != 0


def test_an_envelope_opens_only_for_the_key_that_signed_it(tmp_path: Path) -> None:
    mine, other = signing_key(tmp_path / "mine"), signing_key(tmp_path / "other")
    envelope = (record_session(tmp_path, key=mine) / "statement.json").read_bytes()
    statement, signer = open_envelope(envelope, [other.public, mine.public])
    assert (statement.predicate.session_id, signer) == (SESSION, mine.public)
    for keys in ([other.public], []):
        with pytest.raises(RecordError, match="no valid signature of a trusted key"):
            open_envelope(envelope, keys)


def test_a_signature_over_something_else_than_a_session_is_refused(tmp_path: Path) -> None:
    key = signing_key(tmp_path)
    envelope = json.loads((record_session(tmp_path, key=key) / "statement.json").read_text())
    for payload in (
        b"{}",
        b"not json",
        base64.b64decode(envelope["payload"]).replace(b"/session/v1", b"/other/v1"),
    ):
        message = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
        envelope["payload"] = base64.b64encode(payload).decode()
        envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(message)).decode()
        with pytest.raises(RecordError, match="cannot be read by this version"):
            open_envelope(json.dumps(envelope).encode(), [key.public])


def test_a_ledger_edited_before_sealing_is_not_sealed(tmp_path: Path) -> None:
    directory = tmp_path / "session"
    directory.mkdir()
    ledger = write_ledger(directory / "ledger.jsonl", events())
    (directory / "patch.diff").write_bytes(PATCH)
    key = signing_key(tmp_path)
    lines = _lines(directory)
    shorter = b"".join(line + b"\n" for line in lines[:-1])
    edited = b"".join(line.replace(b"curl evil", b"curl good") + b"\n" for line in lines)
    for content, problem in ((shorter, "has not ended"), (edited, "does not continue the chain")):
        (directory / "ledger.jsonl").write_bytes(content)
        with pytest.raises(RecordError, match=problem):
            seal_session(directory, key, head=ledger.head, entries=ledger.entries, runner_version="1")
    (directory / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(RecordError, match="its writer made"):
        seal_session(directory, key, head="0" * 64, entries=ledger.entries, runner_version="1")
    assert not (directory / "statement.json").exists()
    seal_session(directory, key, head=ledger.head, entries=ledger.entries, runner_version="1")


@pytest.mark.parametrize("content", [None, b"another patch"])
def test_a_patch_that_is_not_the_recorded_one_is_not_sealed(tmp_path: Path, content: bytes | None) -> None:
    directory = tmp_path / "session"
    directory.mkdir()
    ledger = write_ledger(directory / "ledger.jsonl", events())
    if content is not None:
        (directory / "patch.diff").write_bytes(content)
    with pytest.raises(RecordError, match=r"patch\.diff"):
        seal_session(
            directory, signing_key(tmp_path), head=ledger.head, entries=ledger.entries, runner_version="1"
        )


def test_a_predicate_names_each_model_once_in_the_order_of_its_first_call(tmp_path: Path) -> None:
    recorded = events()
    call = next(event for event in recorded if event.type == "ModelCall")
    at = recorded.index(call)
    others = [
        call.model_copy(update={"model": model}) for model in ("ollama:b", "script:demo", "anthropic:a")
    ]
    ledger = write_ledger(tmp_path / "ledger.jsonl", recorded[: at + 1] + others + recorded[at + 1 :])
    predicate = build_predicate(read_entries(ledger.path), "1")
    assert predicate.models == ["script:demo", "ollama:b", "anthropic:a"]


def _lines(directory: Path) -> list[bytes]:
    return (directory / "ledger.jsonl").read_bytes().splitlines()
