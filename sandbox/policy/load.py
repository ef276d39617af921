"""Find a policy file, read it, and say everything that is wrong with it. Reads files, nothing else. D10

Default deny: what a file does not say is not allowed. Nothing is guessed: an unknown key, a wrong type, a
pattern that cannot be enforced or a failing ``tests:`` entry refuses the whole file.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sandbox.errors import PolicyError
from sandbox.policy.check import check_policy
from sandbox.policy.documents import Document, ProfileMap
from sandbox.policy.model import Policy
from sandbox.policy.shape import describe_error
from sandbox.policy.source import MAX_BYTES, Place, Problem, Source, read_source
from sandbox.resources import shipped

DEFAULT_PROFILE = "production"


Model = TypeVar("Model", bound=BaseModel)


class InvalidPolicy(PolicyError):
    """A policy file that cannot be used. ``str()`` has one line per problem, each with its position."""

    def __init__(self, source: Path, problems: list[Problem]) -> None:
        self.source = source
        self.problems = tuple(sorted(set(problems), key=lambda problem: (problem.line, problem.column)))
        super().__init__("\n".join(problem.located(str(source)) for problem in self.problems))


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that may be used, and where it came from."""

    policy: Policy
    source: Path
    text: Source
    """The file's data with positions, for messages about it."""
    place: Place
    """Where the profile begins in the file: ``()`` for a full document."""
    warnings: tuple[Problem, ...] = ()

    def position(self, where: str) -> tuple[int, int]:
        """Return line and column of a dotted key of the policy, e.g. ``shell.allowed_binaries.2``."""
        keys: list[str | int] = [int(key) if key.isdigit() else key for key in where.split(".")]
        if not self.place and keys[0] in ("network", "filesystem", "shell"):
            keys.insert(0, "tool_surface")
        return self.text.key_position((*self.place, *keys))


def find_policy(
    path: Path | None, profile: str | None, working_dir: Path, workspace: Path | None = None
) -> Path:
    """Return the policy file to load.

    A file given is that file; a directory given holds ``PROFILE.yaml``. Else, in ``working_dir``:
    ``agent-policy/PROFILE.yaml``, then ``agent-policy.yaml``, then the shipped ``policy/PROFILE.yaml``.
    A file inside ``workspace`` is refused, never skipped: the agent's work must not choose its own policy,
    and nobody should get another policy than the one they see. Raises PolicyError.
    """
    name = profile or DEFAULT_PROFILE
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise PolicyError(f"cannot look for a policy named {name!r}: use letters, digits, '.', '_', '-'")
    if path is not None:
        return _given(path, profile)
    for candidate in (working_dir / "agent-policy" / f"{name}.yaml", working_dir / "agent-policy.yaml"):
        if _is_kind(candidate, Path.is_file):
            if workspace is not None and candidate.resolve().is_relative_to(workspace.resolve()):
                raise PolicyError(
                    f"refusing the policy {candidate}: it lies inside the workspace {workspace}, where the "
                    "agent's work could choose it; name it with --policy"
                )
            return candidate
    directory = shipped("policy")
    candidate = directory / f"{name}.yaml"
    if _is_kind(candidate, Path.is_file):
        return candidate
    known = ", ".join(sorted(file.stem for file in directory.glob("*.yaml")))
    raise PolicyError(
        f"cannot find a policy for profile {name!r}: no agent-policy/{name}.yaml or agent-policy.yaml in "
        f"{working_dir}, and the shipped profiles are {known}; name a file with --policy"
    )


def load_policy(path: Path, profile: str | None = None) -> LoadedPolicy:
    """Load one profile of a policy file, run its ``tests:``, and refuse it whole when anything is wrong.

    ``profile`` None picks a full document as it is; in a profile map the only profile, else
    ``production``. Raises InvalidPolicy with every problem, or PolicyError when the file cannot be read.
    """
    source = read_source(_read(path))
    if source.problems:
        raise InvalidPolicy(path, source.problems)
    loaded = _from_data(path, source, profile)
    problems = check_policy(loaded.policy, loaded.position)
    if problems:
        raise InvalidPolicy(path, problems)
    return loaded


