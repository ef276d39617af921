"""Which further programs the programs of a closed shell cannot work without. Data, and its lookup. D6

An entry is a name, which may hold ``*``, or an absolute path, in which ``*`` stands for part of one name.
A helper that an image has not is no error: the tables serve many images. No entry grants more than its file:
what a helper starts needs an entry of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sandbox.policy.commands.programs import names

_SCRIPT_TOOLS = tuple(
    sorted(
        names(
            "sh [ awk basename cat chmod cmp comm cp cut date diff dirname echo env expr false find grep "
            "egrep fgrep head id install join ln ls mawk mkdir mkfifo mktemp mv nproc od paste printf pwd "
            "readlink realpath rm rmdir sed seq sleep sort split stat tail tee test touch tr true truncate "
            "tty uname uniq wc xargs"
        )
    )
)
"""What recipes and package scripts are written in: a shell, and programs that read and write files."""

_LINKER = ("as", "ld", "ld.*", "*-linux-*-as", "*-linux-*-ld", "*-linux-*-ld.*")
_COMPILER = (
    *("cc1", "cc1plus", "collect2", "lto1", "lto-wrapper", "g++-mapper-server"),
    *("*-linux-*-gcc", "*-linux-*-gcc-*", "*-linux-*-g++", "*-linux-*-g++-*"),
    *_LINKER,
)
_ARCHIVER = ("ar", "nm", "ranlib", "strip", "objcopy", "objdump", "*-linux-*-ar", "*-linux-*-ranlib")

HELPERS: Mapping[str, tuple[str, ...]] = {
    "git": (
        *("sh", "/usr/lib/git-core/*", "/usr/libexec/git-core/*"),
        # git's own shell scripts (submodule, merge tools) and its pager
        *("basename", "cat", "dirname", "sed", "tr", "uname", "wc", "less", "pager"),
    ),
    "make": _SCRIPT_TOOLS,
    "gmake": _SCRIPT_TOOLS,
    "npm": ("node", "npx", "node-gyp", *_SCRIPT_TOOLS),
    "npx": ("node", "npm", *_SCRIPT_TOOLS),
    "pytest": ("python3",),
    "py.test": ("python3",),
    "pip": ("python3",),
    "pip3": ("python3",),
    "python": ("python3", "python3.[0-9]", "python3.[0-9][0-9]"),
    "python3": ("python3.[0-9]", "python3.[0-9][0-9]"),
    "cargo": ("rustc", "rustdoc", "cargo-*", "rustfmt", "clippy-driver", "git", "cc", *_ARCHIVER),
    "rustc": ("cc", "rust-lld", "ld.lld", "gcc-ld", *_ARCHIVER),
    "rustdoc": ("rustc",),
    "cargo-clippy": ("clippy-driver",),
    "cargo-fmt": ("rustfmt",),
    "go": (
        *("/usr/lib/go*/bin/go", "/usr/local/go/bin/*", "gofmt", "git", "gcc", "g++"),
        *("/usr/lib/go*/pkg/tool/*/*", "/usr/local/go/pkg/tool/*/*", *_ARCHIVER),
    ),
    "cc": ("gcc", *_COMPILER),
    "gcc": ("gcc-*", *_COMPILER),
    "c++": ("g++", *_COMPILER),
    "g++": ("g++-*", *_COMPILER),
}  # fmt: skip
"""What each program is shipped with. An entry of ``shell.helpers`` replaces the entry of the same program."""


@dataclass(frozen=True)
class Helper:
    """One further program, and why."""

    program: str
    """As in the table: a name or an absolute path, perhaps with ``*``."""
    needed_by: str
    is_declared: bool
    """True: the policy asks for it. False: a shipped table does."""


def helpers_of(allowed: tuple[str, ...], declared: Mapping[str, tuple[str, ...]]) -> tuple[Helper, ...]:
    """Return the helpers of the allowed programs, their helpers' helpers included, each once.

    ``declared`` is ``shell.helpers``. A program of the workspace (``./path``) has helpers by that path.
    """
    found: dict[str, Helper] = {}
    todo = list(allowed)
    seen = set()
    while todo:
        program = todo.pop(0)
        if program in seen:
            continue
        seen.add(program)
        for helper in declared.get(program, HELPERS.get(program, ())):
            if helper not in found:
                found[helper] = Helper(helper, program, program in declared)
            todo.append(helper)
    return tuple(found.values())
