"""Read how a shell was called: with text to run, with a script's file, or with neither. Pure. D6"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LONG_OPTIONS = frozenset({"--norc", "--noprofile", "--posix"})
SET_OPTIONS = frozenset({"pipefail", "errexit", "nounset", "xtrace"})
LETTERS = "ceuxvnfaobhC"
"""Short options that change nothing about what is run, beside ``c``."""
LOGIN_LETTERS = LETTERS + "l"
"""With ``-l``: the shell reads its profile first, which is the image's or the sandbox's own."""


class UnknownOption(Exception):
    """An option that may change what is run. ``str()`` says which, as part of a sentence."""


@dataclass(frozen=True)
class Invocation:
    """What the shell will run, and where in its arguments that is."""

    kind: Literal["text", "file", "input", "nothing", "dynamic"]
    """``input``: commands come on standard input. ``nothing``: it only prints. ``dynamic``: the word that
    decides is not known beforehand."""
    index: int
    """Of the text, the file or the dynamic word; beyond the end for the others."""


def read_invocation(arguments: Sequence[str | None], letters: str = LETTERS) -> Invocation:
    """Read the arguments that follow a shell's name; None stands for one that is not known beforehand.

    Raises UnknownOption.
    """
    runs_text = False
    index = 0
    while index < len(arguments):
        text = arguments[index]
        if text is None:
            break
        if text in LONG_OPTIONS or (text == "--login" and "l" in letters):
            index += 1
            continue
        if text in ("--version", "--help") and len(arguments) == 1:
            return Invocation("nothing", 1)
        if text == "--":
            index += 1
            break
        if text == "-" or not text.startswith(("-", "+")):
            break
        given = text[1:]
        if not given or not set(given) <= set(letters):
            raise UnknownOption(f"the shell option {text!r} is not one that is understood")
        runs_text = runs_text or (text[0] == "-" and "c" in given)
        if "o" in given:
            index += 1
            if index >= len(arguments) or arguments[index] not in SET_OPTIONS:
                raise UnknownOption("only -o pipefail, errexit, nounset and xtrace are known")
        index += 1
    if index >= len(arguments):
        return Invocation("input", index)
    first = arguments[index]
    if first is None:
        return Invocation("dynamic", index)
    if runs_text:
        return Invocation("text", index)
    if first in ("-", "") or first.startswith(("-", "+", "/dev/", "/proc/")):
        return Invocation("input", index)
    return Invocation("file", index)
