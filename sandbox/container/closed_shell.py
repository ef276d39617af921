"""Work out what the kernel must grant so that a closed shell can run its programs and nothing else. Pure. D6

A program that is not listed can be neither executed nor read, for the dynamic loader runs whatever it can
read; everything else of the image stays readable. What would make the list a lie is refused: a listed program
that is many in one, a seccomp profile that leaves a way past path rules.
"""

from __future__ import annotations

import fnmatch
import json
import posixpath
from collections import defaultdict
from collections.abc import Iterator

from sandbox.container.image_index import MULTICALL, ImageIndex, follow, many_in_one, resolve
from sandbox.container.spec import HOME, PATH, WORKSPACE, ClosedShell
from sandbox.errors import ImageError, PolicyError
from sandbox.policy.commands.helper_programs import helpers_of
from sandbox.policy.model import ShellPolicy

WRITABLE = (WORKSPACE, "/dev", HOME, "/run", "/tmp", "/var/tmp")  # noqa: S108  # inside the container
"""``/dev`` holds the engine's harmless nodes and /dev/shm; the sandbox's user can make nothing in it."""
PSEUDO = ("/proc", "/sys")
HIDDEN = (*WRITABLE, *PSEUDO, "/.agent-runner")
"""What the image has there is covered by a mount of ours."""
MAX_PATHS = 4096
"""Most paths of one list: the guest has room for no more."""
PATHLESS_CALLS = ("memfd_create", "execveat")
"""System calls that run what has no path, which no path rule sees."""


def close_shell(
    index: ImageIndex, shell: ShellPolicy, command_shell: str, covered: tuple[str, ...]
) -> ClosedShell:
    """Compute the rules for an image. ``covered`` are the paths that the refusal program stands in for.

    ``command_shell`` runs the command lines, so it may always run. Raises ImageError when a listed program
    cannot be had without others, or when there are more rules than the guest has room for.
    """
    chosen = _Choice(index, frozenset(covered))
    chosen.add_path(command_shell)
    absent = _choose(chosen, shell)
    chosen.add_interpreters()
    _check_many_in_one(index, chosen, shell)
    programs = {*chosen.programs, *covered}
    executable = {path for path in programs if not _is_beneath(path, HIDDEN)}
    warnings = [f"shell.mode closed: image {index.image_id} has no {', '.join(absent)}"] if absent else []
    if shell.workspace_exec:
        executable.add(WORKSPACE)
        warnings.append(
            "shell.mode closed with workspace_exec: files made in the workspace may run, so the list of "
            "programs is a tripwire there; files and network are the wall"
        )
    rules = ClosedShell(
        tuple(sorted(executable)),
        tuple(sorted({*_readable(index, executable), *PSEUDO})),
        WRITABLE,
        tuple(warnings),
        index.links,
    )
    if (most := max(len(rules.executable), len(rules.readable))) > MAX_PATHS:
        raise ImageError(
            f"cannot close the shell in image {index.image_id}: it needs {most} rules and {MAX_PATHS} are "
            "possible; use an image with fewer programs, or shell.mode: open"
        )
    return rules


def is_executable(rules: ClosedShell, path: str, cwd: str = WORKSPACE) -> bool:
    """Whether the kernel would run the file that ``path`` names, as far as the image tells.

    Links of the image are followed, those made inside are not known here: for telemetry, not for deciding.
    """
    target = follow(rules.links, posixpath.join(cwd, path))
    return any(target == granted or target.startswith(f"{granted}/") for granted in rules.executable)


