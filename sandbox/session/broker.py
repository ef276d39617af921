"""The only way from the agent to the guest: reserve, record, decide, ask, act, record. D6, D7"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sandbox.budget import Meter, Shortfall
from sandbox.digest import blake3_hex
from sandbox.errors import ToolCallsExhausted
from sandbox.events import (
    BreakerTripped,
    BudgetReserved,
    BudgetSettled,
    ConfirmationGiven,
    DecisionMade,
    ToolCall,
    excerpt,
)
from sandbox.guest.channel import GuestChannel
from sandbox.policy.commands.line import decide_command
from sandbox.policy.decide import Decision, allow, confirm, deny, strictest
from sandbox.policy.model import Policy
from sandbox.policy.paths import decide_path
from sandbox.session.actions import (
    Action,
    CreateFile,
    ListFiles,
    ModifyFile,
    Outcome,
    ReadFile,
    RunCommand,
    SearchFiles,
    Unavailable,
)
from sandbox.session.confirm import Answer, Confirmer, Question
from sandbox.session.effects import Shell, carry_out
from sandbox.session.execs import ExecRecord
from sandbox.session.recorder import Recorder

TOOL_NAME_CHARS = 80
NO_SPACE = ("ENOSPC:", "EDQUOT:", "EIO:", "EROFS:")
"""How an effect that the workspace's disk refused begins."""
REASON_CHARS = 2_000
"""Longest reason that the model is told; reasons quote what it wrote."""


class Broker:
    """Performs actions one at a time, in the order they were asked."""

    def __init__(
        self,
        policy: Policy,
        shell: Shell,
        guest: Callable[[], Awaitable[GuestChannel]],
        recorder: Recorder,
        meter: Meter,
        confirmer: Confirmer,
        check_disk: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """``guest`` waits until the container runs: the first model call need not wait for it. D11

        ``check_disk`` is called after each effect, told whether a write failed for want of space; it raises
        DiskFull. None: nobody counts.
        """
        self._check_disk = check_disk
        self._policy = policy
        self._shell = shell
        self._guest = guest
        self._recorder = recorder
        self._meter = meter
        self._confirmer = confirmer
        self._execs = ExecRecord(recorder.record, shell.blocked_paths, shell.closed)

    async def perform(self, action: Action, objection: Decision | None = None) -> Outcome:
        """Decide an action and, when allowed, carry it out.

        ``objection`` is a denial that was found before the policy is asked (the action schema's path
        pattern); it is recorded like every other decision. Raises ToolCallsExhausted when no tool call
        is left, RecordError when it cannot be recorded (nothing was done then), GuestError when the
        container is gone, DiskFull when there is no room for a next one.
        """
        self._charge_tool_call()
        self._recorder.record(
            ToolCall(
                action_id=action.id,
                tool=action.tool,
                arguments_blake3=blake3_hex(action.arguments),
                summary=excerpt(action.summary),
                claimed_confidence=_number(action.scrutiny.confidence),
                claimed_requires_review=action.scrutiny.requires_review,
            )
        )
        # In a thread: a hostile command line keeps the parser busy for a second, and the gateway must go on.
        decision = await asyncio.to_thread(self._judge, action, objection)
        self._record_decision(decision, action.id)
        if decision.verdict == "confirm":
            decision = await self._confirm(action, decision)
            self._record_decision(decision, action.id)
        if not decision.is_allowed:
            return Outcome("denied", f"Refused by {decision.rule}: {excerpt(decision.reason, REASON_CHARS)}")
        guest = await self._guest()
        execs = self._execs.of_action(action.id)
        result, outcome = await carry_out(guest, action, self._shell, self._policy.limits, execs)
        self._recorder.record(result)
        if self._check_disk is not None:
            await self._check_disk(outcome.verdict == "failed" and outcome.content.startswith(NO_SPACE))
        return outcome

    def refuse_invalid(self, action_id: str, tool: str, raw: str, problem: str) -> None:
        """Record a call that is no action, and count it: a flood of nonsense ends like any other flood.

        ``tool`` and ``raw`` are what the model wrote, ``problem`` what is wrong with it. Raises
        ToolCallsExhausted and RecordError as ``perform`` does.
        """
        self._charge_tool_call()
        self._recorder.record(
            ToolCall(
                action_id=action_id,
                tool=excerpt(tool, TOOL_NAME_CHARS),
                arguments_blake3=blake3_hex(raw.encode("utf-8", "replace")),
                summary=excerpt(raw),
            )
        )
        self._record_decision(Decision("deny", "action.invalid", problem), action_id)

    def _charge_tool_call(self) -> None:
        one = {"tool_calls": 1}
        reservation = self._meter.reserve(one)
        if isinstance(reservation, Shortfall):
            limit, value = reservation.limit, reservation.spent + 1
            self._recorder.record(
                BreakerTripped(breaker="tool_calls", limit=limit, value=value, action="stop")
            )
            raise ToolCallsExhausted(f"the agent used all of its {limit} tool calls")
        self._recorder.record(BudgetReserved(reservation=reservation.id, amounts=one))
        self._meter.keep(reservation)
        self._recorder.record(BudgetSettled(reservation=reservation.id, amounts=one, kept=True))

    def _judge(self, action: Action, objection: Decision | None) -> Decision:
        try:
            decision = self._ask_policy(action)
        except Exception as exc:  # an evaluation error is a deny, whatever it was. D10
            decision = deny("policy.error", f"the policy could not be evaluated ({type(exc).__name__})")
        if objection is not None:
            decision = strictest([objection, decision])
        if decision.is_allowed and action.scrutiny.requires_review:
            return confirm("action.requires_review", "the model asked for a person's review")
        return decision

    def _ask_policy(self, action: Action) -> Decision:
        match action.operation:
            case ReadFile(path=path) | ListFiles(path=path) | SearchFiles(path=path):
                return decide_path(self._policy.filesystem, path, is_write=False)
            case CreateFile(path=path) | ModifyFile(path=path):
                return decide_path(self._policy.filesystem, path, is_write=True)
            case RunCommand(command=command):
                return decide_command(self._policy.shell, command).decision
            case Unavailable(rule=rule, reason=reason):
                return deny(rule, reason)

    async def _confirm(self, action: Action, decision: Decision) -> Decision:
        asked = Question(
            action.id, action.tool, action.summary, decision.reason, blake3_hex(action.arguments)
        )
        answer = await self._confirmer.ask(asked)
        self._recorder.record(
            ConfirmationGiven(
                action_id=action.id,
                approved=answer.is_approved,
                by=answer.by,
                arguments_blake3=asked.arguments_blake3,
            )
        )
        return _after_answer(decision, answer)

    def _record_decision(self, decision: Decision, action_id: str) -> None:
        self._recorder.record(
            DecisionMade(
                action_id=action_id,
                verdict=decision.verdict,
                rule=decision.rule,
                reason=excerpt(decision.reason),
            )
        )


def _after_answer(decision: Decision, answer: Answer) -> Decision:
    if answer.is_approved:
        return allow(decision.rule, f"confirmed ({answer.by})")
    if answer.by == "no_terminal":
        return deny(decision.rule, f"{decision.reason}; there is no terminal to ask on")
    return deny(decision.rule, f"{decision.reason}; a person said no")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
