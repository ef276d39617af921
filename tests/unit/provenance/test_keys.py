"""Signing keys: made once, private, and refused when they are not."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sandbox.errors import PolicyError, StateError
from sandbox.provenance.keys import load_public_key, signing_key, trusted_keys


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_made_at_first_use_and_stays(tmp_path: Path) -> None:
    first = signing_key(tmp_path / "state").public
    assert signing_key(tmp_path / "state").public == first
    keys = tmp_path / "state" / "keys"
    assert (mode(keys), mode(keys / "signing.pem")) == (0o700, 0o600)
    assert sorted(path.name for path in keys.iterdir()) == ["signing.pem", "signing.pub"]
    assert first.keyid == hashlib.sha256(first.raw).hexdigest()
    assert trusted_keys(tmp_path / "state") == (first,) == (load_public_key(keys / "signing.pub"),)


def test_a_wide_umask_does_not_widen_the_key(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        signing_key(tmp_path)
    finally:
        os.umask(before)
    assert (mode(tmp_path / "keys"), mode(tmp_path / "keys" / "signing.pem")) == (0o700, 0o600)


@pytest.mark.parametrize(("name", "wide"), [("signing.pem", 0o640), ("signing.pem", 0o604), (".", 0o750)])
def test_a_key_that_others_may_reach_is_refused(tmp_path: Path, name: str, wide: int) -> None:
    signing_key(tmp_path)
    path = tmp_path / "keys" / name
    narrow = mode(path)
    path.chmod(wide)
    with pytest.raises(StateError, match=r"others may access it .* chmod"):
        signing_key(tmp_path)
    path.chmod(narrow)
    signing_key(tmp_path)


def test_a_linked_or_damaged_key_is_refused(tmp_path: Path) -> None:
    signing_key(tmp_path)
    path = tmp_path / "keys" / "signing.pem"
    real = path.rename(tmp_path / "real.pem")
    path.symlink_to(real)
    with pytest.raises(StateError, match="symbolic link"):
        signing_key(tmp_path)
    path.unlink()
    path.touch(mode=0o600)
    with pytest.raises(StateError, match="damaged"):
        signing_key(tmp_path)
    other_kind = x25519.X25519PrivateKey.generate()
    path.write_bytes(other_kind.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(StateError, match="not Ed25519"):
        signing_key(tmp_path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user needs root")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    signing_key(tmp_path)
    os.chown(tmp_path / "keys" / "signing.pem", 12345, -1)
    with pytest.raises(StateError, match="belongs to uid 12345"):
        signing_key(tmp_path)


def test_a_missing_public_half_is_written_again(tmp_path: Path) -> None:
    key = signing_key(tmp_path).public
    (tmp_path / "keys" / "signing.pub").unlink()
    assert trusted_keys(tmp_path) == ()
    signing_key(tmp_path)
    assert trusted_keys(tmp_path) == (key,)


def _keyid(state: Path) -> str:
    return signing_key(state).public.keyid


def test_controllers_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_keyid, [tmp_path / "state"] * 12))) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_reads_both_halves(tmp_path: Path) -> None:
    signing_key(tmp_path)
    derived = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "keys" / "signing.pem", "-pubout"],
        capture_output=True,
        check=True,
    )
    assert derived.stdout == (tmp_path / "keys" / "signing.pub").read_bytes()


def test_a_key_named_by_the_user_must_be_an_ed25519_public_key(tmp_path: Path) -> None:
    other_kind = x25519.X25519PrivateKey.generate().public_key()
    private = ed25519.Ed25519PrivateKey.generate()
    wrong = {
        "absent": None,
        "empty": b"",
        "text": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "kind": other_kind.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "private": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for name, content in wrong.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PolicyError, match="give an Ed25519 public key in PEM"):
            load_public_key(tmp_path / name)
