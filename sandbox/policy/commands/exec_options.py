"""Find the options by which make, npm, tar and others run a program named on their command line. Pure.

A recipe, a package script or a build script may run anything, because a *file* says so; that is what allowing
such a program means, and ``lint`` says it. Refused here is what the command line itself would smuggle in.
"""

from __future__ import annotations

import re

from sandbox.policy.commands.payload import Payload, Refused, Unwrapped, Words, dynamic

EXEC_OPTIONS: dict[str, tuple[frozenset[str], str]] = {
    "tar": (
        frozenset({"--to-command", "--checkpoint-action", "--use-compress-program", "--rsh-command",
                   "--info-script", "--new-volume-script", "--rmt-command"}),
        "IF",
    ),
    "bsdtar": (frozenset({"--use-compress-program"}), ""),
    "rsync": (frozenset({"--rsh", "--rsync-path"}), "e"),
    "ssh": (frozenset(), "oFSJ"),
    "scp": (frozenset(), "oFSJ"),
    "sftp": (frozenset(), "oFSJbD"),
    "zip": (frozenset({"--unzip-command"}), ""),
    "sort": (frozenset({"--compress-program"}), ""),
    "split": (frozenset({"--filter"}), ""),
    "npm": (frozenset({"--script-shell", "--shell", "--node-options", "--git", "--userconfig",
                       "--globalconfig", "--call", "--viewer", "--editor"}), "c"),
    "npx": (frozenset({"--script-shell", "--shell", "--node-options", "--call", "--userconfig",
                       "--globalconfig"}), "c"),
    "pnpm": (frozenset({"--script-shell", "--shell-emulator", "--config"}), "c"),
    "yarn": (frozenset({"--script-shell", "--use-yarnrc"}), ""),
    "cargo": (frozenset({"--config"}), ""),
}  # fmt: skip
"""Options by which a program runs another that is named on its command line: long ones, short letters."""


_MAKE_FORBIDDEN = frozenset({"SHELL", ".SHELLFLAGS", "MAKE", "MAKEFLAGS", "MAKEFILES", "GNUMAKEFLAGS"})
_CORES = re.compile(r"(-j|--jobs=)(\$\(nproc\)|\"\$\(nproc\)\")|\"(-j|--jobs=)\$\(nproc\)\"")


def judge_make(words: Words) -> Unwrapped:
    """A recipe may run anything; these are the ways to replace the Makefile itself from the command line."""

    def refused(reason: str) -> Refused:
        return Refused("shell.exec_option", reason)

    for position, word in enumerate(words):
        text = word.text
        if text is None:
            if not _CORES.fullmatch(word.raw) and (word.may_be_option or "=" not in word.prefix):
                return dynamic(word)
            text = word.prefix
        name, equals, value = text.partition("=")
        if equals and not text.startswith("-"):
            variable = name.rstrip(":?+!").strip()
            if (
                variable in _MAKE_FORBIDDEN
                or " " in variable
                or name.endswith("!")
                or "$" in value
                or "`" in value
            ):
                return refused(f"the assignment {name!r} can make make run another program")
            if word.text is None and word.may_split:
                return dynamic(word)
        following = words[position + 1].text if position + 1 < len(words) else None
        option = text.partition("=")[0]
        if text.startswith("--"):
            if len(option) > 3 and "--eval".startswith(option):
                return refused("--eval makes make run the text it is given")
            if option in ("--file", "--makefile") or (len(option) > 3 and "--makefile".startswith(option)):
                source = value if equals else following
                if source is None or source == "-" or source.startswith(("/dev/", "/proc/")):
                    return refused("a Makefile on standard input cannot be judged; name a file")
        elif text.startswith("-") and text != "-":
            letters = text[1:]
            if "E" in letters.split("f")[0].split("C")[0].split("I")[0]:
                return refused("-E makes make run the text it is given")
            if "f" in letters.split("C")[0].split("I")[0]:
                source = letters.split("f", 1)[1] or following
                if source is None or source == "-" or source.startswith(("/dev/", "/proc/")):
                    return refused("a Makefile on standard input cannot be judged; name a file")
    return Payload()


def judge_exec_options(name: str, words: Words) -> Unwrapped:
    """Refuse options that name a program; None when nothing is known about this program."""
    if name not in EXEC_OPTIONS:
        return None
    longs, shorts = EXEC_OPTIONS[name]
    for position, word in enumerate(words):
        if word.text is None and word.may_be_option:
            return dynamic(word)
        text = word.text if word.text is not None else word.prefix
        if text == "--":
            break
        option = text.partition("=")[0]
        # GNU programs accept any unambiguous beginning of a long option.
        is_long = option.startswith("--") and len(option) >= 5 and any(x.startswith(option) for x in longs)
        is_short = bool(
            shorts
            and re.match(r"-[A-Za-z]", text)
            and not text.startswith("--")
            and set(text[1:]) & set(shorts)
        )
        if name == "tar" and position == 0 and not text.startswith("-") and set(text) & set(shorts):
            is_short = True  # tar xIf: the old style has no dash
        if is_long or is_short:
            return Refused(
                "shell.exec_option", f"the option {option[:40]!r} of {name} can run another program"
            )
    if name == "npx":
        # Which word is the program depends on options of npx; any that names a blocked one is refused.
        operands = [(word,) for word in words if word.text is None or not word.text.startswith("-")]
        return Payload(packages=tuple(operands))
    if name in ("npm", "pnpm", "yarn"):
        texts = [word.text for word in words if word.text is not None and not word.text.startswith("-")]
        if texts[:1] in (["config"], ["set"], ["c"]) and any(
            re.search(r"shell|node.options|editor|viewer|(^|[^a-z])git([^a-z]|$)", text or "")
            for text in texts[1:]
        ):
            return Refused("shell.exec_option", f"this {name} setting names a program to run")
        for index, word in enumerate(words):
            if word.text in ("exec", "x", "dlx") and all(
                (w.text or "").startswith("-") for w in words[:index]
            ):
                rest = [w for w in words[index + 1 :] if w.text is None or not w.text.startswith("-")]
                return Payload(packages=(tuple(rest),)) if rest else Payload()
    return Payload()
