"""Write what the programs of a session trust: this host's roots, the operator's, the session's own authority.

An image's own roots are not taken: the image is not trusted, and may have none. Decides nothing about who is
inspected; the gateway does.
"""

from __future__ import annotations

import os
import re
import ssl
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import HostError, StateError

BUNDLE_NAME = "ca-bundle.pem"
TRUSTSTORE_NAME = "truststore.p12"
EXTRA_ROOTS = "AGENT_RUNNER_EXTRA_CA_CERTS"
"""The controller's variable that names the operator's own roots."""
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[\sA-Za-z0-9+/=]+-----END CERTIFICATE-----")
REMEDY = "install the package ca-certificates, or set SSL_CERT_FILE to a PEM file"


@dataclass(frozen=True)
class TrustFiles:
    """The two forms in which programs read roots; both hold the same certificates."""

    bundle: Path
    """PEM, one after the other: OpenSSL, GnuTLS, node, Go, Rust."""
    truststore: Path
    """PKCS #12 without encryption and read without password: Java."""


def read_host_roots() -> bytes:
    """Return the roots this host trusts, as PEM, each once.

    They are those of this process's own TLS: OpenSSL's file and directory, or what ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` name instead; where these hold nothing, those of the ``certifi`` package.
    Raises HostError when there are none, or when one that is named cannot be read.
    """
    found = _unique(_host_certificates())
    if not found:
        raise HostError(f"cannot find this host's root certificates; {REMEDY}")
    return b"\n".join(found) + b"\n"


def read_operator_roots(file: Path) -> bytes:
    """Return the certificates of an operator's own PEM file, each once. Raises HostError without any."""
    found = _unique(PEM.findall(_read(file, f"let {EXTRA_ROOTS} name a readable PEM file")))
    if not found:
        raise HostError(
            f"cannot trust {file}: it holds no PEM certificate; let {EXTRA_ROOTS} name a file that does"
        )
    return b"\n".join(found) + b"\n"


def write_trust(directory: Path, authority_pem: bytes | None, roots: bytes) -> TrustFiles:
    """Make a directory with both forms of ``roots`` and the session's authority.

    ``authority_pem`` of None: nothing is inspected, the roots alone. Any user may read the files, and none of
    them holds a key. Raises HostError for what is no certificate, StateError when a file cannot be written.
    """
    certificates = _unique([*PEM.findall(authority_pem or b""), *PEM.findall(roots)])
    files = TrustFiles(directory / BUNDLE_NAME, directory / TRUSTSTORE_NAME)
    truststore = _truststore(certificates)
    try:
        # chmod: whatever the umask, the sandbox's user is not this one.
        directory.mkdir()
        directory.chmod(0o755)
        for path, content in (
            (files.bundle, b"\n".join(certificates) + b"\n"),
            (files.truststore, truststore),
        ):
            path.write_bytes(content)
            path.chmod(0o644)
    except OSError as exc:
        raise StateError(
            f"cannot write the session's trusted certificates to {directory}: {exc.strerror}; "
            "free or fix the state directory"
        ) from exc
    return files


def _host_certificates() -> list[bytes]:
    """Return what OpenSSL would trust: its file, and the files of its directory that carry a hashed name."""
    paths = ssl.get_default_verify_paths()
    files = sorted(Path(paths.capath).glob("*.[0-9]")) if paths.capath is not None else []
    if named := os.environ.get(paths.openssl_cafile_env) or paths.cafile:
        files = [Path(named), *files]
    found = [pem for file in files for pem in PEM.findall(_read(file, REMEDY))]
    if not found:
        try:
            import certifi
        except ImportError:
            return []
        found = PEM.findall(_read(Path(certifi.where()), REMEDY))
    return found


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise HostError(f"cannot read root certificates from {path}: {exc.strerror}; {remedy}") from exc


def _unique(certificates: Iterable[bytes]) -> list[bytes]:
    return list(dict.fromkeys(pem.replace(b"\r", b"") for pem in certificates))


def _truststore(certificates: list[bytes]) -> bytes:
    """Return a store that Java takes for trusted roots: PKCS #12 needs an attribute of Oracle's for that."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import NoEncryption
    from cryptography.hazmat.primitives.serialization.pkcs12 import (
        PKCS12Certificate,
        serialize_java_truststore,
    )

    entries = []
    for number, pem in enumerate(certificates):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # roots of the 1990s are not what RFC 5280 asks for
                certificate = x509.load_pem_x509_certificate(pem)
        except ValueError:
            continue  # one old root less: Java then refuses what it vouches for
        entries.append(PKCS12Certificate(certificate, f"root-{number}".encode()))
    if not entries:
        raise HostError(f"cannot write a trust store: no root certificate of this host can be read; {REMEDY}")
    # The certificates are public, and a program that gives no password could not read them encrypted.
    return serialize_java_truststore(entries, NoEncryption())
