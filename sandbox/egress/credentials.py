"""Hold the credentials that the gateway puts on requests, and put them there. Their values never leave here
but in a header, to the host they are bound to. D5

Values are taken once, when a run is planned: from the controller's environment or from files.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from sandbox.egress.leaks import Watch
from sandbox.egress.request import Field, RequestHead
from sandbox.errors import PolicyError
from sandbox.policy.hosts import Refusal, canonical_host
from sandbox.policy.injections import MIN_SECRET, references
from sandbox.policy.model import Injection, NetworkPolicy

_MAX_FILE = 64 * 1024
# What would hide an echoed credential from redaction: compression, and answers in parts.
_NOT_WITH_CREDENTIALS = frozenset({b"accept-encoding", b"range", b"if-range", b"sec-websocket-extensions"})


@dataclass(frozen=True, repr=False)
class Credential:
    """One ``network.inject`` entry with its value."""

    host: str
    """Canonical name."""
    header: bytes
    value: bytes
    """As ``network.inject`` writes it, references replaced."""
    secrets: tuple[bytes, ...]
    """What the references stood for; empty for a value that the policy spells out."""
    source: str
    """The references, e.g. ``${NAME}``; empty for a value that the policy spells out."""
    mode: Literal["replace_always", "replace_placeholder"]
    placeholder: bytes | None

    def __repr__(self) -> str:
        """Name it; a value that is printed is a value that is logged."""
        return f"Credential({self.source or 'a literal'} for {self.host})"


@dataclass(frozen=True, repr=False)
class Credentials:
    """All credentials of one session."""

    entries: tuple[Credential, ...] = ()

    def __repr__(self) -> str:
        """Name them."""
        return f"Credentials({', '.join(map(repr, self.entries))})"

    def for_host(self, host: str) -> tuple[Credential, ...]:
        """Return what is bound to a canonical name."""
        return tuple(entry for entry in self.entries if entry.host == host)

    def check(self, network: NetworkPolicy) -> None:
        """Raise PolicyError unless every injection of a policy has its value here."""
        held = {(entry.host, entry.header.lower(), entry.source) for entry in self.entries}
        for injection in network.inject:
            source = _source(injection)
            key = (_host(injection), injection.header.lower().encode("ascii"), source)
            if key not in held:
                raise PolicyError(
                    f"cannot inject {injection.header} for {injection.host}: no value was taken for "
                    f"{source or 'it'} when the session was planned; start a new session"
                )

    @cached_property
    def watch(self) -> Watch:
        """What looks for these credentials in requests and answers."""
        return Watch(
            secrets=[secret for entry in self.entries for secret in entry.secrets],
            placeholders=[entry.placeholder for entry in self.entries if entry.placeholder],
        )

    def inject(self, host: str, head: RequestHead, fields: list[Field]) -> tuple[list[Field], str | None]:
        """Return the fields that go upstream, and which credentials they hold (``${NAME}``), if any.

        ``head`` is what the client sent, and ``fields`` what is forwarded of it. Call it only for a request
        that ``find_misuse`` let pass and only once the host's certificate is verified.
        """
        bound = self.for_host(host)
        if not bound:
            return fields, None
        fields = [field for field in fields if field[0].lower() not in _NOT_WITH_CREDENTIALS]
        used = []
        for entry in bound:
            name = entry.header.lower()
            if entry.mode == "replace_always":
                fields = [field for field in fields if field[0].lower() != name]
                fields.append((entry.header, entry.value))
                used.append(entry.source)
            elif entry.placeholder is not None and any(
                field.lower() == name and entry.placeholder in value for field, value in fields
            ):
                fields = [
                    (field, value.replace(entry.placeholder, entry.value) if field.lower() == name else value)
                    for field, value in fields
                ]
                used.append(entry.source)
        fields.append((b"Accept-Encoding", b"identity"))
        return fields, " ".join(source for source in used if source) or None

    def find_in_name(self, host: str) -> Refusal | None:
        """Return why a name that the client made up may not be looked up, or None."""
        return self.watch.find_in_name(host) if self.entries else None

    def find_misuse(self, host: str | None, head: RequestHead) -> Refusal | None:
        """Return why a request's head may not go to a host, or None. Of None: to a host over plain HTTP."""
        if not self.entries:
            return None
        bound = {entry.header.lower(): entry.placeholder for entry in self.for_host(host)} if host else {}
        parts = [head.target]
        for name, value in head.fields:
            own = bound.get(name.lower())
            parts.append(name + b": " + (value.replace(own, b"") if own else value))
        return self.watch.find(b"\r\n".join(parts))


def resolve_credentials(
    network: NetworkPolicy,
    environ: Mapping[str, str],
    read_file: Callable[[Path], bytes] | None = None,
) -> Credentials:
    """Take the value of every ``network.inject`` entry. Raises PolicyError for a missing or unusable one."""
    return Credentials(
        tuple(_resolve(injection, environ, read_file or _read_file) for injection in network.inject)
    )


def _resolve(
    injection: Injection, environ: Mapping[str, str], read_file: Callable[[Path], bytes]
) -> Credential:
    what = f"cannot inject {injection.header} for {injection.host}: "
    value, secrets, position = "", [], 0
    for start, end, name, path in references(injection.value):
        secret = _from_file(what, path, read_file) if path else _from_variable(what, name, environ)
        if len(secret) < MIN_SECRET:
            raise PolicyError(
                f"{what}the value of {injection.value[start:end]} is shorter than {MIN_SECRET} characters, "
                "too short to be told from other text; use a longer one"
            )
        value += injection.value[position:start] + secret
        secrets.append(secret.encode("ascii"))
        position = end
    value += injection.value[position:]
    return Credential(
        host=_host(injection),
        header=injection.header.encode("ascii"),
        value=value.encode("ascii"),
        secrets=tuple(secrets),
        source=_source(injection),
        mode=injection.mode,
        placeholder=injection.placeholder.encode("ascii") if injection.placeholder else None,
    )


def _from_variable(what: str, name: str, environ: Mapping[str, str]) -> str:
    if name not in environ:
        raise PolicyError(f"{what}the variable {name} is not set (secret_missing); set it and start again")
    return _checked(what, f"the variable {name}", environ[name])


def _from_file(what: str, path: str, read_file: Callable[[Path], bytes]) -> str:
    try:
        raw = read_file(Path(path))
    except OSError as exc:
        raise PolicyError(
            f"{what}cannot read {path} (secret_missing): {exc.strerror or exc}; make it a readable file"
        ) from exc
    return _checked(what, f"the file {path}", raw.removesuffix(b"\n").decode("latin-1"))


def _checked(what: str, source: str, secret: str) -> str:
    if not secret:
        raise PolicyError(f"{what}{source} is empty (secret_missing); fill it and start again")
    # Also line ends and NUL, with which a value would become more than one header.
    if not all(" " <= char <= "~" for char in secret) or secret != secret.strip(" "):
        raise PolicyError(
            f"{what}{source} holds a control character, a non-ASCII one or a blank at its end; "
            "a header value is one line of ASCII"
        )
    return secret


def _source(injection: Injection) -> str:
    return " ".join(injection.value[start:end] for start, end, _, _ in references(injection.value))


def _host(injection: Injection) -> str:
    host = canonical_host(injection.host.encode("ascii"))
    assert not isinstance(host, Refusal)  # noqa: S101  # checked when the policy was loaded
    return host


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        # A pipe would be waited for, a device read for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(None, "it is not a regular file")
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise OSError(None, f"it is longer than {_MAX_FILE} bytes")
    return data
