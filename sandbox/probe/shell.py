"""Derive which programs must run and which must not, under every name they can be given. Pure. D6"""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Iterator

from sandbox.container.image_index import ImageIndex, resolve
from sandbox.container.spec import PATH, WORKSPACE
from sandbox.policy.commands.helper_programs import helpers_of
from sandbox.policy.model import ShellPolicy
from sandbox.probe.model import Act, Probe

COVERED = frozenset(("refused", "EACCES", "EPERM", "ENOENT"))
COVER = "shell.blocked_commands, covered in the container"
CLOSED = "shell.mode: closed"
UNLISTED = (
    *("id", "env", "uname", "nproc", "tty", "whoami", "true", "logname", "arch", "hostid", "groups", "users"),
    *("cksum", "sum", "tac", "shuf", "factor", "tsort", "base32", "pinky"),
)
"""Programs that do nothing; the first that a closed policy does not list stands for all it does not list."""
INTERPRETERS = ("perl", "python3", "node", "ruby", "bash", "awk")
"""Programs that can do the work of any other: one that is not listed is tried as well."""


def shell_probes(shell: ShellPolicy, index: ImageIndex) -> tuple[Probe, ...]:
    """Return the probes of a shell policy on an image."""
    probes: list[Probe] = []
    for name in shell.allowed_binaries:
        probes.append(_allowed(shell, index, name))
    for name in shell.blocked_commands:
        probes += _blocked(shell, index, name)
    if shell.mode == "closed":
        probes += _helping(shell, index)
        probes += _unlisted(shell, index)
    return tuple(probes)


def find_program(index: ImageIndex, name: str) -> str | None:
    """Return the first path of a program along PATH, or None when the image does not have it."""
    for directory in PATH.split(":"):
        path = f"{directory}/{name}"
        if resolve(index, path) in index.programs:
            return path
    return None


def _allowed(shell: ShellPolicy, index: ImageIndex, name: str) -> Probe:
    def probe(act: Act, skip: str = "") -> Probe:
        control = f"shell.allowed_binaries[{name}]"
        return Probe(f"shell-allow-{_word(name)}", "shell", "allow", f"run {name}", control, act, skip=skip)

    if name in shell.blocked_commands:
        return probe(Act("run"), "shell.blocked_commands wins over this entry")
    if name.startswith("./"):
        return probe(Act("run"), "a program of the workspace, and the self-test has a workspace of its own")
    path = find_program(index, name)
    return probe(Act("run", (path, "--version"))) if path else probe(Act("run"), "not in the image")


def _blocked(shell: ShellPolicy, index: ImageIndex, name: str) -> Iterator[Probe]:
    word = f"shell-block-{_word(name)}"
    path = find_program(index, name)
    if path is None:
        yield Probe(word, "shell", "deny", f"run {name}", COVER, Act("run"), skip="not in the image")
        return
    yield from _ways(shell, index, word, name, path, COVER)
    content = index.programs[resolve(index, path)]
    others = (other for other, same in index.programs.items() if same == content)
    for number, other in enumerate(sorted({*others} - {resolve(index, path), path}), 1):
        yield Probe(f"{word}-name-{number}", "shell", "deny", f"run {name} as {other}", COVER,
                    Act("run", (other, "--version")), COVERED)  # fmt: skip


