"""Tell from a file's first bytes whether it is a program, and what the kernel starts it with. Pure. D6

An ELF file needs no executable bit to be run: the dynamic loader runs any program it can read. So programs
are told from libraries here, and only libraries stay readable where a shell is closed.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal

ELF = b"\x7fELF"
SHEBANG_BYTES = 256
"""BINPRM_BUF_SIZE: the kernel reads no more of a script's first line."""

Kind = Literal["program", "library", "script"]
"""``library``: an ELF file that others load: shared objects, objects, the dynamic loader itself.
``script``: an executable file that is not ELF."""

_EXECUTABLE, _SHARED, _INTERPRETER = 2, 3, 3  # e_type ET_EXEC and ET_DYN; p_type PT_INTERP
_LIBRARY = re.compile(r".*\.(so|node)([.-][0-9][0-9.]*)?")
_STARTABLE_LIBRARY = re.compile(r"(lib|ld[-.]).*\.so([.-][0-9][0-9.]*)?")
"""Libraries that name a loader for themselves, to print their version: libc.so.6 is one."""


@dataclass(frozen=True)
class Start:
    """What a file is, as far as starting it goes."""

    kind: Kind
    interpreter: str = ""
    """The ELF interpreter's path, or what follows ``#!``; empty: the kernel needs nothing else."""


def read_start(name: str, head: bytes) -> Start:
    """Read the start of an executable or ELF file called ``name``; ``head`` is its first 64 KiB or more.

    An ELF file that cannot be understood counts as a program: those are the ones that get withheld.
    """
    if not head.startswith(ELF):
        return Start("script", _shebang(head))
    try:
        kind, entry, interpreter = _read_elf(head)
    except (struct.error, IndexError, KeyError):
        return Start("program")
    if kind == _EXECUTABLE:
        return Start("program", interpreter)
    if kind != _SHARED:
        return Start("library")
    # A static position-independent program names no loader either: it has a place to start, and no name of
    # a library.
    library = _STARTABLE_LIBRARY if interpreter else _LIBRARY
    if library.fullmatch(name) or not (interpreter or entry):
        return Start("library", interpreter)
    return Start("program", interpreter)


def _shebang(head: bytes) -> str:
    if not head.startswith(b"#!"):
        return ""
    line = head[2:SHEBANG_BYTES].split(b"\n", 1)[0]
    return line.decode("utf-8", "surrogateescape").strip(" \t")


def _read_elf(head: bytes) -> tuple[int, int, str]:
    """Return e_type, e_entry and the interpreter's path."""
    is_wide, order = {1: False, 2: True}[head[4]], {1: "<", 2: ">"}[head[5]]
    header = struct.unpack_from(order + ("HHIQQQIHHH" if is_wide else "HHIIIIIHHH"), head, 16)
    kind, entry, table, size, count = header[0], header[3], header[4], header[8], header[9]
    for at in range(table, table + size * count, size or 1):
        if is_wide:
            segment, _, offset, _, _, length = struct.unpack_from(order + "IIQQQQ", head, at)
        else:
            segment, offset, _, _, length = struct.unpack_from(order + "IIIII", head, at)
        if segment == _INTERPRETER:
            path = head[offset : offset + length].split(b"\0", 1)[0]
            return kind, entry, path.decode("utf-8", "surrogateescape")
    return kind, entry, ""
