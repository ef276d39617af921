"""The keys that seal and check records: Ed25519, one per state directory, made at first use. D7

Whoever can write this directory can forge records; it belongs to the controller's user alone, and nothing
in a container can reach it. A record that must convince others is checked with a public key they hold.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox.errors import PolicyError, StateError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PRIVATE_NAME: Final = "signing.pem"
PUBLIC_NAME: Final = "signing.pub"
MAX_KEY_BYTES: Final = 16 * 1024


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key."""

    raw: bytes
    """32 bytes."""

    @property
    def keyid(self) -> str:
        """Sha256 of the raw key, in hex."""
        return hashlib.sha256(self.raw).hexdigest()

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Check one signature."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def as_pem(self) -> bytes:
        """Return it as SubjectPublicKeyInfo, which any other tool reads."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = Ed25519PublicKey.from_public_bytes(self.raw)
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class SigningKey:
    """An Ed25519 private key in memory."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature."""
        return self._key.sign(message)


def keys_directory(state: Path) -> Path:
    """Return where a state directory keeps its keys."""
    return state / "keys"


def signing_key(state: Path) -> SigningKey:
    """Load this state directory's signing key; make it at first use.

    The directory is 0700, the key 0600 (PKCS8 PEM), its public key beside it. Raises StateError when
    others can read the key or write its directory, or when it cannot be made or read.
    """
    directory = keys_directory(state)
    path = directory / PRIVATE_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_shared(directory)
        if not path.exists():
            _create(path)
        _refuse_shared(path)
        key = _load_private(path)
        _publish(directory / PUBLIC_NAME, key.public)
    except OSError as exc:
        raise StateError(f"cannot use signing key {path}: {exc.strerror or exc}") from exc
    return key


def trusted_keys(state: Path) -> tuple[PublicKey, ...]:
    """Return the public keys whose records are this installation's own: every ``*.pub`` beside the key.

    A replaced key stays trusted for old records while its ``.pub`` file is kept under another name.
    Empty when nothing was ever sealed here. Raises StateError when the directory is not private.
    """
    directory = keys_directory(state)
    if not directory.is_dir():
        return ()
    _refuse_shared(directory)
    try:
        return tuple(_parse_public(path.read_bytes()) for path in sorted(directory.glob("*.pub")))
    except (OSError, ValueError) as exc:
        raise StateError(f"cannot read the public keys in {directory}: {exc}") from exc


def load_public_key(path: Path) -> PublicKey:
    """Read a public key that the user named. Raises PolicyError when it is none."""
    try:
        with path.open("rb") as file:
            return _parse_public(file.read(MAX_KEY_BYTES))
    except (OSError, ValueError) as exc:
        detail = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise PolicyError(f"cannot use key {path}: {detail}; give an Ed25519 public key in PEM") from exc


def find_signer(keys: Iterable[PublicKey], message: bytes, signature: bytes) -> PublicKey | None:
    """Return the key that made this signature, if it is among the given."""
    return next((key for key in keys if key.has_signed(message, signature)), None)


def _refuse_shared(path: Path) -> None:
    facts = path.lstat()
    if facts.st_uid != os.geteuid():
        raise StateError(f"cannot use {path}: it belongs to uid {facts.st_uid}; only its own user may sign")
    if stat.S_ISLNK(facts.st_mode):
        raise StateError(f"cannot use {path}: it is a symbolic link; put the real one there")
    if facts.st_mode & 0o077:
        remedy = f"chmod {'700' if path.is_dir() else '600'} {path}"
        raise StateError(
            f"cannot use {path}: others may access it (mode {facts.st_mode & 0o777:o}); {remedy}"
        )


def _create(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(draft, pem, 0o600)
    try:
        # link, not rename: when two controllers start at once the first key stays, for both.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _publish(path: Path, key: PublicKey) -> None:
    pem = key.as_pem()
    if path.exists() and path.read_bytes() == pem:
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(draft, pem, 0o644)
    draft.replace(path)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _load_private(path: Path) -> SigningKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise StateError(
            f"cannot read signing key {path}: it is damaged; move it away for a new one"
        ) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"cannot use signing key {path}: it is not Ed25519; move it away for a new one")
    return SigningKey(key)


def _parse_public(pem: bytes) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm as exc:
        raise ValueError("it is of an unknown kind") from exc
    except ValueError as exc:
        raise ValueError("it is not a PEM public key") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is not Ed25519")
    return PublicKey(key.public_bytes_raw())
