"""Which environment variables change what a command line runs. Pure.

Refused are variables that name a program, a file of code or a search path that a shell, the loader, git,
make, npm or cargo will follow. What a file in the workspace can set by itself (a Makefile) gains
nothing from a variable, so language variables such as PYTHONPATH or NODE_OPTIONS are not refused.
"""

from __future__ import annotations

import re

from sandbox.policy.commands.shell import Word

_REFUSED = re.compile(
    r"PATH|BASH_ENV|ENV|SHELL|SHELLOPTS|BASHOPTS|BASH_.*|PS[0-4]|PROMPT_COMMAND|CDPATH|FPATH|ZDOTDIR|POSIXLY_CORRECT"
    r"|LD_.*|GCONV_PATH|LOCPATH|NLSPATH|RES_OPTIONS|LOCALDOMAIN|HOSTALIASES|GLIBC_TUNABLES|MALLOC_.*|TERMINFO.*"
    r"|GIT_.*|SSH_ASKPASS|SSH_.*COMMAND"
    r"|MAKEFILES|MAKEFLAGS|GNUMAKEFLAGS|MFLAGS|MAKE|MAKESHELL"
    r"|CARGO_(HOME|ALIAS_.*|BUILD_.*|TARGET_.*|CONFIG.*|UNSTABLE.*)|RUSTC|RUSTDOC|RUSTC_.*WRAPPER|RUSTC_WRAPPER"
    r"|LESSOPEN|LESSCLOSE|LESSEDIT|TAR_OPTIONS|RSYNC_RSH|RSYNC_CONNECT_PROG|CVS_RSH|TAPE"
    r"|DYLD_.*|FIGNORE|EXECIGNORE|HISTFILE|INPUTRC|HOSTFILE"
)
_NPM = re.compile(
    r"npm_config_(script[-_]shell|shell|git|node[-_]options|editor|viewer|userconfig|globalconfig)", re.I
)
_GIT_SAFE = re.compile(
    r"GIT_(AUTHOR|COMMITTER)_(NAME|EMAIL|DATE)|GIT_TERMINAL_PROMPT|GIT_OPTIONAL_LOCKS|GIT_MERGE_AUTOEDIT"
    r"|GIT_REFLOG_ACTION|GIT_ADVICE|GIT_LITERAL_PATHSPECS"
)
_PROGRAM = re.compile(r"PAGER|GIT_PAGER|MANPAGER|EDITOR|VISUAL|GIT_EDITOR|GIT_SEQUENCE_EDITOR|BROWSER")
_NO_PROGRAM = frozenset({"", "cat", "true", ":", "/bin/cat", "/usr/bin/cat", "/bin/true"})


def refused_variable(name: str, value: Word) -> str | None:
    """Say why this assignment is refused, as a clause after "because"; None when it is harmless."""
    if _GIT_SAFE.fullmatch(name):
        return None
    if _PROGRAM.fullmatch(name):
        if value.text in _NO_PROGRAM:
            return None
        return f"{name} names a program that other programs run; only cat, true or nothing is accepted"
    if _REFUSED.fullmatch(name) or _NPM.fullmatch(name):
        return f"{name} changes what other commands run; leave it as it is"
    return None
