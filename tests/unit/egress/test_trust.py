from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12

from sandbox.container.spec import TRUST_BUNDLE, TRUST_STORE
from sandbox.egress.authority import SessionAuthority
from sandbox.egress.trust import (
    BUNDLE_NAME,
    TRUSTSTORE_NAME,
    read_host_roots,
    read_operator_roots,
    write_trust,
)
from sandbox.errors import HostError, StateError
from tests.egress_world import authority_pem


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose roots are one file, and a directory that is empty."""
    file = tmp_path / "host.pem"
    file.write_text(authority_pem())
    (tmp_path / "hashed").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "hashed"))
    return file


def _authority() -> bytes:
    from datetime import UTC, datetime, timedelta

    return SessionAuthority(["a.test"], now=datetime.now(UTC), lifetime=timedelta(hours=1)).certificate_pem


def _count(pem: bytes) -> int:
    return pem.count(b"BEGIN CERTIFICATE")


def test_the_hosts_roots_are_those_that_its_own_tls_uses(host: Path) -> None:
    assert read_host_roots().decode().strip() == authority_pem().strip()


def test_a_directory_of_hashed_names_counts_and_nothing_twice(host: Path) -> None:
    (host.parent / "hashed" / "0a1b2c3d.0").write_text(authority_pem())
    (host.parent / "hashed" / "4e5f6a7b.0").write_bytes(_authority())
    (host.parent / "hashed" / "README").write_bytes(_authority())
    assert _count(read_host_roots()) == 2


def test_a_host_whose_places_hold_nothing_falls_back_to_the_package_of_roots(host: Path) -> None:
    host.write_text("")
    assert _count(read_host_roots()) > 20


def test_a_host_without_any_root_is_refused(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write_text("nothing\n")
    monkeypatch.setitem(__import__("sys").modules, "certifi", None)
    with pytest.raises(HostError, match="cannot find this host's root certificates; install"):
        read_host_roots()


def test_a_named_file_that_is_missing_is_refused_and_not_passed_over(host: Path) -> None:
    host.unlink()
    with pytest.raises(HostError, match="cannot read root certificates from"):
        read_host_roots()


@pytest.mark.parametrize("content", [None, "no certificate\n"])
def test_an_operators_file_without_certificates_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "operator.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(HostError, match="AGENT_RUNNER_EXTRA_CA_CERTS"):
        read_operator_roots(file)


def test_an_operators_file_may_hold_more_than_certificates(tmp_path: Path) -> None:
    file = tmp_path / "operator.pem"
    file.write_text(f"# ours\r\n{authority_pem()}\nsubject=/CN=x\n{authority_pem()}")
    assert _count(read_operator_roots(file)) == 1


def test_both_forms_hold_the_authority_and_the_roots_and_anybody_may_read_them(tmp_path: Path) -> None:
    authority = _authority()
    files = write_trust(tmp_path / "trust", authority, authority_pem().encode())
    assert _count(files.bundle.read_bytes()) == 2
    context = ssl.create_default_context(cafile=files.bundle)
    assert len(context.get_ca_certs()) == 2
    # Without password: what Java gives when nobody told it one.
    kept = load_pkcs12(files.truststore.read_bytes(), None)
    assert kept.key is None and len(kept.additional_certs) == 2
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "trust", *vars(files).values())] == [
        0o755,
        0o644,
        0o644,
    ]


def test_without_inspection_the_roots_stand_alone(tmp_path: Path) -> None:
    files = write_trust(tmp_path / "trust", None, authority_pem().encode())
    assert files.bundle.read_text().strip() == authority_pem().strip()


def test_no_file_holds_a_key(tmp_path: Path) -> None:
    key = b"-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n"
    files = write_trust(tmp_path / "trust", _authority(), key + authority_pem().encode())
    assert b"PRIVATE" not in files.bundle.read_bytes()
    assert load_pkcs12(files.truststore.read_bytes(), None).key is None


def test_a_root_that_cannot_be_read_is_left_out_of_javas_store_only(tmp_path: Path) -> None:
    odd = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    files = write_trust(tmp_path / "trust", None, odd + authority_pem().encode())
    assert len(load_pkcs12(files.truststore.read_bytes(), None).additional_certs) == 1


def test_nothing_but_unreadable_roots_is_refused(tmp_path: Path) -> None:
    odd = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    with pytest.raises(HostError, match="no root certificate of this host can be read"):
        write_trust(tmp_path / "trust", None, odd)
    assert not (tmp_path / "trust").exists()


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trust").mkdir()
    with pytest.raises(StateError, match="cannot write the session's trusted certificates"):
        write_trust(tmp_path / "trust", None, authority_pem().encode())


def test_the_files_are_called_what_the_container_expects() -> None:
    assert TRUST_BUNDLE.endswith(f"/{BUNDLE_NAME}")
    assert TRUST_STORE.endswith(f"/{TRUSTSTORE_NAME}")
