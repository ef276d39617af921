"""Open the provider that a model id names. Light to import: each SDK is loaded when its prefix is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sandbox.errors import ModelUnavailable, PolicyError
from sandbox.models.provider import Provider

PREFIXES = ("anthropic:", "ollama:", "script:")


MODEL_KEYS = frozenset({"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OLLAMA_API_KEY"})
"""Variables with a provider's key; no other program needs them."""


def open_provider(model: str, *, environ: Mapping[str, str], working_dir: Path) -> Provider:
    """Return a provider for ``anthropic:NAME``, ``ollama:NAME`` or ``script:PATH``. Opens no connection.

    A script's path is relative to ``working_dir``. Keys and addresses come from ``environ`` alone.
    Raises PolicyError for an id that names no model, ModelUnavailable when this machine cannot call it.
    """
    prefix, colon, name = model.partition(":")
    if prefix + colon == "replay:":
        raise PolicyError(f"cannot use {model} as a model: replay: is not available yet; use script: instead")
    if prefix + colon not in PREFIXES:
        raise PolicyError(
            f"unknown model {model!r}: it must start with one of {', '.join(PREFIXES)} "
            "e.g. anthropic:claude-sonnet-4-6"
        )
    if not name.strip():
        raise PolicyError(f"model {model!r} names nothing after {prefix}:; add the model's name")
    match prefix:
        case "anthropic":
            return _open_anthropic(name, environ)
        case "ollama":
            return _open_ollama(name, environ)
    from sandbox.models.script import ScriptProvider

    return ScriptProvider(model, working_dir / name)


def _open_anthropic(name: str, environ: Mapping[str, str]) -> Provider:
    api_key = environ.get("ANTHROPIC_API_KEY", "").strip() or None
    auth_token = environ.get("ANTHROPIC_AUTH_TOKEN", "").strip() or None
    if api_key is None and auth_token is None:
        raise ModelUnavailable(
            f"cannot call anthropic:{name}: no key; set ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN)"
        )
    from sandbox.models.anthropic import DEFAULT_BASE_URL, AnthropicProvider

    base_url = environ.get("ANTHROPIC_BASE_URL", "").strip() or DEFAULT_BASE_URL
    if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
        raise ModelUnavailable(
            f"cannot call anthropic:{name}: ANTHROPIC_BASE_URL is {base_url!r}; set it to http(s)://host"
        )
    # The key wins over the token, as in the SDK; with both it would send both.
    return AnthropicProvider(
        name, api_key=api_key, auth_token=None if api_key else auth_token, base_url=base_url
    )


def _open_ollama(name: str, environ: Mapping[str, str]) -> Provider:
    from sandbox.models.ollama import DEFAULT_HOST, OllamaProvider

    host = environ.get("OLLAMA_HOST", "").strip() or DEFAULT_HOST
    try:
        return OllamaProvider(name, host=host, api_key=environ.get("OLLAMA_API_KEY", "").strip() or None)
    except ValueError as exc:
        raise ModelUnavailable(
            f"cannot call ollama:{name}: OLLAMA_HOST is {host!r} ({exc}); set it to host:port"
        ) from exc
