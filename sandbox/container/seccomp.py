"""Load a seccomp profile and refuse what the engine would weaken in silence. Applies nothing. D2

The format is Docker's. The engine ignores keys and system-call names that it does not know, drops
``listenerPath`` and ``flags`` on some releases, and takes a second comparison of one argument as *or*:
each would leave a profile weaker than it reads, so each is an error here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sandbox.digest import Digest, canonical_json, digest_bytes
from sandbox.errors import PolicyError, StateError
from sandbox.resources import shipped

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_PROFILE_BYTES_MAX = 1024 * 1024
_ARGUMENT_MAX = 2**53 - 1

# Refused, or hidden behind a pointer, any of these and the container cannot start, ends only by being
# killed, or spins: what runc calls after the filter is on (measured, with no-new-privileges), then what
# every process needs to end or to return from a signal.
_REQUIRED = frozenset(
    {"close", "execve", "fstatfs", "futex", "getdents64", "getrandom", "mprotect", "openat", "write"}
    | {"exit", "exit_group", "rt_sigreturn", "restart_syscall"}
)
PERMITTING = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")


@dataclass(frozen=True)
class SeccompProfile:
    """A profile that passed every check."""

    name: str
    """As the policy wrote it."""
    text: str
    """Canonical JSON (RFC 8785): what the engine is given and what the digest names."""
    digest: Digest


def load_seccomp(name: str, policy_source: Path | None) -> SeccompProfile:
    """Load a shipped profile (``agent``) or a file relative to the policy file (``./seccomp/mine.json``).

    A name without ``/`` and without ``.json`` is a shipped profile. ``policy_source`` is the policy file,
    or None for a policy that came from no file, which can name shipped profiles only.
    Raises PolicyError, one line, when the profile is absent, malformed or permits by default.
    """
    is_shipped = "/" not in name and not name.endswith(".json")
    path = _shipped_path(name) if is_shipped else _custom_path(name, policy_source)
    try:
        content = _read(path).decode("utf-8")
        text = canonical_json(json.loads(content, object_pairs_hook=_unique_keys))
        # The canonical form is judged, not the file: what was checked is what the engine gets.
        profile = _Profile.model_validate_json(text)
        if is_shipped:
            _check_every_rule_has_a_comment(profile)
    except ValidationError as exc:
        raise _refusal(name, _first_problem(exc)) from exc
    except OSError as exc:
        raise _refusal(name, f"{path}: {exc.strerror}") from exc
    except RecursionError as exc:
        raise _refusal(name, "nested too deeply for a profile") from exc
    except ValueError as exc:  # not UTF-8, not JSON, or our own findings
        raise _refusal(name, " ".join(str(exc).split())) from exc
    return SeccompProfile(name, text.decode("utf-8"), digest_bytes(text))


class _Part(BaseModel):
    """One block of a profile: frozen, and a key that the engine would ignore is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Argument(_Part):
    """One comparison; the kernel sees 64 bits, whatever the call's own type."""

    index: Annotated[int, Field(ge=0, le=5)]
    value: Annotated[int, Field(ge=0, le=_ARGUMENT_MAX)]
    """The mask, for MASKED_EQ."""
    valueTwo: Annotated[int, Field(ge=0, le=_ARGUMENT_MAX)] = 0  # noqa: N815 - the format's own key
    """What the masked argument must equal; without meaning for other comparisons."""
    op: Literal[
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ]

    @model_validator(mode="after")
    def _can_be_false_and_true(self) -> Self:
        if self.op == "SCMP_CMP_MASKED_EQ":
            if self.value == 0:
                raise ValueError("a mask of 0 matches every call; 'value' is the mask, 'valueTwo' the value")
            if self.valueTwo & ~self.value:
                raise ValueError(
                    f"valueTwo {self.valueTwo:#x} has bits outside the mask {self.value:#x}, so it never "
                    "matches; 'value' is the mask, 'valueTwo' the value"
                )
        return self


class _Condition(_Part):
    """When a rule counts; empty means always."""

    arches: tuple[str, ...] = ()
    caps: tuple[str, ...] = ()
    minKernel: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")] | None = None  # noqa: N815