def profile_names(path: Path) -> tuple[str, ...]:
    """Return the profiles a readable file holds; a full document has one. Raises as ``load_policy``."""
    source = read_source(_read(path))
    if source.problems:
        raise InvalidPolicy(path, source.problems)
    if isinstance(source.data, dict) and isinstance(source.data.get("profiles"), dict):
        return tuple(source.data["profiles"])
    metadata = source.data.get("metadata") if isinstance(source.data, dict) else None
    return (_document_name(path, metadata if isinstance(metadata, dict) else {}),)


def _given(path: Path, profile: str | None) -> Path:
    if not _is_kind(path, Path.is_dir):
        return path
    candidate = path / f"{profile or DEFAULT_PROFILE}.yaml"
    if _is_kind(candidate, Path.is_file):
        return candidate
    known = ", ".join(sorted(file.stem for file in path.glob("*.yaml"))) or "none"
    raise PolicyError(f"cannot find {candidate.name} in {path}: there are {known}; choose with --profile")


def _is_kind(path: Path, is_kind: Callable[[Path], bool]) -> bool:
    """Ask of what kind a path is; one that may not be looked at is refused, since it may be the policy."""
    try:
        return is_kind(path)
    except PermissionError as exc:
        raise PolicyError(
            f"cannot look for a policy at {path}: {exc.strerror}; make it readable for yourself"
        ) from exc


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PolicyError(f"cannot read policy {path}: it is not a regular file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise PolicyError(f"cannot read policy {path}: there is no such file") from exc
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise PolicyError(f"cannot read policy {path}: {reason}") from exc


def _from_data(path: Path, source: Source, profile: str | None) -> LoadedPolicy:
    if not isinstance(source.data, dict):
        raise InvalidPolicy(path, [Problem(1, 1, "a policy is a mapping: 'profiles:' or 'version:'")])
    if "profiles" in source.data:
        profiles = _validate(ProfileMap, path, source)
        name = _choose(path, tuple(profiles.profiles), profile)
        policy = profiles.profiles[name].as_policy(name, profiles.version, profiles.metadata)
        return LoadedPolicy(policy, path, source, ("profiles", name), _warnings(source, policy, None))
    document = _validate(Document, path, source)
    name = _choose(path, (_document_name(path, document.metadata),), profile)
    policy = document.as_policy(name)
    return LoadedPolicy(policy, path, source, (), _warnings(source, policy, path.stem))


def _validate(model: type[Model], path: Path, source: Source) -> Model:
    """Validate as JSON: strict, but with lists where JSON has lists."""
    try:
        return model.model_validate_json(json.dumps(source.data))
    except ValidationError as exc:
        problems = [
            describe_error(model, source, error["loc"], error["type"], error.get("ctx") or {}, error["input"])
            for error in exc.errors(include_url=False)
        ]
        raise InvalidPolicy(path, problems) from exc


def _document_name(path: Path, metadata: dict[str, Any]) -> str:
    environment = metadata.get("environment")
    return environment if isinstance(environment, str) and environment else path.stem


def _choose(path: Path, names: tuple[str, ...], profile: str | None) -> str:
    if profile is None:
        if len(names) == 1:
            return names[0]
        if DEFAULT_PROFILE in names:
            return DEFAULT_PROFILE
        raise PolicyError(f"cannot choose a profile in {path}: it has {', '.join(names)}; use --profile")
    if profile in names:
        return profile
    near = difflib.get_close_matches(profile, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PolicyError(f"unknown profile {profile!r} in {path}: it has {', '.join(names)}{hint}")


def _warnings(source: Source, policy: Policy, stem: str | None) -> tuple[Problem, ...]:
    found = []
    if stem not in (None, policy.name):
        position = source.key_position(("metadata", "environment"))
        found.append(Problem(*position, f"profile {policy.name!r} stands in a file named {stem!r}"))
    return tuple(found)
