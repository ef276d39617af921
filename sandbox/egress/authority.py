"""Make the certificates of one session's inspected hosts, under an authority that nobody else has. D5

The authority's key lives in this process's memory only. It may sign for the inspected hosts and for nothing
else (name constraints), so that even a stolen key could not speak for a host whose TLS is passed through.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

ALPN = ["http/1.1"]
"""All that is judged, so all that is spoken, on both sides of the gateway."""

_SKEW = timedelta(hours=1)
_CONTEXTS = 256


class SessionAuthority:
    """Signs certificates for the hosts whose TLS one session opens."""

    certificate_pem: bytes
    """The authority's own certificate: what the session's clients have to trust."""

    def __init__(self, hosts: Iterable[str], *, now: datetime, lifetime: timedelta) -> None:
        """Make keys for canonical names, ``*.name`` and ``**.name``; valid from an hour before ``now``.

        ``lifetime`` is the session's; an hour more is granted for clocks that differ.
        """
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        self._patterns = tuple(sorted(set(hosts)))
        if not self._patterns:
            raise ValueError("an authority for no host at all would be unconstrained")
        self._begins, self._ends = now - _SKEW, now + lifetime + _SKEW
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key_pem = self._leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._certificate = self._own_certificate()
        self.certificate_pem = self._certificate.public_bytes(Encoding.PEM)
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()

    def __repr__(self) -> str:
        return f"SessionAuthority({', '.join(self._patterns)})"

    def covers(self, host: str) -> bool:
        """Tell whether clients would accept a certificate for a canonical name."""
        return any(
            host.endswith(pattern.lstrip("*")) if pattern.startswith("*") else host == pattern
            for pattern in self._patterns
        )

    def context_for(self, host: str) -> ssl.SSLContext:
        """Return the server side of TLS for one canonical name. Raises ValueError for one not covered."""
        if not self.covers(host):
            raise ValueError(f"{host} is not among the hosts this authority was made for")
        context = self._contexts.pop(host, None) or self._make_context(host)
        self._contexts[host] = context
        if len(self._contexts) > _CONTEXTS:
            # A wildcard lets a client make up names without end.
            self._contexts.popitem(last=False)
        return context

    def _make_context(self, host: str) -> ssl.SSLContext:
        from cryptography.hazmat.primitives.serialization import Encoding

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # No second handshake, and no tickets: without them there is no 0-RTT data, which could be sent
        # twice. TLS 1.2 may resume by session id, within this one host's context; the hello's name is
        # checked all the same.
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
        context.num_tickets = 0
        context.set_alpn_protocols(ALPN)
        leaf = self._leaf_certificate(host).public_bytes(Encoding.PEM)
        # load_cert_chain reads files only; this one has no name and lives in memory.
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._leaf_key_pem + leaf)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return context

    def _own_certificate(self) -> x509.Certificate:
        from cryptography import x509

        # A leading dot leaves the apex out. RFC 5280 knows it for other kinds of name only, but OpenSSL,
        # GnuTLS, Go and webpki read it so; Java does not look at the constraints of a root at all.
        names = sorted({pattern.lstrip("*") for pattern in self._patterns})
        constraints = x509.NameConstraints(
            permitted_subtrees=[x509.DNSName(name) for name in names],
            excluded_subtrees=[
                x509.IPAddress(IPv4Network("0.0.0.0/0")),
                x509.IPAddress(IPv6Network("::/0")),
            ],
        )
        return self._sign(
            _name("agent-runner session authority"),
            self._key.public_key(),
            [
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (_usage(is_authority=True), True),
                (constraints, True),
            ],
        )

    def _leaf_certificate(self, host: str) -> x509.Certificate:
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        return self._sign(
            _name("agent-runner session host"),
            self._leaf_key.public_key(),
            [
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (_usage(is_authority=False), True),
                (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
                (x509.SubjectAlternativeName([x509.DNSName(host)]), False),
            ],
        )

    def _sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        extensions: list[tuple[x509.ExtensionType, bool]],
    ) -> x509.Certificate:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name("agent-runner session authority"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._begins)
            .not_valid_after(self._ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        for extension, is_critical in extensions:
            builder = builder.add_extension(extension, critical=is_critical)
        return builder.sign(self._key, hashes.SHA256())


def upstream_context(roots: bytes | None = None) -> ssl.SSLContext:
    """Return the client side of TLS to real hosts: this host's roots, and those in ``roots`` (PEM).

    Certificates are required and names checked; there is no way to turn that off. Raises ValueError when
    ``roots`` holds no certificate.
    """
    # Not ssl.create_default_context: it would write session keys to whatever SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(ALPN)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as exc:
            raise ValueError(f"cannot read the root certificates: {exc}") from exc
    return context


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
