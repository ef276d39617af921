"""Find the options by which git runs a program named on its own command line. Pure.

What git runs because a *file* says so (hooks, aliases, filters in ``.git/config``) is not visible here: an
allowed git is a launcher by design, which ``lint`` says.
"""

from __future__ import annotations

import re
from itertools import pairwise

from sandbox.policy.commands.payload import Payload, Refused, Words, dynamic
from sandbox.policy.commands.programs import names
from sandbox.policy.commands.shell import Word

SAFE_SETTINGS = re.compile(
    r"user\.(name|email)|author\.(name|email)|committer\.(name|email)|color\..*|column\..*|advice\..*|log\..*"
    r"|core\.(quotepath|autocrlf|safecrlf|filemode|ignorecase|abbrev|eol|longpaths|symlinks|preloadindex)"
    r"|init\.defaultbranch|safe\.directory|commit\.(gpgsign|verbose|cleanup)|tag\.(gpgsign|sort)"
    r"|diff\.(renames|renamelimit|algorithm|context|mnemonicprefix|noprefix|colormoved)"
    r"|merge\.(conflictstyle|ff|renames)|pull\.(rebase|ff)|push\.default|fetch\.prune|rebase\.autosquash"
    r"|branch\..*\.(remote|merge)|gc\.auto|maintenance\.auto|status\..*|rerere\.enabled",
    re.IGNORECASE,
)
"""Settings that never name a program. Everything else is refused: the list of those that do keeps growing."""

_GLOBAL_FLAGS = names(
    "-p -P --paginate --no-pager --bare --no-replace-objects --no-optional-locks --no-lazy-fetch --no-advice "
    "--literal-pathspecs --glob-pathspecs --noglob-pathspecs --icase-pathspecs -v --version -h --help "
    "--html-path --man-path --info-path"
)
_GLOBAL_VALUES = names("-C --git-dir --work-tree --namespace --super-prefix --attr-source")
_REFUSED_SUBCOMMANDS = names(
    "remote-ext daemon instaweb send-email web--browse filter-branch shell difftool mergetool hook "
    "upload-pack receive-pack http-backend imap-send svn p4 cvsserver gui citool gitk "
    "upload-archive remote-fd difftool--helper mergetool--lib help for-each-repo credential"
)
_LONG_OPTIONS = (
    "--upload-pack",
    "--receive-pack",
    "--exec",
    "--extcmd",
    "--open-files-in-pager",
    "--template",
)
_SHORT_OPTIONS = {"clone": "uc", "rebase": "x", "grep": "O", "fetch": "", "pull": "", "push": "", "init": ""}
_TAKES_EXEC = names(
    "clone fetch pull push ls-remote fetch-pack send-pack archive rebase grep init bisect submodule "
    "config remote"
)


def judge_git(words: Words) -> Refused | Payload:
    """Judge the words after ``git``."""
    if any((word.text or "").startswith("ext::") for word in words):
        return _refused("an ext:: address runs a command")
    index = 0
    while index < len(words):
        word = words[index]
        if word.text is None:
            return dynamic(word)
        text = word.text
        option = text.partition("=")[0]
        if not text.startswith("-"):
            break
        if text in _GLOBAL_FLAGS:
            index += 1
        elif option in _GLOBAL_VALUES:
            if "=" not in text and index + 1 < len(words) and words[index + 1].may_split:
                return dynamic(words[index + 1])
            index += 1 if "=" in text else 2
        elif text == "-c":
            setting = words[index + 1] if index + 1 < len(words) else None
            if found := _setting(setting):
                return found
            index += 2
        else:
            return _refused(f"the option {option[:40]!r} can make git run another program")
    if index >= len(words):
        return Payload()
    return _subcommand(words[index].text or "", words[index + 1 :])


def _refused(reason: str) -> Refused:
    return Refused("shell.git_exec_option", reason)


def _setting(word: Word | None) -> Refused | None:
    """Judge ``key=value``; a value known only at run time is fine when the key is safe."""
    if word is None:
        return None
    text = word.text if word.text is not None else word.prefix
    key, equals, value = text.partition("=")
    if word.text is None and (not equals or word.may_split):
        return dynamic(word)
    if SAFE_SETTINGS.fullmatch(key):
        return None
    if key.lower() == "core.pager" and value in ("", "cat") and word.text is not None:
        return None
    return _refused(f"the setting {key[:60]!r} is not on the list of those that never run a program")


def _subcommand(name: str, words: Words) -> Refused | Payload:
    if name in _REFUSED_SUBCOMMANDS:
        return _refused(f"git {name} runs programs that cannot be judged here")
    if name == "config":
        return _config(words)
    texts = [word.text for word in words]
    if name == "bisect" and texts[:1] == ["run"]:
        return Payload(commands=(tuple(words[1:]),)) if len(words) > 1 else Payload()
    if name == "submodule" and "foreach" in texts:
        return _foreach(words[texts.index("foreach") + 1 :])
    shorts = _SHORT_OPTIONS.get(name, "")
    for word in words:
        if word.text == "--" and name not in ("rebase",):
            break
        if word.text is None and word.may_be_option and name in _TAKES_EXEC:
            return dynamic(word)
        text = word.text if word.text is not None else word.prefix
        option = text.partition("=")[0]
        # git accepts any unambiguous beginning of a long option.
        if option.startswith("--") and len(option) >= 5 and any(x.startswith(option) for x in _LONG_OPTIONS):
            return _refused(f"the option {option[:40]!r} names a program to run")
        if re.match(r"-[A-Za-z]", text) and set(text[1:]) & set(shorts):
            return _refused(f"the option {text[:40]!r} of git {name} names a program or a setting")
    return Payload()


def _foreach(words: Words) -> Refused | Payload:
    rest = list(words)
    while rest and rest[0].text in ("--recursive", "--quiet", "-q", "--"):
        rest.pop(0)
    for word in rest:
        if word.text is None:
            return dynamic(word)
    if len(rest) == 1:
        return Payload(scripts=(rest[0].text or "",))
    return Payload(commands=(tuple(rest),)) if rest else Payload()


def _config(words: Words) -> Refused | Payload:
    """Reading is free; writing only for settings that never name a program."""
    reading = {"--get", "--get-all", "--get-regexp", "--list", "-l", "--get-urlmatch", "list", "get"}
    for word in words:
        if word.text is None and word.may_be_option:
            return dynamic(word)
    if any(word.text in reading for word in words[:2]):
        return Payload()
    if any(word.text in ("-e", "--edit", "edit") for word in words):
        return _refused("git config --edit starts an editor")
    operands = [word for word in words if word.text is None or not word.text.startswith("-")]
    if operands and operands[0].text in ("set", "unset"):
        operands = operands[1:]
    skip = {"--file", "-f", "--blob", "--type", "--default"}
    for word, following in pairwise(words):
        if word.text in skip and following in operands:
            operands.remove(following)
    if len(operands) < 2:
        return Payload()
    key = operands[0].text
    if key is None:
        return dynamic(operands[0])
    if SAFE_SETTINGS.fullmatch(key):
        return Payload()
    return _refused(f"the setting {key[:60]!r} is not on the list of those that never run a program")
