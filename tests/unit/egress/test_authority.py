from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from sandbox.egress.authority import SessionAuthority, upstream_context

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTS = ["api.test", "*.one.test", "**.deep.test"]


def authority(now: datetime = NOW) -> SessionAuthority:
    return SessionAuthority(HOSTS, now=now, lifetime=timedelta(hours=2))


def handshake(server: ssl.SSLContext, host: str, trust: bytes) -> ssl.SSLObject:
    """Shake hands in memory with a client that trusts one authority; return the client's end."""
    context = ssl.create_default_context(cadata=trust.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(down, up, server_hostname=host)
    other = server.wrap_bio(up, down, server_side=True)
    waiting = [client, other] * 4
    for end in waiting:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client


def test_the_certificate_says_what_it_may_be_used_for() -> None:
    certificate = x509.load_pem_x509_certificate(authority().certificate_pem)
    assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
    assert certificate.not_valid_after_utc == NOW + timedelta(hours=3)
    get = certificate.extensions.get_extension_for_class
    basic, usage, names = get(x509.BasicConstraints), get(x509.KeyUsage), get(x509.NameConstraints)
    assert basic.critical and (basic.value.ca, basic.value.path_length) == (True, 0)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert names.critical
    assert names.value.permitted_subtrees == [
        x509.DNSName(name) for name in (".deep.test", ".one.test", "api.test")
    ]
    assert [str(one.value) for one in names.value.excluded_subtrees or []] == ["0.0.0.0/0", "::/0"]


@pytest.mark.parametrize("host", ["api.test", "a.one.test", "a.b.deep.test"])
def test_a_strict_client_accepts_a_certificate_for_a_covered_host(host: str) -> None:
    made = authority(datetime.now(UTC))
    client = handshake(made.context_for(host), host, made.certificate_pem)
    peer = client.getpeercert() or {}
    assert peer["subjectAltName"] == (("DNS", host),)
    assert client.version() == "TLSv1.3"
    leaf = x509.load_der_x509_certificate(client.getpeercert(binary_form=True) or b"")
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize("host", ["other.test", "one.test", "deep.test", "xapi.test", "10.0.0.1"])
def test_nothing_else_is_signed_and_would_not_be_accepted(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = authority(datetime.now(UTC))
    assert not made.covers(host)
    with pytest.raises(ValueError, match="not among"):
        made.context_for(host)
    # What a stolen key would give: a signature, but none that a client takes.
    stolen = made._make_context(host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stolen, host, made.certificate_pem)
    monkeypatch.setattr(SessionAuthority, "_own_certificate", _unconstrained)
    control = authority(datetime.now(UTC))
    if host != "10.0.0.1":
        assert handshake(control._make_context(host), host, control.certificate_pem).version()


def _unconstrained(made: SessionAuthority) -> x509.Certificate:
    from sandbox.egress.authority import _name, _usage

    basic = (x509.BasicConstraints(ca=True, path_length=0), True)
    subject = _name("agent-runner session authority")
    return made._sign(subject, made._key.public_key(), [basic, (_usage(is_authority=True), True)])


def test_one_session_does_not_trust_another() -> None:
    first, second = authority(datetime.now(UTC)), authority(datetime.now(UTC))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(first.context_for("api.test"), "api.test", second.certificate_pem)


def test_contexts_are_kept_for_the_hosts_used_last() -> None:
    made = authority()
    first = made.context_for("h0.deep.test")
    assert made.context_for("h0.deep.test") is first
    for at in range(1, 256):
        made.context_for(f"h{at}.deep.test")
    assert made.context_for("h0.deep.test") is first
    for at in range(300, 560):
        made.context_for(f"h{at}.deep.test")
    assert made.context_for("h0.deep.test") is not first


def test_the_authoritys_key_goes_into_no_file_and_no_descriptor_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[bytes] = []
    load = ssl.SSLContext.load_cert_chain

    def keep(context: ssl.SSLContext, path: str) -> None:
        written.append(Path(path).read_bytes())
        load(context, path)

    made = authority()
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", keep)
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    made.context_for("api.test")
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before
    [file] = written
    in_file = load_pem_private_key(file, None)
    assert isinstance(in_file, ec.EllipticCurvePrivateKey)
    certificate = x509.load_pem_x509_certificate(made.certificate_pem)
    assert in_file.public_key() != certificate.public_key()
    assert file.count(b"PRIVATE KEY-----") == 2


def test_an_authority_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="unconstrained"):
        SessionAuthority([], now=NOW, lifetime=timedelta(hours=1))


def test_real_hosts_are_verified_and_no_session_keys_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = upstream_context(authority().certificate_pem)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not (tmp_path / "keys").exists()
    with pytest.raises(ValueError, match="root certificates"):
        upstream_context(b"nothing")
