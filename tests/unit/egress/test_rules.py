from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress.rules import canonical_path, judge_request
from sandbox.policy.hosts import Refusal
from sandbox.policy.model import HostEntry, RequestRule

ENTRY = HostEntry(
    host="api.test",
    ports=(80,),
    rules=(
        RequestRule(methods=("GET", "HEAD"), path="/repos/**"),
        RequestRule(methods=("POST",), path="/graphql"),
        RequestRule(methods=("PUT",), path="/a/*/c"),
    ),
)


@pytest.mark.parametrize(
    ("method", "path", "verdict"),
    [
        ("GET", b"/repos/x", b"/repos/x"),
        ("HEAD", b"/repos/a/b?q=/../%2f", b"/repos/a/b?q=/../%2f"),
        ("GET", b"/repos/%61/./b/../c", b"/repos/a/c"),
        ("POST", b"/graphql", b"/graphql"),
        ("PUT", b"/a/b/c", b"/a/b/c"),
        ("PUT", b"/a/b/b/c", "path_not_allowed"),
        ("GET", b"/graphql", "path_not_allowed"),
        ("GET", b"/repos/../user", "path_not_allowed"),
        ("GET", b"/repos/%2e%2e/user", "path_not_allowed"),
        ("GET", b"/repos/..%2fuser", "path_not_allowed"),
        ("GET", b"/repos/..;x=1/user", "path_not_allowed"),
        ("GET", b"/repos/..%3bx/user", "path_not_allowed"),
        ("GET", b"/repos/..%5cuser", "path_not_allowed"),
        ("GET", b"/repos/..\\user", "bad_request"),
        ("GET", b"//repos/x", "path_not_allowed"),
        ("GET", b"/repos//x", "path_not_allowed"),
        ("GET", b"/../repos/x", "path_not_allowed"),
        ("GET", b"/repos/%zz", "bad_request"),
        ("GET", b"/repos/%", "bad_request"),
        ("GET", b"/repos/a%00b", "path_not_allowed"),
        ("GET", b"/repos/%252e%252e/user", "path_not_allowed"),
        ("DELETE", b"/repos/x", "method_not_allowed"),
        ("TRACE", b"/repos/x", "method_not_allowed"),
    ],
)
def test_a_request_is_judged_on_its_canonical_path(method: str, path: bytes, verdict: bytes | str) -> None:
    judged = judge_request(ENTRY, method, path)
    assert (judged.reason if isinstance(judged, Refusal) else judged) == verdict


def test_without_rules_the_path_stays_as_sent_and_trace_is_refused() -> None:
    entry = HostEntry(host="api.test", ports=(80,))
    assert judge_request(entry, "DELETE", b"//a/../%2f?x") == b"//a/../%2f?x"
    assert isinstance(judge_request(entry, "TRACE", b"/"), Refusal)


@given(st.text("/.%2eEfF;ab", max_size=30).map(lambda text: b"/" + text.encode()))
def test_a_canonical_path_is_its_own_canonical_form_and_holds_no_dot_segment(path: bytes) -> None:
    canonical = canonical_path(path)
    if not isinstance(canonical, Refusal):
        assert canonical_path(canonical) == canonical
        assert not {b".", b".."} & set(canonical.split(b"/"))
