"""What is known about programs: data only. Used to unwrap commands and to explain what a block can mean."""

from __future__ import annotations

import re
from dataclasses import dataclass


def names(text: str) -> frozenset[str]:
    """Read a set of names separated by blanks."""
    return frozenset(text.split())


HARMLESS_BUILTINS = names(
    "cd pwd pushd popd dirs echo printf test [ true false : read wait exit return shift break continue "
    "local export readonly declare typeset unset set type umask getopts times ulimit"
)
"""Shell builtins that may be named without being listed: they start no program and reach nothing new.
``exec``, ``command``, ``builtin``, ``eval``, ``trap`` and ``time`` are judged by what they run."""

NAMING_BUILTINS = names("read local export readonly declare typeset unset getopts printf")
"""Builtins that set variables by name: the names are judged, and must be known."""

REFUSED_BUILTINS: dict[str, str] = {
    "source": "it runs a file inside the shell; run the file as a program instead",
    ".": "it runs a file inside the shell; run the file as a program instead",
    "alias": "it changes what later names mean",
    "unalias": "it changes what later names mean",
    "enable": "it changes which builtins exist, and can load code",
    "hash": "it changes what a name runs",
    "shopt": "it changes how the rest of the line is read",
    "let": "it evaluates text as an expression; use $((...))",
    "mapfile": "it can run a callback; use a while-read loop",
    "readarray": "it can run a callback; use a while-read loop",
    "bind": "it binds commands to keys",
    "complete": "it registers commands for completion",
    "compgen": "it can run a command",
    "jobs": "with -x it runs a command",
    "fc": "it runs commands from the history",
    "history": "there is no history in a sandboxed shell",
}

RESERVED_WORDS = names(
    "if then else elif fi do done case esac while until for select function { } [[ ]] ! in"
)

SHELLS = names("sh bash dash ash rbash zsh ksh mksh lksh pdksh yash")
OTHER_SHELLS = names("fish csh tcsh nu elvish pwsh xonsh rc es")
"""Shells with another grammar: what they are given cannot be judged."""

STANDARD_DIRECTORIES = frozenset(
    {"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"}
)
"""A program named by a path in these is judged by its last part."""

LOADER = re.compile(r"ld(-linux|-musl|-uClibc|64)?([-.].*)?\.so(\..*)?|ld\.so|ld-musl-.*")
"""Names of the dynamic loader, which runs any file it is given."""

LAUNCHERS: dict[str, str] = {
    "git": "hooks, aliases, filters and pagers from the repository's configuration",
    "make": "every recipe of a Makefile",
    "gmake": "every recipe of a Makefile",
    "ninja": "every rule of a build file",
    "cmake": "custom commands and -E",
    "npm": "package scripts and lifecycle hooks",
    "npx": "any package's program",
    "pnpm": "package scripts and lifecycle hooks",
    "yarn": "package scripts and lifecycle hooks",
    "cargo": "build scripts, runners and subcommands",
    "go": "go run, go generate and toolexec",
    "gradle": "tasks that execute programs",
    "mvn": "plugins that execute programs",
    "pip": "setup scripts of packages",
    "pip3": "setup scripts of packages",
    "pytest": "test code, which is any code",
    "tox": "commands of its configuration",
    "find": "-exec; and -delete removes files by itself",
    "env": "the command after its assignments",
    "xargs": "the command it is given",
    "parallel": "the command it is given",
    "sudo": "the command it is given",
    "doas": "the command it is given",
    "sh": "any command line or script",
    "bash": "any command line or script",
    "dash": "any command line or script",
    "zsh": "any command line or script",
    "busybox": "its own version of many programs",
    "toybox": "its own version of many programs",
    "python": "any code: os, subprocess, sockets",
    "python3": "any code: os, subprocess, sockets",
    "node": "any code: fs, child_process, sockets",
    "deno": "any code",
    "bun": "any code",
    "perl": "any code: system, unlink, sockets",
    "ruby": "any code: system, File, sockets",
    "php": "any code",
    "lua": "any code: os.execute, os.remove",
    "tclsh": "any code: exec, file delete",
    "java": "any code",
    "awk": "system(), and pipes in print and getline",
    "gawk": "system(), and pipes in print and getline",
    "mawk": "system(), and pipes in print and getline",
    "sed": "the e command (GNU)",
    "vi": "shell escapes",
    "vim": "shell escapes",
    "nano": "its spell checker",
    "emacs": "shell commands and Lisp",
    "ed": "shell escapes",
    "less": "shell escapes and LESSOPEN",
    "man": "its pager",
    "gdb": "shell escapes and Python",
    "tar": "checkpoint actions and compress programs",
    "rsync": "the remote shell it is given",
    "ssh": "ProxyCommand and remote commands",
    "gcc": "its subprograms and -wrapper",
    "cc": "its subprograms and -wrapper",
}
"""Programs that run others, or any code, by design; and by what."""


@dataclass(frozen=True)
class Work:
    """Something that many programs can do, so that blocking some of them does not keep it from being done."""

    what: str
    programs: frozenset[str]
    """Blocking one of these is often meant to keep the work from being done."""
    able: tuple[str, ...]
    """All that can do it, the likeliest first; with options, scripts or builtins of their own."""
    wall: str
    """What holds against the work itself, whoever does it."""


_ANY_CODE = (
    *("python", "python3", "pytest", "node", "npm", "npx"),
    *("perl", "ruby", "php", "lua", "java", "deno", "bun"),
)
_ANY_BUILD = ("cargo", "go", "gcc", "cc", "rustc")

WORKS: tuple[Work, ...] = (
    Work(
        "open connections",
        names("curl wget nc ncat netcat socat telnet ssh scp sftp ftp rsync aria2c http openssl ping"),
        (*("curl", "wget", "git"), *_ANY_CODE, "pip", "pip3", *_ANY_BUILD,
         *("ssh", "scp", "nc", "socat", "openssl", "rsync", "bash", "gawk", "busybox")),
        "the network policy",
    ),
    Work(
        "remove files",
        names("rm rmdir unlink shred truncate"),
        ("git", "find", *_ANY_CODE, "make", *_ANY_BUILD,
         *("rm", "unlink", "rsync", "busybox", "shred", "truncate", "mv", "sed", "dd", "tar")),
        "the workspace's overlay",
    ),
    Work(
        "write and replace files",
        names("cp mv dd install tee ln sed"),
        ("git", *_ANY_CODE, "make", *_ANY_BUILD,
         *("cp", "mv", "dd", "install", "tee", "sed", "tar", "sh", "bash")),
        "the workspace's overlay",
    ),
    Work(
        "change permissions",
        names("chmod chown chgrp"),
        (*_ANY_CODE, *_ANY_BUILD, "chmod", "install", "git", "tar", "busybox"),
        "the workspace's overlay",
    ),
    Work(
        "send signals",
        names("kill killall pkill"),
        (*_ANY_CODE, *_ANY_BUILD, "sh", "bash", "dash", "zsh", "busybox", "timeout"),
        "that a command can signal its own processes only",
    ),
    Work(
        "run command lines",
        names("sh bash dash ash zsh ksh"),
        ("sh", "bash", "dash", "zsh", "make", *_ANY_CODE, "git", "busybox"),
        "what the container may reach at all: its files and the network policy",
    ),
    Work(
        "run any code",
        names("python python3 perl node ruby php lua gcc cc"),
        (*_ANY_CODE, *_ANY_BUILD, "sh", "bash", "awk", "gawk"),
        "what the container may reach at all: its files and the network policy",
    ),
)  # fmt: skip
"""What a block can be meant to prevent, and who else can do it."""
