from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress.leaks import LEAK, MISUSE, Watch

SECRET = b"s3cr?t+va/ue=="
DECOY = b"decoy-0123"
WATCH = Watch([SECRET], [DECOY])

FORMS = [
    SECRET,
    SECRET.hex().encode(),
    SECRET.hex().upper().encode(),
    quote(SECRET).encode(),
    quote(SECRET, safe="").lower().encode(),
    b"".join(b"%%%02x" % byte for byte in SECRET),
    b"".join(b"%%25%02X" % byte for byte in SECRET),
    SECRET.replace(b"c", b"%63"),
    *(base64.b64encode(b"x" * before + SECRET + b"y" * after) for before in range(4) for after in range(3)),
    *(base64.urlsafe_b64encode(b"user:" + b"\xff" * before + SECRET) for before in range(3)),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_found_in_every_form_and_across_every_cut(form: bytes) -> None:
    text = b"before " + form + b" after"
    found = WATCH.find(text)
    assert found is not None and found.reason == "credential_leak"
    for cut in range(1, len(text)):
        outbound = WATCH.outbound()
        refusals = [outbound.feed(text[:cut]), outbound.feed(text[cut:])]
        assert any(refusals), cut
    one_by_one = WATCH.outbound()
    assert any(one_by_one.feed(text[at : at + 1]) for at in range(len(text)))


def test_a_placeholder_is_a_misuse_and_other_text_is_nothing() -> None:
    for text in (b"a=" + DECOY, b"a=decoy%2D0123"):
        found = WATCH.find(text)
        assert found is not None and found.reason == "credential_misuse"
    assert WATCH.find(SECRET[:-1] + b" decoy-012 %zz %") is None
    assert Watch([], []).find(SECRET) is None
    assert Watch([], []).outbound().feed(SECRET) is None


@given(
    st.lists(st.sampled_from([SECRET, SECRET[:5], SECRET[3:], b"s", b"plain ", FORMS[8]]), max_size=8),
    st.data(),
)
def test_no_cut_lets_a_secret_through_to_the_client(parts: list[bytes], data: st.DataObject) -> None:
    text = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    redactor = WATCH.redactor()
    shown = b"".join(
        redactor.feed(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
    )
    shown += redactor.finish()
    assert len(shown) == len(text)
    assert SECRET not in shown
    # What is no part of a secret is passed on as it was.
    assert shown.count(b"plain ") == text.count(b"plain ")


def test_an_end_that_looks_harmless_is_not_held_back() -> None:
    redactor = WATCH.redactor()
    assert redactor.feed(b"data: s3c") == b"data: s3c"
    assert redactor.feed(b"r?t+va/ue==\n") == b"*" * 11 + b"\n"
    assert redactor.feed(b"s3cr") == b"s3c"
    assert redactor.feed(b"et\n") == b"ret\n"
    assert redactor.feed(b"s3cr?") == b"s3c"
    assert redactor.finish() == b"r?"


SPOKEN = b"S3cret.of-the-house"


@pytest.mark.parametrize(
    "name",
    [
        "s3cret.of-the-house.evil.test",
        "s3cretof-the-house.evil.test",
        SPOKEN.hex() + ".evil.test",
        SPOKEN.hex()[:9] + "." + SPOKEN.hex()[9:] + ".evil.test",
        base64.b64encode(SPOKEN).decode().strip("=").lower() + ".evil.test",
        *(
            base64.b32encode(b"x" * before + SPOKEN + b"y").decode().strip("=").lower() + ".evil.test"
            for before in range(5)
        ),
    ],
)
def test_a_secret_spelt_as_a_name_is_found(name: str) -> None:
    watch = Watch([SPOKEN], [b"PLACEHOLDER"])
    assert watch.find_in_name(name) == LEAK
    assert watch.find_in_name("placeholder.evil.test") == MISUSE
    assert watch.find_in_name("api.example.com") is None
    assert Watch([], []).find_in_name(name) is None
