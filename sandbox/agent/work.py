"""Put an agent together for one session: schema, models, route, context, loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from sandbox.agent.actions import ActionReader
from sandbox.agent.context import Context
from sandbox.agent.loop import Agent
from sandbox.agent.tools import offered_tools
from sandbox.models.prices import PriceTable
from sandbox.models.provider import Provider
from sandbox.models.registry import open_provider
from sandbox.models.route import Route
from sandbox.session.plan import RunPlan
from sandbox.session.session import Session

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0


def agent_work(
    plan: RunPlan,
    environ: Mapping[str, str],
    working_dir: Path,
    on_text: Callable[[str], None],
) -> Callable[[Session], Awaitable[str]]:
    """Return the work of one session. Everything that can be wrong before a session starts raises here.

    Raises PolicyError for an unusable action schema or an unknown model prefix, ModelUnavailable for
    a missing key or an unpriced model.
    """
    policy = plan.policy
    reader = ActionReader(_schema_file(policy.output.schema_path, plan.policy_source, working_dir))
    prices = PriceTable(policy.prices)
    primary = open_provider(plan.model, environ=environ, working_dir=working_dir)
    fallback = None
    if plan.fallback_model is not None:
        fallback = open_provider(plan.fallback_model, environ=environ, working_dir=working_dir)
    for provider in (primary, fallback):
        if provider is not None:
            prices.price(provider.model)

    async def work(session: Session) -> str:
        route = Route(
            primary,
            fallback,
            meter=session.meter,
            prices=prices,
            record=session.recorder.record,
            jitter=random.random,  # spreads retries; nothing secret hangs on it
        )
        context = Context(
            policy, plan.task, offered_tools(policy, reader.target_pattern), policy.session.max_tokens
        )
        try:
            return await Agent(route, session.broker, reader, context, on_text).run()
        finally:
            await _close(primary, fallback)

    return work


def _schema_file(named: str | None, policy_source: Path, working_dir: Path) -> Path | None:
    """Find the policy's action schema: beside the policy file, else in the working directory."""
    if named is None:
        return None
    beside, here = policy_source.parent / named, working_dir / named
    return here if here.exists() and not beside.exists() else beside


async def _close(*providers: Provider | None) -> None:
    for provider in providers:
        if provider is None:
            continue
        # In a ``finally``, perhaps after the session's time is over: nothing else would end a wait here, and
        # a failure to hang up must not take the place of how the work ended.
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await provider.close()
        except Exception as exc:
            logger.warning(
                "cannot close the connections to %s: %s", provider.model, exc or type(exc).__name__
            )
