"""Everything about a run that is settled before anything is created: policy in effect, models, places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.budget import MAX_AMOUNT
from sandbox.egress.credentials import Credentials, resolve_credentials
from sandbox.egress.indexes import index_environment, resolve_package_indexes
from sandbox.egress.trust import EXTRA_ROOTS
from sandbox.errors import PolicyError
from sandbox.models.registry import MODEL_KEYS
from sandbox.policy.injections import references
from sandbox.policy.load import LoadedPolicy
from sandbox.policy.model import NetworkPolicy, Policy, RoutingPolicy
from sandbox.session.egress_bytes import egress_limits

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
    index_env: Mapping[str, str]
    """Variables that point the package clients in the container at this machine's indexes."""
    extra_roots: Path | None = None
    """The operator's own root certificates, a PEM file; they are trusted beside this host's. None: none."""
    credentials: Credentials = field(default_factory=Credentials, repr=False)
    """The values of ``network.inject``: neither recorded nor digested, and never shown."""

    @property
    def limits(self) -> dict[str, int]:
        """Return the session's limits by resource, as the meter takes them."""
        routing = self.policy.routing
        assert routing.max_budget_usd is not None and routing.max_tool_calls is not None  # noqa: S101
        return {
            "usd_nano": round(routing.max_budget_usd * NANO),
            "tool_calls": routing.max_tool_calls,
            "wall_ms": self.policy.limits.wall_seconds * 1000,
            "written_bytes": self.policy.limits.workspace_bytes,
        } | egress_limits(self.policy.network)


def plan_run(
    request: RunRequest, environ: Mapping[str, str], home: Path, credentials: Credentials | None = None
) -> RunPlan:
    """Fill in a request from its policy. The command line may lower the policy's ceilings, never raise them.

    ``environ`` and ``home`` are those of the package clients that ``network.package_indexes`` names;
    ``environ`` also holds the variables of ``network.inject``, and in ``AGENT_RUNNER_EXTRA_CA_CERTS`` the
    name of a file with the operator's own root certificates. ``credentials`` stand for those of
    ``network.inject``, which are not looked up then.
    Raises PolicyError for a value above a ceiling or beyond what can be counted, for text that is not
    UTF-8, for a credential without value, and when no model is named anywhere; HostError when a package
    index cannot be allowed.
    """
    policy = request.loaded.policy
    routing = policy.routing
    _refuse_broken_text(request)
    if not request.image.strip():
        raise PolicyError("cannot use an empty --image: name one, or leave it out for the default")
    model = request.model or routing.default_model
    if model is None:
        raise PolicyError(
            "cannot choose a model: pass --model (anthropic:NAME, ollama:NAME or script:FILE), "
            "or set routing.default_model in the policy"
        )
    budget = _within("--budget-limit", request.budget_usd, routing.max_budget_usd, DEFAULT_BUDGET_USD)
    calls = _within("--max-tool-calls", request.max_tool_calls, routing.max_tool_calls, DEFAULT_TOOL_CALLS)
    window = _within(
        "--context-window", request.context_window, policy.session.max_tokens, policy.session.max_tokens
    )
    for name, value, scale in (
        ("budget limit", budget, NANO),
        ("limit of tool calls", calls, 1),
        ("limits.wall_seconds", policy.limits.wall_seconds, 1000),
        *(("max_bytes in network", limit, 1) for limit in egress_limits(policy.network).values()),
        ("limits.workspace_bytes", policy.limits.workspace_bytes, 1),
    ):
        if value * scale > MAX_AMOUNT:
            raise PolicyError(f"cannot use a {name} of {value:g}: the most is {MAX_AMOUNT // scale}")
    client_environ = _without_credentials(policy.network, environ)
    effective = policy.model_copy(
        update={
            "routing": RoutingPolicy(
                default_model=model,
                fallback_model=request.fallback_model or routing.fallback_model,
                max_budget_usd=float(budget),
                max_tool_calls=int(calls),
            ),
            "session": policy.session.model_copy(update={"max_tokens": int(window)}),
            "network": _with_indexes(policy.network, client_environ, home),
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
        index_env=index_environment(policy.network.package_indexes, client_environ, home),
        extra_roots=Path(environ[EXTRA_ROOTS]).absolute() if environ.get(EXTRA_ROOTS) else None,
        credentials=resolve_credentials(policy.network, environ) if credentials is None else credentials,
    )


def _refuse_broken_text(request: RunRequest) -> None:
    """Refuse what the record, which is UTF-8, could not repeat."""
    given = {
        "--task": request.task,
        "--image": request.image,
        "--model": request.model,
        "--fallback-model": request.fallback_model,
    }
    for option, text in given.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as exc:
            raise PolicyError(f"cannot use {option} {text!r}: it is not UTF-8; write it in UTF-8") from exc


def _without_credentials(network: NetworkPolicy, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for this machine's package clients, which have no use for the session's keys."""
    taken = {name for entry in network.inject for _, _, name, _ in references(entry.value)}
    return {name: value for name, value in environ.items() if name not in taken | MODEL_KEYS}


def _with_indexes(network: NetworkPolicy, environ: Mapping[str, str], home: Path) -> NetworkPolicy:
    """Resolve ``package_indexes`` to hosts, so that the recorded policy says which were allowed. D5"""
    listed = {entry.host for entry in network.allowlist}
    found = resolve_package_indexes(network.package_indexes, environ, home)
    more = tuple(entry for entry in found if entry.host not in listed)
    return network.model_copy(update={"allowlist": (*network.allowlist, *more)})


def _within(option: str, asked: float | None, ceiling: float | None, default: float) -> float:
    if asked is None:
        return default if ceiling is None else ceiling
    if not math.isfinite(asked):
        raise PolicyError(f"cannot use {option} {asked:g}: give a number")
    if ceiling is not None and asked > ceiling:
        raise PolicyError(f"cannot raise {option} to {asked:g}: the policy's ceiling is {ceiling:g}")
    return asked