def _ways(
    shell: ShellPolicy, index: ImageIndex, word: str, name: str, path: str, control: str
) -> Iterator[Probe]:
    real = resolve(index, path)
    copied = f"{WORKSPACE}/.selftest-{word}"
    ways = [
        ("", f"run {path}", Act("run", (path, "--version"))),
        ("-root", f"run {name} through /proc/self/root", Act("run", (f"/proc/self/root{real}", "--version"))),
        ("-copy", f"run a copy of {name} under another name",
         Act("run-copy", (path, f"{copied}-copy", "--version"))),
        ("-copy-tmp", f"run a copy of {name} in /tmp",
         Act("run-copy", (path, f"/tmp/.selftest-{word}", "--version"))),  # noqa: S108
        ("-link", f"run {name} through a symbolic link of another name",
         Act("run-link", (path, f"{copied}-link", "--version"))),
        ("-shebang", f"run a script whose interpreter is {name}",
         Act("run-shebang", (path, f"{copied}-script"))),
    ]  # fmt: skip
    loader = _loader(index)
    if loader is not None:
        ways.append(
            ("-loader", f"run {name} with the dynamic loader", Act("run", (loader, real, "--version")))
        )
    if (sh := find_program(index, "sh")) and "sh" not in shell.blocked_commands:
        act = Act("run", (sh, "-c", 'exec "$0" --version', path))
        ways.append(("-shell", f"have a shell run {name}", act))
    is_python_listed = shell.mode == "open" or "python3" in shell.allowed_binaries
    if (
        is_python_listed
        and (python := find_program(index, "python3"))
        and "python3" not in shell.blocked_commands
    ):
        code = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        act = Act("run", (python, "-c", code, path, "--version"))
        ways.append(("-interpreter", f"have Python execute {name}", act))
    for kind, what, act in ways:
        yield Probe(f"{word}{kind}", "shell", "deny", what, control, act, COVERED)


def _helping(shell: ShellPolicy, index: ImageIndex) -> Iterator[Probe]:
    """One helper of each listed program, which must run although nobody listed it."""
    for name in shell.allowed_binaries:
        for helper in helpers_of((name,), shell.helpers):
            path = find_program(index, helper.program) if helper.program.isalnum() else None
            if path is None or helper.program in (*shell.allowed_binaries, *shell.blocked_commands):
                continue
            what = f"run {helper.program}, a helper of {name}"
            act = Act("run", (path, "--version"))
            yield Probe(f"shell-helper-{_word(name)}", "shell", "allow", what, f"shell.helpers[{name}]", act)
            break


def _unlisted(shell: ShellPolicy, index: ImageIndex) -> Iterator[Probe]:
    for kind, names in (("program", UNLISTED), ("interpreter", INTERPRETERS)):
        found = next((path for name in names if (path := _find_unlisted(shell, index, name))), None)
        if found is None:
            what, why = f"run a {kind} that is not listed", "the image has none that could stand for those"
            yield Probe(f"shell-unlisted-{kind}", "shell", "deny", what, CLOSED, Act("run"), skip=why)
        else:
            name = posixpath.basename(found)
            yield from _ways(shell, index, f"shell-unlisted-{_word(name)}", name, found, CLOSED)


def _find_unlisted(shell: ShellPolicy, index: ImageIndex, name: str) -> str | None:
    """Return the path of a program that no entry of a closed policy grants, under whatever name."""
    path = find_program(index, name)
    if path is None or name in shell.blocked_commands:
        return None
    granted = {*shell.allowed_binaries, "sh"}
    granted |= {helper.program for helper in helpers_of(shell.allowed_binaries, shell.helpers)}
    real = resolve(index, path)
    names = {path, *(link for link in index.links if resolve(index, link) == real), real}
    # The shell that runs the command lines is bash where sh is.
    shells = {resolve(index, one) for one in ("/bin/sh", "/usr/bin/sh", "/bin/bash", "/usr/bin/bash")}
    is_granted = real in shells or any(
        fnmatch.fnmatchcase(one if "/" in entry else posixpath.basename(one), entry)
        for one in names
        for entry in granted
    )
    return None if is_granted else path


def _loader(index: ImageIndex) -> str | None:
    found = [
        path
        for path in (*index.programs, *index.links)
        if fnmatch.fnmatch(posixpath.basename(path), "ld-linux*.so*")
        or fnmatch.fnmatch(posixpath.basename(path), "ld-musl-*.so*")
    ]
    usable = [path for path in found if resolve(index, path) in index.programs]
    return min(usable, key=len, default=None)


def _word(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name.removeprefix("./"))
