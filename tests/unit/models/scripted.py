"""A provider whose outcomes are prepared by the test; it keeps the requests it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sandbox.models.provider import ModelReply, ModelRequest, ProviderError, Usage

Outcome = ModelReply | BaseException


def reply(
    input_tokens: int = 100, output_tokens: int = 50, *, text: str = "ok", has_usage: bool = True
) -> ModelReply:
    usage = Usage(input_tokens, 0, 0, output_tokens) if has_usage else None
    return ModelReply("m-1", "id-1", text, (), "end", usage)


def overloaded(
    *, retry_after: float | None = None, may_be_billed: bool = False, is_retryable: bool = True
) -> ProviderError:
    return ProviderError(
        "busy",
        kind="overloaded",
        is_retryable=is_retryable,
        http_status=529,
        retry_after_seconds=retry_after,
        may_be_billed=may_be_billed,
    )


class ScriptedProvider:
    """Gives out ``outcomes`` in order, and the last one again and again."""

    def __init__(self, model: str, outcomes: Iterable[Outcome], *, bound: int = 1_000) -> None:
        self.model = model
        self.requests: list[ModelRequest] = []
        self._outcomes = list(outcomes)
        self._bound = bound

    def input_bound(self, request: ModelRequest) -> int:
        return self._bound

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        self.requests.append(request)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        on_text(outcome.text)
        return outcome

    async def close(self) -> None:
        pass
