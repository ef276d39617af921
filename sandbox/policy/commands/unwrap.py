"""Find what a command really runs: wrappers peeled, scripts taken out, options that start programs refused.

Pure. Everything here fails closed: an option that is not known, or a word that is only known at run time
where an option or a program could stand, is refused, because it could turn the command into another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sandbox.policy.commands.exec_options import judge_exec_options, judge_make
from sandbox.policy.commands.git_options import judge_git
from sandbox.policy.commands.invocation import UnknownOption, read_invocation
from sandbox.policy.commands.payload import UNKNOWN, Payload, Refused, Unwrapped, Words, dynamic
from sandbox.policy.commands.programs import LOADER, OTHER_SHELLS, REFUSED_BUILTINS, SHELLS, names
from sandbox.policy.commands.shell import Assignment, Word


def unwrap(name: str, arguments: Words) -> Unwrapped:
    """Say what a program does with its arguments as far as starting others goes.

    ``name`` is the program without its directory, ``arguments`` are the words after it.
    """
    if LOADER.fullmatch(name):
        return Refused(
            "shell.loader", "the dynamic loader runs any file it is given; name the program itself"
        )
    if name in REFUSED_BUILTINS:
        rule = "shell.source" if name in ("source", ".") else "shell.builtin"
        return Refused(rule, REFUSED_BUILTINS[name])
    if name in OTHER_SHELLS:
        return Refused("shell.dynamic_program", "its command language cannot be judged; use sh or bash")
    if name in SHELLS:
        return _shell(arguments)
    if name in _SIMPLE:
        return _simple(name, arguments)
    if name in _SPECIAL:
        return _SPECIAL[name](arguments)
    if name == "git":
        return judge_git(arguments)
    if name in ("make", "gmake"):
        return judge_make(arguments)
    return judge_exec_options(name, arguments)


@dataclass(frozen=True)
class _Wrapper:
    """Options of a wrapper whose payload is everything after them."""

    flags: str = ""
    """Short options without a value."""
    values: str = ""
    """Short options with a value, attached or in the next word."""
    long_flags: frozenset[str] = frozenset()
    long_values: frozenset[str] = frozenset()
    operands: int = 0
    """Words between the options and the command."""
    takes_assignments: bool = False
    is_transparent: bool = True
    number_option: bool = False
    """``nice -10`` counts as an option."""


_SIMPLE: dict[str, _Wrapper] = {
    "env": _Wrapper("i0v", "uC", frozenset({"ignore-environment", "null", "debug", "version", "help"}),
                    frozenset({"unset", "chdir"}), takes_assignments=True),
    "nohup": _Wrapper(long_flags=frozenset({"help", "version"})),
    "setsid": _Wrapper("cfw", long_flags=frozenset({"ctty", "fork", "wait", "help", "version"})),
    "nice": _Wrapper("", "n", frozenset({"help", "version"}), frozenset({"adjustment"}), number_option=True),
    "ionice": _Wrapper("t", "cnpPu", frozenset({"ignore"}), frozenset({"class", "classdata"})),
    "timeout": _Wrapper("vfp", "ks", frozenset({"preserve-status", "foreground", "verbose", "help"}),
                        frozenset({"kill-after", "signal"}), operands=1),
    "stdbuf": _Wrapper("", "ioe", frozenset({"help"}), frozenset({"input", "output", "error"})),
    "time": _Wrapper("pvaq", "of", frozenset({"portability", "verbose", "append", "quiet"}),
                     frozenset({"output", "format"})),
    "coproc": _Wrapper(),
    "builtin": _Wrapper(),
    "exec": _Wrapper("cl", "a"),
    "chrt": _Wrapper("abfiorv", "TPD", operands=1, is_transparent=False),
    "taskset": _Wrapper("ac", "", frozenset({"all-tasks", "cpu-list"}), operands=1, is_transparent=False),
    "sudo": _Wrapper("AbEHnPSkK", "CgpRrtTuDh", frozenset({"preserve-env", "non-interactive", "background",
                     "set-home", "reset-timestamp"}), frozenset({"user", "group", "prompt", "chdir"}),
                     takes_assignments=True, is_transparent=False),
    "doas": _Wrapper("nL", "uC", is_transparent=False),
}  # fmt: skip

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


def _simple(name: str, words: Words) -> Unwrapped:
    spec = _SIMPLE[name]
    index = _skip_options(name, spec, words)
    if isinstance(index, Refused):
        return index
    assignments: list[Assignment] = []
    while spec.takes_assignments and index < len(words):
        if (text := words[index].text) is None:
            split = re.fullmatch(r"([A-Za-z_]\w*)=.*", words[index].prefix, re.DOTALL)
            if split is None:
                return dynamic(words[index])
            assignments.append(Assignment(split[1], Word(None, words[index].raw)))
            index += 1
            continue
        matched = _ASSIGNMENT.fullmatch(text)
        if matched is None:
            if "=" in text:
                return Refused("shell.environment", f"{text.split('=')[0]!r} is not a variable name")
            break
        assignments.append(Assignment(matched[1], Word(matched[2], matched[2])))
        index += 1
    for word in words[index : index + spec.operands]:
        if word.text is None and (word.may_be_option or word.may_split):
            return dynamic(word)
    payload = tuple(words[index + spec.operands :])
    commands = (payload,) if payload else ()
    return Payload(commands, assignments=tuple(assignments), is_transparent=spec.is_transparent)


def _skip_options(name: str, spec: _Wrapper, words: Words) -> int | Refused:
    """Return where the operands begin."""
    index = 0
    while index < len(words):
        word = words[index]
        if word.text is None:
            if word.may_be_option:
                return dynamic(word)
            return index
        text = word.text
        if text == "--":
            return index + 1
        if text == "-" and name == "env":
            index += 1
            continue
        if not text.startswith("-") or text == "-":
            return index
        if spec.number_option and re.fullmatch(r"-[-+]?\d+", text):
            index += 1
            continue
        if text.startswith("--"):
            option, equals, _ = text[2:].partition("=")
            if option in spec.long_flags or (equals and option in spec.long_values):
                index += 1
                continue
            if option in spec.long_values:
                index += 2
                continue
            return Refused(
                "shell.wrapper_option", f"the option {text!r} of {name} is not one that is understood"
            )
        step = _short_cluster(text[1:], spec)
        if step == 0:
            return Refused(
                "shell.wrapper_option", f"the option {text!r} of {name} is not one that is understood"
            )
        if step == 2 and index + 1 < len(words) and words[index + 1].may_split:
            return dynamic(words[index + 1])
        index += step
    return index


def _short_cluster(letters: str, spec: _Wrapper) -> int:
    """Return how many words a cluster of short options takes; 0 when a letter is not known."""
    for position, letter in enumerate(letters):
        if letter in spec.values:
            return 1 if position + 1 < len(letters) else 2
        if letter not in spec.flags:
            return 0
    return 1


def _shell(words: Words) -> Unwrapped:
    """``sh -c TEXT``: the text is parsed. Commands on standard input cannot be seen, so they are refused."""
    try:
        called = read_invocation([word.text for word in words])
    except UnknownOption as exc:
        return Refused("shell.wrapper_option", str(exc))
    match called.kind:
        case "dynamic":
            return dynamic(words[called.index])
        case "text":
            return Payload(scripts=(words[called.index].text or "",))
        case "input":
            return Refused(
                "shell.dynamic_program",
                "commands on standard input cannot be judged; give them with -c or as a file",
            )
        case "file" | "nothing":
            return Payload()


def _command(words: Words) -> Unwrapped:
    """``command [-p] NAME``; with -v or -V it only looks a name up."""
    index = 0
    while index < len(words) and words[index].text in ("-p", "--", "-v", "-V", "-pv", "-pV"):
        if words[index].text not in ("-p", "--"):
            return Payload(is_transparent=True)
        index += 1
    rest = tuple(words[index:])
    return Payload((rest,) if rest else (), is_transparent=True)


def _eval(words: Words) -> Unwrapped:
    texts = [word.text for word in words]
    for word in words:
        if word.text is None:
            return dynamic(word)
    return Payload(
        scripts=(" ".join(text for text in texts if text is not None),),
        is_transparent=True,
        knows_functions=True,
    )


def _trap(words: Words) -> Unwrapped:
    rest = list(words)
    while rest and rest[0].text in ("-p", "-l", "--"):
        if rest[0].text in ("-p", "-l"):
            return Payload(is_transparent=True)
        rest.pop(0)
    if len(rest) < 2 or rest[0].text in ("-", ""):
        return Payload(is_transparent=True) if all(w.text is not None for w in rest) else dynamic(rest[0])
    if rest[0].text is None:
        return dynamic(rest[0])
    return Payload(scripts=(rest[0].text,), is_transparent=True, knows_functions=True)


_XARGS = _Wrapper(
    "0rtpxo",
    "aEILnPsd",
    # The value of --replace, --eof and --max-lines can only be attached: the next word is the command.
    names("null no-run-if-empty verbose interactive exit open-tty show-limits replace eof max-lines"),
    names("arg-file delimiter eof replace max-lines max-args max-procs max-chars process-slot-var"),
)


def _xargs(words: Words) -> Unwrapped:
    """The command gets words from standard input: appended, or in place of a mark."""
    index = _skip_options("xargs", _XARGS, words)
    if isinstance(index, Refused):
        return index
    options = [word.text or "" for word in words[:index]]
    mark = _replace_mark(options)
    if isinstance(mark, Refused):
        return mark
    payload = tuple(words[index:])
    if not payload:
        return Payload()
    if mark is None:
        return Payload(((*payload, UNKNOWN),))
    return Payload((_with_placeholder(payload, mark, prefix=""),))


def _replace_mark(options: list[str]) -> str | Refused | None:
    for position, text in enumerate(options):
        if text.startswith("--replace"):
            return text.partition("=")[2] or "{}"
        if text.startswith("-") and not text.startswith("--"):
            for offset, letter in enumerate(text[1:], start=1):
                if letter == "I":
                    mark = text[offset + 1 :] or (
                        options[position + 1] if position + 1 < len(options) else ""
                    )
                    return mark or Refused("shell.wrapper_option", "xargs -I needs a mark")
                if letter in _XARGS.values:
                    break
    return None


def _with_placeholder(words: Words, mark: str, prefix: str) -> tuple[Word, ...]:
    """Turn words that hold the mark into words only known at run time."""
    return tuple(
        word
        if word.text is None or mark not in word.text
        else Word(None, word.raw, prefix=(word.text.split(mark)[0] or prefix))
        for word in words
    )


_FIND_EXEC = frozenset({"-exec", "-execdir", "-ok", "-okdir"})


def _find(words: Words) -> Unwrapped:
    commands: list[tuple[Word, ...]] = []
    index = 0
    while index < len(words):
        word = words[index]
        if word.text is None and word.may_be_option:
            return dynamic(word)
        if word.text in ("-files0-from", "-fprint", "-fprintf", "-fls", "-fprint0"):
            index += 2
            continue
        if word.text not in _FIND_EXEC:
            index += 1
            continue
        end = index + 1
        while end < len(words):
            if words[end].text == ";" or (words[end].text == "+" and words[end - 1].text == "{}"):
                break
            end += 1
        payload = words[index + 1 : end]
        if end >= len(words) or not payload:
            return Refused("shell.unparsable", f"{word.text} needs a command that ends in ';' or '+'")
        # Names that find passes begin with a starting point or ./, so they are never options.
        commands.append(_with_placeholder(payload, "{}", prefix="./"))
        index = end + 1
    return Payload(tuple(commands))


def _applet(words: Words) -> Unwrapped:
    if not words:
        return Payload()
    if words[0].text is None:
        return dynamic(words[0])
    if words[0].text.startswith("--"):
        if words[0].text in ("--list", "--list-full", "--help"):
            return Payload()
        return Refused("shell.wrapper_option", f"the option {words[0].text!r} is not one that is understood")
    return Payload((tuple(words),))


def _unjudged(name: str) -> Callable[[Words], Unwrapped]:
    def refuse(words: Words) -> Unwrapped:
        return Refused(
            "shell.dynamic_program", f"what {name} runs cannot be judged; run the commands themselves"
        )

    return refuse


_SPECIAL: dict[str, Callable[[Words], Unwrapped]] = {
    "command": _command,
    "eval": _eval,
    "trap": _trap,
    "xargs": _xargs,
    "find": _find,
    "busybox": _applet,
    "toybox": _applet,
} | {
    name: _unjudged(name)
    for name in names(
        "parallel watch script su runuser flock at batch crontab nsenter setarch linux32 linux64 "
        "i386 x86_64 systemd-run start-stop-daemon daemonize expect socat run-parts capsh pkexec bwrap "
        "proot faketime screen tmux strace ltrace chroot unshare setpriv valgrind catchsegv fakeroot "
        "xvfb-run entr perf rr dbus-run-session"
    )
}
