"""Find credentials in what passes by, and make them unreadable in answers. Pure. D5

The sandbox is never given a credential, so one seen on its way out has leaked; a placeholder outside its
header is an attempt to have it replaced somewhere else. Base64, hexadecimal and percent-encoded forms are
found too. Whoever encrypts one is not found: this is an alarm behind the wall, not the wall.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote_to_bytes

from sandbox.policy.hosts import Refusal

LEAK = Refusal("credential_leak", "the request holds a credential's real value; it may not leave")
MISUSE = Refusal(
    "credential_misuse", "a placeholder belongs in its own header, on its own host, and nowhere else"
)

_SHOWN = 3


class Watch:
    """What to look for in one session's traffic. Cheap to ask when there is nothing to look for."""

    def __init__(self, secrets: Iterable[bytes], placeholders: Iterable[bytes]) -> None:
        """Take values of at least eight bytes each."""
        self._secrets = tuple(dict.fromkeys(secrets))
        self._placeholders = tuple(dict.fromkeys(placeholders))
        self._forms = tuple(dict.fromkeys(form for secret in self._secrets for form in _forms(secret)))
        spelt = [form for secret in self._secrets for form in (*_forms(secret), *_base32_forms(secret))]
        self._name_forms = _without_case_and_dots(spelt)
        self._name_placeholders = _without_case_and_dots(self._placeholders)
        plain = (*self._secrets, *self._placeholders)
        # Percent-encoded twice, each byte takes five.
        self.reach = max([0, *(5 * len(one) for one in plain), *(len(form) for form in self._forms)])

    def find(self, data: bytes) -> Refusal | None:
        """Return why some bytes may not leave, or None."""
        texts = [data]
        # Twice, since a server's proxy and the server may each decode once.
        while b"%" in texts[-1] and len(texts) < 3:
            texts.append(unquote_to_bytes(texts[-1]))
        if any(form in data for form in self._forms) or _any_in(self._secrets, texts):
            return LEAK
        return MISUSE if _any_in(self._placeholders, texts) else None

    def find_in_name(self, host: str) -> Refusal | None:
        """Return why a name may not be looked up, or None: looking it up carries it to whoever owns its end.

        Names know no case, and what is too long for one label is cut into several.
        """
        name = host.lower().replace(".", "")
        if any(form in name for form in self._name_forms):
            return LEAK
        return MISUSE if any(form in name for form in self._name_placeholders) else None

    def outbound(self) -> Outbound:
        """Return a watch over one body that leaves."""
        return Outbound(self)

    def redactor(self) -> Redactor:
        """Return what cleans one answer."""
        return Redactor(self._forms)


class Outbound:
    """Looks at one body piece by piece, cuts between pieces included."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._tail = b""

    def feed(self, data: bytes) -> Refusal | None:
        """Return why the next piece may not leave, or None."""
        if not self._watch.reach:
            return None
        window = self._tail + data
        self._tail = window[-(self._watch.reach - 1) :]
        return self._watch.find(window)


class Redactor:
    """Overwrites credentials in one stream of bytes, keeping its length."""

    def __init__(self, forms: tuple[bytes, ...]) -> None:
        self._forms = forms
        self._longest = max((len(form) for form in forms), default=0)
        self._shown = b""
        self._held = b""

    def clean(self, data: bytes) -> bytes:
        """Return a whole text without credentials."""
        for form in self._forms:
            data = data.replace(form, b"*" * len(form))
        return data

    def feed(self, data: bytes) -> bytes:
        """Return what is safe to pass on; an end that may be a credential's beginning is held back.

        Its first three bytes are not: any text may end in those, and who waits for an answer's last byte
        before speaking again would wait for ever.
        """
        if not self._forms:
            return data
        window = self.clean(self._shown + self._held + data)
        begins = len(window) - self._suspicious_end(window)
        passed = min(begins + _SHOWN, len(window))
        out = window[len(self._shown) : passed]
        self._shown, self._held = window[begins:passed], window[passed:]
        return out

    def finish(self) -> bytes:
        """Return what was held back."""
        held, self._shown, self._held = self._held, b"", b""
        return held

    def _suspicious_end(self, window: bytes) -> int:
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            first = window[-size]
            if any(form[0] == first and form.startswith(window[-size:]) for form in self._forms):
                return size
        return 0


def _any_in(needles: tuple[bytes, ...], texts: list[bytes]) -> bool:
    return any(needle in text for text in texts for needle in needles)


def _forms(secret: bytes) -> list[bytes]:
    """Return how a secret may be spelt. Base64 depends on where in the text it begins: three forms."""
    forms = [secret, secret.hex().encode(), secret.hex().upper().encode()]
    escaped = quote(secret, safe="").encode()
    forms += [escaped, re.sub(rb"%..", lambda escape: escape[0].lower(), escaped)]
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret)
        # The letters at both ends hold bits of what stands around it.
        first = (0, 2, 3)[before]
        last = (before + len(secret)) * 8 // 6
        forms += [text[first:last], text[first:last].translate(bytes.maketrans(b"+/", b"-_"))]
    return list(dict.fromkeys(forms))


def _base32_forms(secret: bytes) -> list[bytes]:
    """Return how base32, the usual way to put bytes into names, may spell a secret: five forms."""
    forms = []
    for before in range(5):
        text = base64.b32encode(bytes(before) + secret)
        forms.append(text[-(-before * 8 // 5) : (before + len(secret)) * 8 // 5])
    return forms


def _without_case_and_dots(forms: Iterable[bytes]) -> tuple[str, ...]:
    texts = (form.decode("latin-1").lower().replace(".", "") for form in forms)
    return tuple(dict.fromkeys(text for text in texts if text))
