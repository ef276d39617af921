"""Helpers of listed programs: the shipped tables, what a policy says instead, and how they chain."""

from __future__ import annotations

from sandbox.policy.commands.helper_programs import HELPERS, Helper, helpers_of


def programs(allowed: tuple[str, ...], declared: dict[str, tuple[str, ...]] | None = None) -> set[str]:
    return {helper.program for helper in helpers_of(allowed, declared or {})}


def test_a_program_that_needs_nothing_has_no_helpers() -> None:
    assert helpers_of(("ls", "./build.sh"), {}) == ()


def test_helpers_bring_their_own() -> None:
    assert {"rustc", "cc", "gcc", "collect2", "ld", "git", "/usr/lib/git-core/*"} <= programs(("cargo",))


def test_every_program_that_is_promised_has_a_table() -> None:
    assert {"npm", "cargo", "git", "make", "python", "pytest", "go"} <= HELPERS.keys()


def test_no_table_brings_a_way_out_or_an_interpreter_nobody_asked_for() -> None:
    for listed, interpreters in {"git": set(), "make": set(), "cargo": set(), "npm": {"node"}}.items():
        brought = programs((listed,))
        assert not brought & {"curl", "wget", "ssh", "nc", "sudo", "docker", "mount"}
        assert brought & {"perl", "python3", "node", "ruby"} == interpreters


def test_what_a_policy_declares_replaces_the_shipped_entry_of_that_program_only() -> None:
    assert programs(("make",), {"make": ("sh",)}) == {"sh"}
    assert programs(("make",), {"make": ("git",)}) == {"git", *programs(("git",))}
    assert programs(("make", "git"), {"make": ()}) == programs(("git",))
    assert programs(("./build.sh",), {"./build.sh": ("sed",)}) == {"sed"}


def test_a_helper_says_who_needs_it_and_who_said_so() -> None:
    assert helpers_of(("x",), {"x": ("y",), "y": ("x", "z")}) == (
        Helper("y", "x", is_declared=True),
        Helper("x", "y", is_declared=True),
        Helper("z", "y", is_declared=True),
    )
    assert not helpers_of(("pytest",), {})[0].is_declared
