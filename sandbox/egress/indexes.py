"""Find the package indexes this machine's own clients use, so that a session may use the same. D5

The clients themselves are asked: they alone know how their files, variables and defaults combine. They
run in the root directory, never in a workspace, whose ``.npmrc`` could otherwise choose the hosts.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sandbox.errors import HostError
from sandbox.policy.hosts import Refusal, canonical_host
from sandbox.policy.model import HostEntry

_ASK_SECONDS = 30
_NO_VARIABLE = "#"


def resolve_package_indexes(
    names: Iterable[str], environ: Mapping[str, str], home: Path
) -> tuple[HostEntry, ...]:
    """Return an allowlist entry for every host that the named clients' indexes are on.

    ``names``: of ``pip``, ``npm``, ``cargo``, ``apt``. Local (``file:``) indexes have no host. Raises
    HostError when a client is absent, has no index on a host, or needs a credential for it: a
    credential never enters the container.
    """
    ports: dict[str, set[int]] = {}
    for name in names:
        urls = [url for url in _index_urls(name, environ, home).values() if _is_remote(url)]
        if not urls:
            raise HostError(
                f"cannot allow package index {name!r}: {name} on this machine names no index on a host; "
                f"configure one, or list the host in network.allowlist"
            )
        for url in urls:
            host, port = _place(name, url)
            ports.setdefault(host, set()).add(port)
    return tuple(HostEntry(host=host, ports=tuple(sorted(ports[host]))) for host in sorted(ports))


def index_environment(names: Iterable[str], environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the variables with which the same clients in the container use the same indexes.

    apt needs none: its sources are files of the image. Cargo takes named registries from variables, but
    reads a replacement of its default source from files only.
    """
    variables: dict[str, str] = {}
    for name in names:
        for key, url in _index_urls(name, environ, home).items():
            variable = key.partition("#")[0]
            if _is_remote(url) and not key.startswith(_NO_VARIABLE):
                _place(name, url)  # refuses credentials
                variables[variable] = f"{variables.get(variable, '')} {url}".strip()
    return variables


def _index_urls(name: str, environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return index URLs by the variable that would set each.

    ``VARIABLE#n`` is one of several in the same variable; a ``_NO_VARIABLE`` prefix says there is none.
    """
    match name:
        case "pip":
            return _pip_urls(environ, home)
        case "npm":
            return _npm_urls(environ, home)
        case "cargo":
            return _cargo_urls(environ, home)
        case "apt":
            # Also of repositories whose lists were never fetched, or were removed to save space.
            command = ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI)"]
            listed = _ask(command, environ, home)
            return {_NO_VARIABLE + url: url for url in listed.split()}
    raise HostError(f"cannot allow package index {name!r}: only pip, npm, cargo and apt are known")


def _pip_urls(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    # Variables win over files, as they do in pip.
    settings = re.findall(r"^(\S+)\.([a-z-]+)='(.*)'$", _ask(["pip", "config", "list"], environ, home), re.M)
    for section, key, value in sorted(settings, key=lambda setting: setting[0] == ":env:"):
        if section in ("global", "install", "download", ":env:") and key == "index-url":
            found["PIP_INDEX_URL"] = value
        if section in ("global", "install", "download", ":env:") and key == "extra-index-url":
            for at, url in enumerate(value.replace("\\n", " ").split()):
                found[f"PIP_EXTRA_INDEX_URL#{section}{at}"] = url
    if "PIP_INDEX_URL" not in found:
        words = " ".join(_ask(["pip", "install", "--help"], environ, home).split())
        default = re.search(r"--index-url <url> [^(]*\(default (\S+)\)", words)
        if default is None:
            raise HostError("cannot tell which index pip uses by default; set PIP_INDEX_URL")
        found["PIP_INDEX_URL"] = default[1]
    return found


def _npm_urls(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    try:
        settings = json.loads(_ask(["npm", "config", "list", "--json"], environ, home))
    except ValueError as exc:
        raise HostError("cannot read the registry of npm: its settings are not JSON; update npm") from exc
    return {
        f"npm_config_{key}": str(value)
        for key, value in settings.items()
        if key == "registry" or re.fullmatch(r"@[\w.-]+:registry", key)
    }


def _cargo_urls(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    directory = Path(environ.get("CARGO_HOME") or home / ".cargo")
    found = {name: url for name, url in environ.items() if re.fullmatch(r"CARGO_REGISTRIES_\w+_INDEX", name)}
    path = next((at for at in (directory / "config", directory / "config.toml") if at.is_file()), None)
    if path is None:
        return found
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise HostError(f"cannot read the configuration of cargo, {path}: {exc}") from exc
    for name, registry in settings.get("registries", {}).items():
        variable = f"CARGO_REGISTRIES_{re.sub(r'[^A-Za-z0-9]', '_', name).upper()}_INDEX"
        found.setdefault(variable, registry.get("index", ""))
    for name, source in settings.get("source", {}).items():
        found[f"{_NO_VARIABLE}{name}"] = source.get("registry", "")
    return found


def _ask(command: list[str], environ: Mapping[str, str], home: Path) -> str:
    program = shutil.which(command[0], path=environ.get("PATH"))
    if program is None:
        raise HostError(
            f"cannot allow package index {command[0]!r}: {command[0]} is not installed on this machine; "
            "install it, or list the host in network.allowlist"
        )
    try:
        answer = subprocess.run(
            [program, *command[1:]],
            # A wide terminal: help texts break long words.
            env={**environ, "HOME": str(home), "COLUMNS": "400"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostError(f"cannot ask {' '.join(command)} for its index: {exc}; run it by hand") from exc
    return answer.stdout


def _is_remote(url: str) -> bool:
    return urlsplit(url.removeprefix("sparse+")).scheme in ("http", "https")


def _place(name: str, url: str) -> tuple[str, int]:
    parts = urlsplit(url.removeprefix("sparse+"))
    if parts.username or parts.password:
        raise HostError(
            f"cannot allow package index {name!r}: its URL on {parts.hostname} holds a credential, which "
            "may not enter the container; use an index without one"
        )
    host = canonical_host((parts.hostname or "").encode("ascii", "replace"))
    if isinstance(host, Refusal):
        raise HostError(f"cannot allow package index {name!r}: {host.hint}; correct its URL")
    return host, parts.port or (443 if parts.scheme == "https" else 80)
