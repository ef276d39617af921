"""The rules of a closed shell, computed for small images: what may run, what may be read, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandbox.container.closed_shell import check_seccomp, close_shell, is_executable
from sandbox.container.seccomp import load_seccomp
from sandbox.container.spec import ClosedShell
from sandbox.errors import ImageError, PolicyError
from sandbox.policy.model import ShellPolicy
from tests.unit.container.test_image import ID, Tree
from tests.unit.container.test_program import elf

LOADER = "/usr/lib64/ld-linux.so.2"
PROGRAM = elf(LOADER)


def image(extra: Tree | None = None) -> Tree:
    tree = extra or Tree()
    for name in ("usr", "usr/bin", "usr/lib", "usr/lib/deep", "usr/lib64", "usr/share", "etc", "tmp", "home"):
        tree.folder(name)
    for name in ("bash", "git", "perl", "make", "cat"):
        tree.file(f"usr/bin/{name}", PROGRAM + name.encode())
    tree.file("usr/lib64/ld-linux.so.2", elf(""))
    tree.file("usr/lib/deep/hidden-tool", PROGRAM, 0o644)  # no executable bit: the loader does not care
    tree.file("usr/lib/deep/libx.so.1", elf(""), 0o644)
    tree.file("usr/lib/module.py", b"#!/usr/bin/perl\n", 0o755)
    tree.file("usr/share/data", b"data", 0o644).file("etc/passwd", b"", 0o644).file(
        "usr/bin/README", b"", 0o644
    )
    tree.file("tmp/perl", PROGRAM)
    return tree.symlink("bin", "usr/bin").symlink("usr/bin/sh", "bash").symlink("lib64", "usr/lib64")


def close(tree: Tree, *allowed: str, covered: tuple[str, ...] = (), **fields: Any) -> ClosedShell:
    fields = {"mode": "closed", "workspace_exec": False, "allowed_binaries": allowed, **fields}
    return close_shell(tree.index(), ShellPolicy(**fields), "/bin/bash", covered)


def readable(rules: ClosedShell, path: str) -> bool:
    granted = (*rules.readable, *rules.executable, *rules.writable)
    return any(path == rule or path.startswith(f"{rule}/") for rule in granted)


def test_only_what_is_listed_its_loader_and_the_command_shell_may_run() -> None:
    rules = close(image(), "cat")
    assert rules.executable == ("/usr/bin/bash", "/usr/bin/cat", LOADER)
    assert rules.warnings == ()


def test_a_program_that_is_not_listed_cannot_be_read_and_all_else_can() -> None:
    rules = close(image(), "cat")
    withheld = ("/usr/bin/perl", "/usr/bin/git", "/usr/lib/deep/hidden-tool")
    assert [path for path in withheld if readable(rules, path)] == []
    shown = (
        "/usr/share/data",
        "/etc/passwd",
        "/usr/bin/README",
        "/usr/lib/deep/libx.so.1",
        "/proc/self/status",
    )
    assert [path for path in (*shown, "/usr/lib/module.py", LOADER) if not readable(rules, path)] == []


def test_a_directory_without_programs_is_one_rule_and_none_holds_one_that_is_withheld() -> None:
    rules = close(image(), "cat")
    assert "/usr/share" in rules.readable
    assert not {"/", "/usr", "/usr/bin", "/usr/lib", "/usr/lib/deep"} & set(rules.readable)


def test_what_our_mounts_cover_is_not_the_images() -> None:
    rules = close(image(), "perl")
    assert "/tmp/perl" not in rules.executable
    assert "/tmp" in rules.writable


def test_a_script_brings_its_interpreter_through_env_too() -> None:
    tree = Tree().file("usr/bin/tool", b"#!/usr/bin/env -S perl -w\n").file("usr/bin/env", PROGRAM + b"env")
    assert {"/usr/bin/tool", "/usr/bin/env", "/usr/bin/perl"} <= set(close(image(tree), "tool").executable)


def with_git_scripts() -> Tree:
    tree = Tree().folder("usr/lib/git-core").file("usr/lib/git-core/git-mail", b"#!/usr/bin/perl\n")
    return image(tree.file("usr/lib/git-core/git-sub", b"#!/bin/sh\n"))


def test_a_script_taken_by_a_pattern_brings_no_interpreter_and_is_left_out() -> None:
    alone = close(with_git_scripts(), "git").executable
    assert "/usr/lib/git-core/git-sub" in alone
    assert not {"/usr/lib/git-core/git-mail", "/usr/bin/perl"} & set(alone)
    both = close(with_git_scripts(), "git", "perl").executable
    assert {"/usr/lib/git-core/git-mail", "/usr/bin/perl"} <= set(both)


def test_a_blocked_program_is_the_refusal_program_that_covers_it() -> None:
    rules = close(image(), "cat", "perl", covered=("/usr/bin/perl",), blocked_commands=("perl",))
    assert "/usr/bin/perl" in rules.executable  # it says why, and ends 126
    assert "/usr/bin/git" not in rules.executable


def test_a_pattern_does_not_reach_into_directories() -> None:
    rules = close(image(), "cat", helpers={"cat": ("/usr/lib/*", "/usr/*/perl")})
    assert "/usr/bin/perl" in rules.executable
    assert "/usr/lib/deep/hidden-tool" not in rules.executable


def test_what_was_asked_for_and_is_not_there_is_said() -> None:
    rules = close(image(), "npm", "cat", helpers={"cat": ("dog",)})
    assert rules.warnings == (f"shell.mode closed: image {ID} has no npm, dog (helper of cat)",)


def test_a_workspace_that_may_execute_is_granted_and_said() -> None:
    rules = close(image(), "cat", workspace_exec=True)
    assert "/workspace" in rules.executable
    assert "tripwire" in rules.warnings[0]


def with_busybox() -> Tree:
    tree = Tree().file("usr/bin/busybox", PROGRAM + b"BusyBox v1.35\0rm\0wget\0")
    return image(tree.symlink("usr/bin/rm", "busybox").hardlink("usr/bin/wget", "usr/bin/busybox"))


@pytest.mark.parametrize("name", ["rm", "wget"])
def test_a_program_that_is_many_is_refused_unless_its_own_name_is_listed(name: str) -> None:
    with pytest.raises(ImageError, match=r"list busybox in shell\.allowed_binaries"):
        close(with_busybox(), name)
    assert {"/usr/bin/busybox"} <= set(close(with_busybox(), "rm", "busybox").executable)
    assert "/usr/bin/busybox" not in close(with_busybox(), "cat").executable


def test_more_rules_than_the_guest_has_room_for_are_refused() -> None:
    tree = Tree()
    for number in range(4100):
        tree.file(f"usr/bin/data{number}", b"", 0o644)
    with pytest.raises(ImageError, match=r"it needs 41\d\d rules and 4096 are possible"):
        close(image(tree), "cat")


@pytest.mark.parametrize(
    ("path", "may_run"),
    [
        ("/bin/sh", True),
        ("/usr/bin/../bin/cat", True),
        ("/usr/bin/perl", False),
        ("/bin/perl", False),
        ("./built", True),
        ("../usr/bin/perl", False),
        ("/usr/bin/cat-", False),
        ("/tmp/x", False),
    ],
)
def test_a_path_is_judged_as_the_image_resolves_it(path: str, may_run: bool) -> None:
    assert is_executable(close(image(), "cat", workspace_exec=True), path) is may_run


def test_a_profile_that_permits_what_no_rule_sees_is_refused_and_the_shipped_one_is_not() -> None:
    shipped = load_seccomp("agent", None).text
    check_seccomp("agent", shipped)
    profile = json.loads(shipped)
    for call in ("memfd_create", "execveat"):
        wider = {**profile, "syscalls": [*profile["syscalls"], {"names": [call], "action": "SCMP_ACT_ALLOW"}]}
        with pytest.raises(PolicyError, match=f"it permits {call}, by which"):
            check_seccomp("./mine.json", json.dumps(wider))
