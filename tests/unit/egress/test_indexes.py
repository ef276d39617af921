"""The real clients are asked wherever they are installed; their homes are made up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sandbox.egress.indexes import index_environment, resolve_package_indexes
from sandbox.errors import HostError
from sandbox.policy.hosts import invalid_patterns
from sandbox.policy.model import NetworkPolicy

# Where the clients are; nothing else of this machine's configuration.
CLIENTS = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull}
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_pip = pytest.mark.skipif(shutil.which("pip") is None, reason="pip is not on PATH")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not installed")


def places(names: list[str], environ: dict[str, str], home: Path) -> dict[str, tuple[int, ...]]:
    return {entry.host: entry.ports for entry in resolve_package_indexes(names, environ, home)}


@needs_pip
def test_pip_is_allowed_where_its_variables_and_files_point(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://files.test/simple\nextra-index-url = https://Extra.test:8443/a\n"
        "    file:///srv/local\n"
    )
    environ = {**CLIENTS, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    assert places(["pip"], environ, tmp_path) == {"files.test": (443,), "extra.test": (8443,)}
    environ["PIP_INDEX_URL"] = "http://variable.test/simple"
    assert places(["pip"], environ, tmp_path) == {"variable.test": (80,), "extra.test": (8443,)}
    assert index_environment(["pip"], environ, tmp_path) == {
        "PIP_INDEX_URL": "http://variable.test/simple",
        "PIP_EXTRA_INDEX_URL": "https://Extra.test:8443/a",
    }


@needs_pip
def test_pip_without_configuration_is_asked_for_its_default(tmp_path: Path) -> None:
    entries = resolve_package_indexes(["pip"], CLIENTS, tmp_path)
    assert len(entries) >= 1
    assert invalid_patterns(NetworkPolicy(allowlist=entries)) == ()
    assert index_environment(["pip"], CLIENTS, tmp_path)["PIP_INDEX_URL"].startswith("http")


@needs_npm
def test_npm_is_allowed_where_its_registries_are_and_no_workspace_can_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, home = tmp_path / "workspace", tmp_path / "home"
    workspace.mkdir()
    home.mkdir()
    (workspace / "package.json").write_text("{}")
    (workspace / ".npmrc").write_text("registry=https://attacker.test/\n")
    (home / ".npmrc").write_text("registry=https://npm.test/\n@corp:registry=https://corp.test:8443/\n")
    monkeypatch.chdir(workspace)
    assert places(["npm"], CLIENTS, home) == {"npm.test": (443,), "corp.test": (8443,)}
    assert index_environment(["npm"], CLIENTS, home) == {
        "npm_config_registry": "https://npm.test/",
        "npm_config_@corp:registry": "https://corp.test:8443/",
    }


def test_cargo_is_allowed_where_its_sources_and_registries_are(tmp_path: Path) -> None:
    (tmp_path / ".cargo").mkdir()
    (tmp_path / ".cargo" / "config.toml").write_text(
        '[source.default]\nreplace-with = "mirror"\n[source.mirror]\nregistry = "sparse+https://mirror.test/i/"\n'
        '[registries.my-corp]\nindex = "https://corp.test/index"\n'
    )
    assert places(["cargo"], CLIENTS, tmp_path) == {"mirror.test": (443,), "corp.test": (443,)}
    assert index_environment(["cargo"], CLIENTS, tmp_path) == {
        "CARGO_REGISTRIES_MY_CORP_INDEX": "https://corp.test/index"
    }


@needs_apt
def test_apt_is_asked_for_its_sources(tmp_path: Path) -> None:
    sources = tmp_path / "sources.list"
    sources.write_text("deb [trusted=yes] https://deb.test/debian stable main\n")
    settings = tmp_path / "apt.conf"
    settings.write_text(f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "{tmp_path}/none";\n')
    environ = {**CLIENTS, "APT_CONFIG": str(settings)}
    assert places(["apt"], environ, tmp_path) == {"deb.test": (443,)}
    assert index_environment(["apt"], environ, tmp_path) == {}


@pytest.mark.parametrize(
    ("names", "environ", "message"),
    [
        (["cargo"], CLIENTS, "names no index on a host"),
        (["pip"], {"PATH": ""}, "not installed"),
        (["gem"], CLIENTS, "only pip, npm, cargo and apt"),
        (["cargo"], {"CARGO_REGISTRIES_A_INDEX": "https://u:p@corp.test/i"}, "holds a credential"),
        (["cargo"], {"CARGO_REGISTRIES_A_INDEX": "https://127.1/i"}, "a.b.c.d"),
    ],
)
def test_what_cannot_be_resolved_is_refused_with_a_remedy(
    names: list[str], environ: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(HostError, match=message) as raised:
        resolve_package_indexes(names, environ, tmp_path)
    assert "u:p" not in str(raised.value)
    assert ":p@" not in str(raised.value)
