"""Translate what the Anthropic SDK raises into ProviderError: which kind, try again, was it billed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandbox.models.decoding import one_line, parse_retry_after
from sandbox.models.provider import ErrorKind, ProviderError

_KIND_BY_STATUS: dict[int, ErrorKind] = {
    400: "invalid_request",
    401: "authentication",
    402: "spend_limit",
    403: "authentication",
    404: "not_found",
    408: "server_error",
    409: "server_error",
    413: "context_exceeded",
    429: "rate_limited",
    503: "overloaded",
    529: "overloaded",
}
# For error events inside a stream, whose HTTP status is 200.
_KIND_BY_TYPE: dict[str, ErrorKind] = {
    "invalid_request_error": "invalid_request",
    "authentication_error": "authentication",
    "permission_error": "authentication",
    "billing_error": "spend_limit",
    "not_found_error": "not_found",
    "request_too_large": "context_exceeded",
    "rate_limit_error": "rate_limited",
    "overloaded_error": "overloaded",
}
_RETRYABLE_KINDS = {"rate_limited", "overloaded", "server_error"}
# The server turned the request away before a model saw it. Other failures of the server are not that sure.
_UNBILLED_KINDS = {
    "rate_limited",
    "overloaded",
    "invalid_request",
    "authentication",
    "not_found",
    "spend_limit",
    "context_exceeded",
}
_SPEND_CODES = {
    "enforced_spend_limit_reached",
    "contract_spend_limit_reached",
    "linked_organization_spend_limit_reached",
    "linked_organization_billing_unavailable",
}
# A limit that the customer set, and an input that is too long, arrive as plain 400 without a code.
_SPEND_PHRASES = ("usage limit", "spend limit", "spending limit", "credit balance")
_CONTEXT_PHRASES = ("prompt is too long", "context limit", "context window")
_REMEDY: dict[ErrorKind, str] = {
    "authentication": "check ANTHROPIC_API_KEY and what it may use",
    "not_found": "check the model's name",
    "spend_limit": "raise the account's limit at the provider, or use another model",
    "context_exceeded": "shorten the context",
}


def status_error(exc: Any, model: str, now: float, *, has_started: bool) -> ProviderError:
    """Translate an ``APIStatusError`` (Any: the SDK is imported in its adapter only).

    ``has_started`` says that ``message_start`` was seen: from then on tokens may have been produced.
    """
    status: int = exc.status_code
    error = _error_object(exc.body)
    message = str(error.get("message") or exc.message)
    kind = _kind(status, error, message)
    headers: Mapping[str, str] = exc.response.headers
    may_retry = kind in _RETRYABLE_KINDS
    if kind != "spend_limit" and (advice := headers.get("x-should-retry")) in ("true", "false"):
        may_retry = advice == "true"
    remedy = f"; {_REMEDY[kind]}" if kind in _REMEDY else ""
    where = f"HTTP {status}" if status != 200 else "an error in the stream"
    return ProviderError(
        f"{model} answered {where}: {one_line(message)}{remedy}",
        kind=kind,
        is_retryable=may_retry,
        http_status=status,
        retry_after_seconds=parse_retry_after(headers, now),
        may_be_billed=has_started or kind not in _UNBILLED_KINDS,
    )


def connection_error(exc: BaseException, model: str, base_url: str) -> ProviderError:
    """Translate a request that got no answer.

    Only a connection that was never made is surely free; after that the request may have arrived.
    """
    cause = exc.__cause__ or exc
    # By name: the SDK's HTTP library changed between its releases.
    never_connected = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
    attempt = "cannot connect to" if never_connected else "no answer from"
    return ProviderError(
        f"{attempt} {base_url} for {model}: {one_line(str(cause) or type(cause).__name__)}; "
        "check the network and ANTHROPIC_BASE_URL",
        kind="connection",
        is_retryable=True,
        may_be_billed=not never_connected,
    )


def _kind(status: int, error: dict[str, Any], message: str) -> ErrorKind:
    details = error.get("details")
    if isinstance(details, dict) and details.get("error_code") in _SPEND_CODES:
        return "spend_limit"
    if status < 400:
        kind = _KIND_BY_TYPE.get(str(error.get("type")), "server_error")
    else:
        kind = _KIND_BY_STATUS.get(status, "server_error" if status >= 500 else "invalid_request")
    if kind == "invalid_request":
        lowered = message.lower()
        if any(phrase in lowered for phrase in _SPEND_PHRASES):
            return "spend_limit"
        if any(phrase in lowered for phrase in _CONTEXT_PHRASES):
            return "context_exceeded"
    return kind


def _error_object(body: object) -> dict[str, Any]:
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}
