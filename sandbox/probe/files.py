"""Derive decoys from deny patterns, and what must be seen of them inside: nothing. Pure. D4"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandbox.container.spec import WORKSPACE
from sandbox.policy.model import FilesystemPolicy
from sandbox.policy.paths import DenyPatterns
from sandbox.probe.model import Act, Probe

FOLDER = "selftest"
WORD = "decoy"
VISIBLE = "selftest-visible.txt"
GONE = frozenset(("ENOENT", "ENOTDIR"))
MASK = "mask layer of the workspace, filesystem.deny_patterns"


@dataclass(frozen=True)
class Decoys:
    """Files that the self-test makes in a workspace of its own."""

    files: tuple[str, ...]
    """Paths relative to the workspace."""
    hard_links: tuple[tuple[str, str], ...]
    """New name and the file it is another name of."""
    hidden: tuple[str, ...] = ()
    """Those of ``files`` that a pattern hides."""


def file_probes(filesystem: FilesystemPolicy) -> tuple[tuple[Probe, ...], Decoys]:
    """Return the probes of a filesystem policy and the files they need."""
    patterns = DenyPatterns(filesystem.deny_patterns)
    probes: list[Probe] = [
        Probe("files-read", "files", "allow", "read a file that no pattern hides", "the workspace",
              Act("read", (_inside(VISIBLE),))),
        Probe("files-write", "files", "allow", "make a file in the workspace", "the workspace",
              Act("write", (_inside(".selftest-new"),))),
    ]  # fmt: skip
    files, links = [VISIBLE], []
    for number, pattern in enumerate(filesystem.deny_patterns, 1):
        decoy = _decoy(pattern, number, patterns)
        if decoy is None:
            probes.append(
                Probe(f"files-deny-{number}", "files", "deny", f"read a file that {pattern} hides", MASK,
                      Act("read"), skip="no example of a file could be made from this pattern")
            )  # fmt: skip
            continue
        files.append(decoy)
        other_name = f"selftest-other-name-{number}"
        links.append((other_name, decoy))
        probes += _hidden(number, pattern, decoy, other_name)
        near = next((name for name in _near(decoy) if patterns.match(name.encode()) is None), None)
        if near is not None and near not in files:
            files.append(near)
            probes.append(
                Probe(f"files-near-{number}", "files", "allow", f"read {near}, which is only like {pattern}",
                      "the workspace", Act("read", (_inside(near),)))
            )  # fmt: skip
    visible = [(name, decoy) for name, decoy in links if patterns.match(name.encode()) is None]
    files = list(dict.fromkeys(files))
    hidden = tuple(name for name in files if patterns.match(name.encode()) is not None)
    return tuple(probes), Decoys(tuple(files), tuple(visible), hidden)


def _hidden(number: int, pattern: str, decoy: str, other_name: str) -> list[Probe]:
    inside, link = _inside(decoy), _inside(f".selftest-link-{number}")
    parent, _, name = inside.rpartition("/")
    around = f"{parent}/../{parent.rpartition('/')[2]}/{name}"
    ways = (
        ("", f"read {decoy}, which {pattern} hides", Act("read", (inside,))),
        ("-link", f"read {decoy} through a symbolic link", Act("through-link", (inside, link))),
        ("-relative", f"read {decoy} through a relative symbolic link", Act("through-link", (decoy, link))),
        ("-proc", f"read {decoy} through /proc/self/root", Act("read", (f"/proc/self/root{inside}",))),
        ("-cwd", f"read {decoy} by way of ..", Act("read", (around,))),
        ("-list", f"see {decoy} in its directory", Act("list", (parent, name))),
        ("-hard-link", f"make another name for {decoy}", Act("hard-link", (inside, link))),
        ("-other-name", f"read {decoy} by another name on the host", Act("read", (_inside(other_name),))),
    )  # fmt: skip
    return [
        Probe(f"files-deny-{number}{kind}", "files", "deny", what, MASK, act, GONE)
        for kind, what, act in ways
        # The workspace's own parent is the root, which is called nothing.
        if kind != "-cwd" or parent != WORKSPACE
    ]


def _decoy(pattern: str, number: int, patterns: DenyPatterns) -> str | None:
    """A path that a pattern matches; alone, in a folder of its number where the pattern leaves the choice."""
    segments = [segment for segment in pattern.split("/") if segment not in ("", ".")]
    is_anchored = pattern.startswith(("/", "./")) or len(segments) > 1
    names: list[str] = [] if is_anchored else [f"{FOLDER}-{number}"]
    for segment in segments:
        names.append(f"{FOLDER}-{number}" if segment == "**" else _segment(segment))
    # A pattern of a directory hides what is in it; a pattern of a file is taken as it is.
    if pattern.endswith("/"):
        names.append(f"{WORD}.txt")
    path = "/".join(names)
    own = DenyPatterns((pattern,))
    is_usable = all(0 < len(name.encode()) < 200 and name not in ("..", ".") for name in names)
    return path if is_usable and own.match(path.encode()) and patterns.match(path.encode()) else None


def _segment(segment: str) -> str:
    out, rest = "", segment
    while rest:
        if found := re.match(r"\[\[:\w+:\]\]|\[[!^]?\]?[^\]]*\]", rest):
            out, rest = out + _of_set(found[0]), rest[found.end() :]
        elif rest[0] == "\\" and len(rest) > 1:
            out, rest = out + rest[1], rest[2:]
        else:
            out += {"*": WORD, "?": "d"}.get(rest[0], rest[0])
            rest = rest[1:]
    return out


def _of_set(text: str) -> str:
    """One character of a set; found by asking, since sets have a grammar of their own."""
    for character in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.~ ":
        if DenyPatterns((f"/{text}",)).match(character.encode()):
            return character
    return "x"


def _near(decoy: str) -> list[str]:
    """Names that differ from a decoy's by little, the closest first."""
    parent, _, name = decoy.rpartition("/")
    prefix = f"{parent}/" if parent else ""
    near = [f"{prefix}x{name}", f"{prefix}{name}x", f"{prefix}{name.lstrip('.')}"]
    if parent:
        near += [f"{parent}x/{name}", f"x{parent}/{name}"]
    return [path for path in near if path != decoy]


def _inside(path: str) -> str:
    return f"{WORKSPACE}/{path}"
