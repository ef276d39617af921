"""Everything about a run that is settled before anything is created: policy in effect, models, places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sandbox.budget import MAX_AMOUNT
from sandbox.errors import PolicyError
from sandbox.policy.load import LoadedPolicy
from sandbox.policy.model import Policy, RoutingPolicy

DEFAULT_IMAGE = "agent-runner/base:latest"
DEFAULT_BUDGET_USD = 5.00
DEFAULT_TOOL_CALLS = 200
NANO = 10**9


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for. None means: as the policy says."""

    task: str
    loaded: LoadedPolicy
    workspace: Path | None = None
    image: str = DEFAULT_IMAGE
    model: str | None = None
    fallback_model: str | None = None
    budget_usd: float | None = None
    max_tool_calls: int | None = None
    context_window: int | None = None


@dataclass(frozen=True)
class RunPlan:
    """A request with every default filled in. ``policy`` is what is enforced and recorded."""

    task: str
    policy: Policy
    policy_source: Path
    workspace: Path
    image: str
    model: str
    fallback_model: str | None
    warnings: tuple[str, ...] = ()

    @property
    def limits(self) -> dict[str, int]:
        """Return the session's limits by resource, as the meter takes them."""
        routing = self.policy.routing
        assert routing.max_budget_usd is not None and routing.max_tool_calls is not None  # noqa: S101
        return {
            "usd_nano": round(routing.max_budget_usd * NANO),
            "tool_calls": routing.max_tool_calls,
            "wall_ms": self.policy.limits.wall_seconds * 1000,
        }


def plan_run(request: RunRequest) -> RunPlan:
    """Fill in a request from its policy. The command line may lower the policy's ceilings, never raise them.

    Raises PolicyError for a value above a ceiling, and when no model is named anywhere.
    """
    policy = request.loaded.policy
    routing = policy.routing
    for option in ("task", "image", "model", "fallback_model"):
        _check_text("--" + option.replace("_", "-"), getattr(request, option))
    model = request.model or routing.default_model
    if model is None:
        raise PolicyError(
            "cannot choose a model: pass --model (anthropic:NAME, ollama:NAME or script:FILE), "
            "or set routing.default_model in the policy"
        )
    budget = _within(
        "--budget-limit", request.budget_usd, routing.max_budget_usd, DEFAULT_BUDGET_USD, MAX_AMOUNT // NANO
    )
    calls = _within("--max-tool-calls", request.max_tool_calls, routing.max_tool_calls, DEFAULT_TOOL_CALLS)
    window = _within(
        "--context-window", request.context_window, policy.session.max_tokens, policy.session.max_tokens
    )
    effective = policy.model_copy(
        update={
            "routing": RoutingPolicy(
                default_model=model,
                fallback_model=request.fallback_model or routing.fallback_model,
                max_budget_usd=float(budget),
                max_tool_calls=int(calls),
            ),
            "session": policy.session.model_copy(update={"max_tokens": int(window)}),
        }
    )
    return RunPlan(
        task=request.task,
        policy=effective,
        policy_source=request.loaded.source,
        workspace=(request.workspace or Path(policy.filesystem.root)).absolute(),
        image=request.image,
        model=model,
        fallback_model=effective.routing.fallback_model,
    )


def _check_text(option: str, text: str | None) -> None:
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as exc:
        raise PolicyError(f"cannot use {option}: it is not UTF-8 text, so it could not be recorded") from exc


def _within(
    option: str, asked: float | None, ceiling: float | None, default: float, most: int = MAX_AMOUNT
) -> float:
    """Return what is in effect; ``most`` is the largest amount that can be counted and recorded."""
    value = ceiling if asked is None else asked
    if value is None:
        return default
    if not 0 <= value <= most:  # also for NaN
        raise PolicyError(f"cannot use {option} {value:g}: it must be a number from 0 to {most}")
    if asked is None:
        return value
    if ceiling is not None and asked > ceiling:
        raise PolicyError(f"cannot raise {option} to {asked:g}: the policy's ceiling is {ceiling:g}")
    return asked
