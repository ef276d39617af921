"""Ask the model, do what it may have done, tell it what came of it, until it finishes."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.agent.actions import ActionReader, Finished, Invalid, Proposed
from sandbox.agent.context import Context
from sandbox.errors import InvalidOutput, Refused
from sandbox.events import excerpt
from sandbox.models.provider import ModelReply, ToolOutcome, ToolUse
from sandbox.models.route import ContextExceeded, Route
from sandbox.session.broker import Broker

REPAIR_TURNS = 2
"""Times in a row that a model may be told that its output is no action, before the run ends."""
PROBLEM_CHARS = 2_000
"""Longest complaint about one call: it quotes the model, whose keys and values have no limit of their own."""


class Agent:
    """One model at one task. Every action goes through the broker."""

    def __init__(
        self,
        route: Route,
        broker: Broker,
        reader: ActionReader,
        context: Context,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._route = route
        self._broker = broker
        self._reader = reader
        self._context = context
        self._on_text = on_text
        self._actions = 0

    async def run(self) -> str:
        """Work until the model calls ``finish``; return its summary.

        Raises RunStopped with the status of the result in every other case.
        """
        repairs = 0
        while True:
            reply = await self._ask()
            self._context.add_reply(reply)
            if reply.finish_reason == "refusal":
                raise Refused("the model declined the task")
            if not reply.tool_uses:
                problem = "no tool was called; use a tool, and call finish when you are done"
                outcomes: list[ToolOutcome] = []
            else:
                summary, outcomes, problem = await self._perform(reply)
                if summary is not None:
                    return summary
            if problem:
                repairs += 1
                if repairs > REPAIR_TURNS:
                    raise InvalidOutput(f"the model's output stayed invalid: {problem[:300]}")
            else:
                repairs = 0
            self._context.add_outcomes(tuple(outcomes), "" if reply.tool_uses else problem)

    async def _ask(self) -> ModelReply:
        """Ask the model; where it says that the context is too long, shorten it until it takes it."""
        while True:
            request = self._context.request()  # raises ModelFailed when nothing is left to drop
            try:
                return await self._route.complete(request, self._on_text)
            except ContextExceeded:
                self._context.shrink()

    async def _perform(self, reply: ModelReply) -> tuple[str | None, list[ToolOutcome], str]:
        """Return (summary when finished, outcomes, the last problem with an invalid call)."""
        outcomes: list[ToolOutcome] = []
        problem = ""
        for use in reply.tool_uses:
            self._actions += 1
            match self._reader.read(use, f"a{self._actions}"):
                case Finished(summary):
                    return summary, outcomes, ""
                case Invalid(found):
                    problem = excerpt(found, PROBLEM_CHARS)
                    self._broker.refuse_invalid(f"a{self._actions}", use.name, use.raw, problem)
                    outcomes.append(_answer(use, f"Invalid: {problem}", is_error=True))
                case Proposed(action, objection):
                    outcome = await self._broker.perform(action, objection)
                    is_error = outcome.verdict != "done"
                    outcomes.append(_answer(use, outcome.content, is_error=is_error))
        return None, outcomes, problem


def _answer(use: ToolUse, content: str, *, is_error: bool) -> ToolOutcome:
    return ToolOutcome(use.id, use.name, content, is_error)