def check_seccomp(name: str, profile: str) -> None:
    """Raise PolicyError when a seccomp profile (JSON text) leaves open what a closed shell relies on."""
    permitted = {
        call
        for rule in json.loads(profile)["syscalls"]
        if rule["action"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY")
        for call in rule["names"]
    }
    if open_calls := [call for call in PATHLESS_CALLS if call in permitted]:
        raise PolicyError(
            f"cannot use shell.mode closed with seccomp profile {name}: it permits "
            f"{' and '.join(open_calls)}, by which a program runs without a path that a rule could see; "
            "refuse that there, or use shell.mode: open"
        )


class _Choice:
    """The programs that may run, by resolved path, and what called for each."""

    def __init__(self, index: ImageIndex, covered: frozenset[str]) -> None:
        self.programs: dict[str, str] = {}
        """Path to the name that it was chosen by."""
        self._index = index
        self._covered = covered
        self._by_pattern: set[str] = set()
        self._paths_by_name = defaultdict(list)
        for path in (*index.programs, *index.links):
            if not _is_beneath(path, HIDDEN):
                self._paths_by_name[posixpath.basename(path)].append(path)

    def add(self, entry: str) -> bool:
        """Choose every program of a name or path, which may hold ``*``; False when the image has none."""
        is_pattern = "*" in entry
        if "/" in entry:
            # As many slashes as the pattern: then no star can have reached into a directory.
            paths = [
                path
                for named in self._paths_by_name.values()
                for path in named
                if path.count("/") == entry.count("/") and fnmatch.fnmatchcase(path, entry)
            ]
        elif is_pattern:
            matching = fnmatch.filter(self._paths_by_name, entry)
            paths = [path for name in matching for path in self._paths_by_name[name]]
        else:
            paths = self._paths_by_name.get(entry, [])
        chosen = [self.add_path(path, entry, is_pattern=is_pattern) for path in paths]
        return any(chosen)

    def add_path(self, path: str, name: str = "", *, is_pattern: bool = False) -> bool:
        target = resolve(self._index, path)
        if target not in self._index.programs:
            return False
        if not is_pattern:
            self._by_pattern.discard(target)
        elif target not in self.programs:
            self._by_pattern.add(target)
        self.programs.setdefault(target, name or posixpath.basename(path))
        return True

    def add_interpreters(self) -> None:
        """Choose what the kernel starts each chosen program with, and what that is started with."""
        optional = {path for path in self._by_pattern if self._index.kinds.get(path) == "script"}
        todo = [path for path in self.programs if path not in optional]
        while todo:
            path = todo.pop()
            before = set(self.programs)
            for interpreter in self._interpreters(path):
                self.add_path(interpreter)
            todo += set(self.programs) - before
        # A pattern takes what there is: git's few Perl scripts must not bring Perl into every shell with git.
        for path in optional:
            needed = {resolve(self._index, interpreter) for interpreter in self._interpreters(path)}
            if not needed & self._index.programs.keys() <= self.programs.keys():
                del self.programs[path]

    def _interpreters(self, path: str) -> list[str]:
        """Paths of what a program is started with; ``#!/usr/bin/env NAME`` needs both."""
        line = self._index.interpreters.get(path, "")
        if not line or path in self._covered:
            return []
        if self._index.kinds.get(path) != "script":
            return [line]
        interpreter, _, argument = line.partition(" ")
        if posixpath.basename(interpreter) != "env":
            return [interpreter]
        words = argument.replace("\t", " ").split(" ")
        program = next((word for word in words if word and word[0] != "-" and "=" not in word), "")
        return [interpreter, *(posixpath.join(place, program) for place in PATH.split(":") if program)]


def _choose(chosen: _Choice, shell: ShellPolicy) -> list[str]:
    """Choose the listed programs and their helpers; returns what somebody listed and the image has not."""
    absent = []
    blocked = set(shell.blocked_commands)
    listed = [name for name in shell.allowed_binaries if name not in blocked]
    for name in listed:
        if not name.startswith("./") and not chosen.add(name):
            absent.append(name)
    for helper in helpers_of(tuple(listed), shell.helpers):
        if helper.program in blocked:
            continue
        if not chosen.add(helper.program) and helper.is_declared:
            absent.append(f"{helper.program} (helper of {helper.needed_by})")
    return absent


def _check_many_in_one(index: ImageIndex, chosen: _Choice, shell: ShellPolicy) -> None:
    """Refuse a program that is many, unless its own name is listed: nobody can run one of them alone."""
    helpers = helpers_of(shell.allowed_binaries, shell.helpers)
    accepted = {*shell.allowed_binaries, *(helper.program for helper in helpers)}
    many = many_in_one(index)
    for path in sorted(many.keys() & chosen.programs.keys()):
        # Where it is busybox under whatever name, busybox is what has to be listed.
        own_names = many[path] & MULTICALL or {posixpath.basename(path)}
        if not own_names & accepted:
            others = sorted(many[path] - accepted)
            raise ImageError(
                f"cannot close the shell in image {index.image_id}: {chosen.programs[path]} is {path}, "
                f"which is also {', '.join(others[:5])}{' and others' if len(others) > 5 else ''}; list "
                f"{' or '.join(sorted(own_names))} in shell.allowed_binaries to accept them all, or use an "
                "image with programs of their own"
            )


def _readable(index: ImageIndex, executable: set[str]) -> Iterator[str]:
    """Yield what covers every file but the programs that are not listed: whole directories where it can."""
    search_path = {resolve(index, directory) for directory in PATH.split(":")}
    withheld = {
        path
        for path in index.programs
        if path not in executable and not _is_beneath(path, HIDDEN) and _is_program(index, path, search_path)
    }
    mixed = {directory for path in withheld for directory in _parents(path)}
    todo = ["/"]
    while todo:
        directory = todo.pop()
        for name in index.beside.get(directory, ()):
            path = posixpath.join(directory, name)
            if path in HIDDEN or path in withheld or path in executable:
                continue
            if path in mixed:
                todo.append(path)
            else:
                yield path


def _is_program(index: ImageIndex, path: str, search_path: set[str]) -> bool:
    kind = index.kinds.get(path, "program")
    # A script elsewhere is as likely a module (pdb.py), which other code reads; it cannot be executed either.
    return kind == "program" or (kind == "script" and posixpath.dirname(path) in search_path)


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = posixpath.dirname(path)
        yield path


def _is_beneath(path: str, directories: tuple[str, ...]) -> bool:
    return any(path == directory or path.startswith(f"{directory}/") for directory in directories)
