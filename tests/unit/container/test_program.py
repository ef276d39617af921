"""Programs, libraries and scripts told apart: hand-made heads, and files that a compiler made."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from sandbox.container.program import Start, read_start

SOURCE = "int main(void) { return 0; }\nint _start_;\n"


def compiled(directory: Path, *flags: str, name: str = "out") -> bytes:
    source = directory / "a.c"
    source.write_text(SOURCE)
    subprocess.run(["cc", *flags, str(source), "-o", str(directory / name)], check=True, capture_output=True)
    return (directory / name).read_bytes()


@pytest.mark.parametrize("flags", [(), ("-no-pie",)])
def test_a_dynamic_program_names_its_loader(tmp_path: Path, flags: tuple[str, ...]) -> None:
    start = read_start("perl", compiled(tmp_path, *flags))
    assert start.kind == "program"
    assert start.interpreter.startswith("/lib")
    assert "ld" in start.interpreter


@pytest.mark.parametrize("flags", [("-static",), ("-static-pie",)])
def test_a_static_program_is_one_although_it_names_no_loader(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert read_start("busybox", compiled(tmp_path, *flags)) == Start("program")


def test_a_shared_object_is_a_library_and_a_program_called_like_one_is_not(tmp_path: Path) -> None:
    library = compiled(tmp_path, "-shared", "-fPIC", "-Wl,-e,main")
    assert read_start("libz.so.1.2.13", library).kind == "library"
    assert read_start("addon.node", library).kind == "library"
    assert read_start("_ssl.cpython-311-x86_64-linux-gnu.so", library).kind == "library"
    program = compiled(tmp_path)
    assert read_start("tool.so", program).kind == "program"
    assert read_start("libc.so.6", program).kind == "library"  # it names a loader, to print its version


def test_an_object_file_is_no_program(tmp_path: Path) -> None:
    assert read_start("crt1.o", compiled(tmp_path, "-c")).kind == "library"


@pytest.mark.parametrize("cut", [4, 6, 20, 63, 70])
def test_an_elf_file_that_cannot_be_understood_counts_as_a_program(tmp_path: Path, cut: int) -> None:
    assert read_start("libx.so", compiled(tmp_path, "-shared", "-fPIC")[:cut]).kind == "program"


@pytest.mark.parametrize(
    ("head", "interpreter"),
    [
        (b"#!/bin/sh\nexit\n", "/bin/sh"),
        (b"#! /usr/bin/env  node \n", "/usr/bin/env  node"),
        (b"#!/usr/bin/perl -w", "/usr/bin/perl -w"),
        (b"#!/bin/sh" + b"x" * 300, "/bin/sh" + "x" * 247),
        (b"", ""),
        (b"echo\n", ""),
    ],
)
def test_a_script_names_what_follows_its_shebang(head: bytes, interpreter: str) -> None:
    assert read_start("a", head) == Start("script", interpreter)


def elf(interpreter: str) -> bytes:
    """The smallest head of a 64-bit shared object, with a loader or without."""
    path = interpreter.encode() + b"\0"
    segment = struct.pack("<IIQQQQQQ", 3 if interpreter else 1, 4, 120, 0, 0, len(path), len(path), 1)
    header = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return b"\x7fELF\2\1\1" + bytes(9) + header + segment + path


def test_the_hand_made_head_reads_as_it_was_made() -> None:
    assert read_start("x", elf("/lib/ld.so")) == Start("program", "/lib/ld.so")
    assert read_start("libx.so", elf("")) == Start("library")
