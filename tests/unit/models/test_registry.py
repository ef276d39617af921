"""From a model id to a provider, or to a message that says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.errors import ModelUnavailable, PolicyError
from sandbox.models.provider import Provider
from sandbox.models.registry import open_provider
from tests.unit.models import wire_anthropic, wire_ollama
from tests.unit.models.requests import ask
from tests.unit.models.wire import WireServer


def opened(model: str, tmp_path: Path, **environ: str) -> Provider:
    return open_provider(model, environ=environ, working_dir=tmp_path)


@pytest.mark.parametrize("model", ["gpt:x", "claude-sonnet-4-6", "", ":x", "Anthropic:x", "anthropic"])
def test_an_unknown_prefix_is_refused_with_the_known_ones(tmp_path: Path, model: str) -> None:
    with pytest.raises(PolicyError, match="anthropic:, ollama:, script:"):
        opened(model, tmp_path)


@pytest.mark.parametrize("model", ["anthropic:", "ollama: ", "script:"])
def test_a_prefix_without_a_name_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(PolicyError, match="names nothing"):
        opened(model, tmp_path, ANTHROPIC_API_KEY="k")


def test_replay_is_refused_for_now(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="not available yet"):
        opened("replay:x", tmp_path)


def test_a_missing_key_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of the process, not of the caller")
    with pytest.raises(ModelUnavailable, match="ANTHROPIC_API_KEY"):
        opened("anthropic:x", tmp_path, ANTHROPIC_API_KEY=" ")


@pytest.mark.parametrize("url", ["not a url", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ModelUnavailable, match="ANTHROPIC_BASE_URL"):
        opened("anthropic:x", tmp_path, ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=url)


def test_an_ollama_host_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="OLLAMA_HOST"):
        opened("ollama:x", tmp_path, OLLAMA_HOST="host:port")


@pytest.mark.parametrize(
    ("environ", "header"),
    [
        ({"ANTHROPIC_API_KEY": " key-1\n"}, "key-1"),
        ({"ANTHROPIC_AUTH_TOKEN": "token-1"}, "token-1"),
        ({"ANTHROPIC_API_KEY": "key-1", "ANTHROPIC_AUTH_TOKEN": "token-1"}, "key-1"),
    ],
)
async def test_anthropic_gets_one_credential_and_the_address_of_the_environment(
    tmp_path: Path, environ: dict[str, str], header: str
) -> None:
    async with WireServer() as server:
        server.answers.append(wire_anthropic.reply())
        provider = opened("anthropic:claude-x", tmp_path, ANTHROPIC_BASE_URL=server.url, **environ)
        assert provider.model == "anthropic:claude-x"
        await ask(provider)
        await provider.close()
        headers = server.requests[0].headers
    sent = [headers.get("x-api-key"), headers.get("authorization", "").removeprefix("Bearer ")]
    assert [value for value in sent if value] == [header]


@pytest.mark.parametrize(("key", "sent"), [({}, None), ({"OLLAMA_API_KEY": "key-1"}, "Bearer key-1")])
async def test_ollama_gets_its_host_and_key_from_the_environment(
    tmp_path: Path, key: dict[str, str], sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "of the process, not of the caller")
    async with WireServer() as server:
        server.answers.append(wire_ollama.reply())
        provider = opened("ollama:qwen:7b", tmp_path, OLLAMA_HOST=server.url.removeprefix("http://"), **key)
        assert provider.model == "ollama:qwen:7b"
        await ask(provider)
        await provider.close()
    assert server.requests[0].body["model"] == "qwen:7b"
    assert server.requests[0].headers.get("authorization") == sent


async def test_a_script_is_found_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("turns: [{say: hello}]")
    provider = opened("script:s.yaml", tmp_path)
    assert provider.model == "script:s.yaml"
    assert (await ask(provider)).text == "hello"
    with pytest.raises(PolicyError, match=r"missing\.yaml"):
        opened("script:missing.yaml", tmp_path)


def test_importing_the_registry_and_the_route_loads_no_sdk() -> None:
    code = (
        "import sys; import sandbox.models.registry, sandbox.models.route;"
        "print([m for m in ('anthropic', 'ollama', 'httpx', 'httpx2', 'genai_prices', 'yaml')"
        " if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