class _Rule(_Part):
    """What happens to some calls."""

    names: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], ...], Field(min_length=1)]
    action: Literal[
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_LOG",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_TRAP",
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_KILL_PROCESS",
    ]
    # 0 would answer "done" for a call that never ran; above 4095 the kernel cuts it.
    errnoRet: Annotated[int, Field(ge=1, le=4095)] | None = None  # noqa: N815
    args: tuple[_Argument, ...] | None = None
    """All must match. Empty or missing: every call."""
    comment: str = ""
    includes: _Condition = _Condition()
    excludes: _Condition = _Condition()

    @model_validator(mode="after")
    def _means_what_it_says(self) -> Self:
        indexes = [argument.index for argument in self.args or ()]
        if len(indexes) != len(set(indexes)):
            raise ValueError(
                f"{self.names[0]}: one argument is compared twice, which the engine reads as 'or'; "
                "write one rule each"
            )
        if self.errnoRet is not None and self.action != "SCMP_ACT_ERRNO":
            raise ValueError(f"{self.names[0]}: errnoRet means nothing with {self.action}")
        return self


class _Architecture(_Part):
    """A native ABI, and no second one: i386 and x32 number the same calls differently and are less tested."""

    architecture: Literal["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]
    subArchitectures: Annotated[tuple[str, ...] | None, Field(max_length=0)] = ()  # noqa: N815


class _Profile(_Part):
    """A whole profile. ``flags``, ``listenerPath`` and ``defaultErrnoRet`` are not here on purpose."""

    comment: str = ""
    defaultAction: Literal[  # noqa: N815
        "SCMP_ACT_ERRNO", "SCMP_ACT_TRAP", "SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS"
    ]
    archMap: Annotated[tuple[_Architecture, ...], Field(min_length=1)]  # noqa: N815
    syscalls: Annotated[tuple[_Rule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _can_run_a_container(self) -> Self:
        permitted = {name for rule in self.syscalls if rule.action in PERMITTING for name in rule.names}
        if missing := sorted(_REQUIRED - permitted):
            raise ValueError(f"no container can start or end without {', '.join(missing)}; allow them")
        return self


def _shipped_path(name: str) -> Path:
    if name == "unconfined":
        raise _refusal(name, "no run goes without a profile; name one, or leave the key out for 'agent'")
    try:
        if not _NAME.fullmatch(name):
            raise _refusal(name, "not a profile name; a file is written as ./path/to/profile.json")
        return shipped(f"seccomp/{name}.json")
    except StateError as exc:
        have = ", ".join(sorted(path.stem for path in shipped("seccomp").glob("*.json")))
        raise _refusal(name, f"no such shipped profile; shipped are: {have}") from exc


def _custom_path(name: str, policy_source: Path | None) -> Path:
    if "\0" in name:
        raise _refusal(name, "a path cannot hold NUL")
    if Path(name).is_absolute():
        raise _refusal(name, "the path is absolute; put the profile beside the policy and name it from there")
    if policy_source is None:
        raise _refusal(name, "a path is relative to the policy file, and this policy came from none")
    return policy_source.parent / name


def _read(path: Path) -> bytes:
    # O_NONBLOCK and fstat on the open file: a FIFO put in the profile's place must not hang the start.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(_PROFILE_BYTES_MAX + 1)
    if len(content) > _PROFILE_BYTES_MAX:
        raise ValueError(f"{path} is larger than {_PROFILE_BYTES_MAX} bytes")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: whatever JSON holds
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, after in itertools.pairwise(keys) if key == after)
        raise ValueError(f"key {twice!r} appears twice in one object")
    return unique


def _check_every_rule_has_a_comment(profile: _Profile) -> None:
    for position, rule in enumerate(profile.syscalls):
        if not rule.comment.strip():
            raise ValueError(
                f"syscalls.{position} ({rule.names[0]}) has no comment; a rule says why it is there"
            )


def _first_problem(exc: ValidationError) -> str:
    error = exc.errors(include_url=False)[0]
    where = ".".join(str(part) for part in error["loc"]) or "profile"
    problem = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        problem = "unknown key, which the engine would ignore; remove it"
    elif error["type"] == "literal_error":
        problem = f"{error['input']!r} is refused; {problem[0].lower()}{problem[1:]}"
    return " ".join(f"{where}: {problem}".split())


def _refusal(name: str, obstacle: str) -> PolicyError:
    return PolicyError(f"cannot use seccomp profile {name!r}: {obstacle}")
