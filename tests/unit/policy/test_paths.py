"""Which paths are hidden, which may be named, and which run code on the reader's machine."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import PolicyError
from sandbox.policy.model import FilesystemPolicy
from sandbox.policy.paths import DenyPatterns, canonical_path, decide_path, runs_on_host

HIDDEN = [
    ("**/.env*", [b".env", b".env.local", b"a/b/.env", b".envdir/inner/file", b"a/.env\nx"]),
    ("**/secrets/**", [b"secrets", b"secrets/key", b"a/secrets", b"a/secrets/b/c"]),
    (".env", [b".env", b"deep/er/.env", b".env/beneath"]),
    ("build/", [b"build", b"a/build", b"build/x"]),
    ("/build", [b"build", b"build/x"]),
    ("./build", [b"build", b"build/x"]),
    ("a/b", [b"a/b", b"a/b/c"]),
    ("a/**/b", [b"a/b", b"a/x/b", b"a/x/y/b/z"]),
    ("a/**", [b"a", b"a/x"]),
    ("**/a/**/b/**/c.txt", [b"a/b/c.txt", b"x/a/y/b/z/b/c.txt", b"a/b/a/b/w/c.txt/q"]),
    ("*.pem", [b"x.pem", b".pem", b"d/k.pem", b"\xff\xfe.pem"]),
    ("id_?sa", [b"id_rsa", b"id_\xc3\xa9sa", b"id_\xffsa"]),
    ("[ab].txt", [b"a.txt", b"d/b.txt"]),
    ("[!ab].txt", [b"c.txt", b"\xff.txt", b"-.txt"]),
    ("[^ab].txt", [b"c.txt"]),
    ("[]x].t", [b"].t", b"x.t"]),
    ("[a-]z", [b"az", b"-z"]),
    ("[[:digit:]]x", [b"0x", b"9x"]),
    ("[\u00e9]", [b"\xc3\xa9"]),
    ("[open", [b"[open", b"a/[open"]),
    (r"\[id\].ts", [b"[id].ts"]),
    (r"a\*b", [b"a*b"]),
    ("a\\", [b"a\\"]),
    ("caf\u00e9", [b"caf\xc3\xa9", b"cafe\xcc\x81"]),
    ("cafe\u0301", [b"caf\xc3\xa9", b"cafe\xcc\x81"]),
    ("foo**bar", [b"foobar", b"fooxbar"]),
    ("*a*b*c", [b"abc", b"xaxbxc", b"aabbcc"]),
    ("secrets/*", [b"secrets/x", b"secrets/x/y"]),
    ("a//b/./c", [b"a/b/c"]),
    ("with space", [b"with space"]),
    ("$x^(y|z)+.", [b"$x^(y|z)+."]),
]

VISIBLE = [
    ("**/.env*", [b"env", b"a/xenv", b"x.env", b".ENV", b"src/main.py", b""]),
    ("**/secrets/**", [b"secrets2", b"asecrets/x", b"a/secret", b""]),
    ("/build", [b"a/build"]),
    ("./build", [b"a/build"]),
    ("a/b", [b"x/a/b", b"a", b"a/bc"]),
    ("a/**/b", [b"a", b"ab", b"a/xb", b"c/a/b"]),
    ("*.pem", [b"x.pem.bak", b"pem"]),
    ("a*b", [b"a/b", b"abc"]),
    ("id_?sa", [b"id_sa", b"id_rrsa", b"id_/sa"]),
    ("[!ab].txt", [b"a.txt", b"/.txt", b"cc.txt"]),
    ("[ab].txt", [b"[ab].txt", b"c.txt"]),
    (r"\[id\].ts", [b"i.ts"]),
    (r"a\*b", [b"axb", b"a\\xb"]),
    ("secrets/*", [b"secrets"]),
    ("[[:digit:]]x", [b"ax", b":x"]),
    ("*", [b""]),
    ("*a*b*c", [b"acb", b"ab", b"abcd"]),
]


@pytest.mark.parametrize(("pattern", "paths"), HIDDEN)
def test_a_pattern_hides_what_it_matches_and_all_beneath(pattern: str, paths: list[bytes]) -> None:
    patterns = DenyPatterns([pattern])
    assert {path: patterns.match(path) for path in paths} == dict.fromkeys(paths, pattern)
    assert all(patterns.match(path + b"/beneath") == pattern for path in paths)


@pytest.mark.parametrize(("pattern", "paths"), VISIBLE)
def test_a_pattern_leaves_the_rest_visible(pattern: str, paths: list[bytes]) -> None:
    patterns = DenyPatterns([pattern])
    assert {path: patterns.match(path) for path in paths} == dict.fromkeys(paths)


def test_no_pattern_hides_nothing() -> None:
    patterns = DenyPatterns([])
    assert patterns.match(b"anything") is None
    assert patterns.match_names(b"", [b"a", b"b"]) == {}


def test_the_first_pattern_that_matches_is_named() -> None:
    assert DenyPatterns(["nothing", "**/.env*", ".env"]).match(b"a/.env") == "**/.env*"


@pytest.mark.parametrize(
    "pattern", ["", "  ", "!keep", "../up", "a/../b", "x\0y", "[z-a]", "a[[:nonsense:]]b"]
)
def test_a_pattern_that_could_never_match_is_refused(pattern: str) -> None:
    with pytest.raises(PolicyError, match="path pattern"):
        DenyPatterns([pattern])


@pytest.mark.parametrize("pattern", ["**", "*", "/", ".", "./", "./**", "**/*", "**/**", "?*", "/*", "***"])
def test_a_pattern_that_leaves_nothing_is_found(pattern: str) -> None:
    assert DenyPatterns(["a", pattern]).hides_root() == pattern


@pytest.mark.parametrize("pattern", ["**/.*", "a/**", "*/*", "??*", "**/a/**", "*.py", "src"])
def test_a_pattern_that_leaves_something_is_not_taken_for_the_root(pattern: str) -> None:
    assert DenyPatterns([pattern]).hides_root() is None


def test_match_names_gives_what_match_gives() -> None:
    patterns = DenyPatterns(["**/.env*", "a/b/**", "[x-z]*"])
    names = [b".env", b"b", b"yes", b"c", b"\xff", b".envrc"]
    for parent in (b"", b"a", b"q/r"):
        prefix = parent + b"/" if parent else b""
        expected = {name: found for name in names if (found := patterns.match(prefix + name))}
        assert patterns.match_names(parent, names) == expected


def test_a_hostile_name_cannot_make_matching_slow() -> None:
    # With a backtracking matcher this this never ends; the suite's timeout fails it.
    patterns = DenyPatterns(["*a*a*a*a*a*a*a*a*b", "**/a/**/a/**/a/**/a/**/a/**/b"])
    assert patterns.match(b"a" * 255) is None
    assert patterns.match(b"/".join([b"a"] * 2000)) is None


_SEGMENTS = st.text(alphabet="ab*?", min_size=1, max_size=4).filter(lambda text: "**" not in text)
_PATTERN = st.lists(st.one_of(st.just("**"), _SEGMENTS), min_size=2, max_size=5).map("/".join)
_PATH = st.lists(st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(_PATTERN, _PATH)
def test_matching_agrees_with_a_matcher_that_tries_every_way(pattern: str, path: list[str]) -> None:
    segments = pattern.split("/")
    while segments and segments[-1] == "**":
        segments.pop()
    expected = any(_tries_every_way(segments, path[:depth]) for depth in range(len(path) + 1))
    assert (DenyPatterns([pattern]).match("/".join(path).encode()) is not None) == expected


def _tries_every_way(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_tries_every_way(pattern[1:], path[skip:]) for skip in range(len(path) + 1))
    return bool(path) and _fits(pattern[0], path[0]) and _tries_every_way(pattern[1:], path[1:])


def _fits(glob: str, name: str) -> bool:
    if not glob:
        return not name
    if glob[0] == "*":
        return any(_fits(glob[1:], name[skip:]) for skip in range(len(name) + 1))
    return bool(name) and glob[0] in ("?", name[0]) and _fits(glob[1:], name[1:])


def test_matching_agrees_with_git_where_the_grammar_is_the_same(tmp_path: Path) -> None:
    patterns = ["*.pem", "/top", "mid/dle", "**/deep", "a/**/b", "[a-c]x", "q?z", r"\*lit", "[!a]y", "x/*/z"]
    names = ["k.pem", "top", "deep", "dle", "ax", "dx", "qaz", "*lit", "ay", "by", "b", "z", "plain"]
    folders = ["", "top/", "mid/", "a/", "a/m/", "a/m/n/", "x/", "x/y/", "x/y/w/"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    paths = [folder + name for folder, name in itertools.product(folders, names)]
    for pattern in patterns:
        (tmp_path / ".gitignore").write_text(pattern + "\n")
        told = subprocess.run(
            ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "-z", "--stdin"],
            input="\0".join(paths).encode(),
            capture_output=True,
            check=False,
        ).stdout.split(b"\0")[:-1]
        deny = DenyPatterns([pattern])
        assert [path for path in paths if deny.match(path.encode())] == [path.decode() for path in told], (
            pattern
        )


@pytest.mark.parametrize(
    ("given_path", "canonical"),
    [
        ("./src/a.py", b"src/a.py"),
        ("src//a/../b", b"src/b"),
        ("/workspace/src/a", b"src/a"),
        ("//workspace/./src", b"src"),
        ("/workspace", b""),
        (".", b""),
        ("a/..", b""),
        ("../workspace/a", b"a"),
        (b"\xff/\xfe", b"\xff/\xfe"),
        ("\udcff", b"\xff"),
        ("..a/b..", b"..a/b.."),
        ("a\\..\\b", b"a\\..\\b"),
    ],
)
def test_a_path_beneath_the_workspace_is_made_canonical(given_path: str | bytes, canonical: bytes) -> None:
    assert canonical_path(given_path) == canonical


@pytest.mark.parametrize(
    "given_path",
    [
        "./src/../../etc/passwd",
        "..",
        "../x",
        "/etc/passwd",
        "/",
        "/workspace/../etc/passwd",
        "/workspaces/a",
        "/workspace2",
        "../../workspace/a",
        "/../workspace/a",
        "a/../../../workspace/a",
        "~root/../../x",
    ],
)
def test_a_path_that_leaves_the_workspace_is_denied(given_path: str) -> None:
    assert canonical_path(given_path) is None
    decision = decide_path(FilesystemPolicy(), given_path, is_write=False)
    assert (decision.verdict, decision.rule) == ("deny", "path.outside_workspace")


@pytest.mark.parametrize("given_path", ["", "a\0b", "a" * 4096, "\ud800", b"", b"\0"])
def test_a_malformed_path_is_denied(given_path: str | bytes) -> None:
    decision = decide_path(FilesystemPolicy(), given_path, is_write=True)
    assert (decision.verdict, decision.rule) == ("deny", "path.malformed")


def test_the_workspace_itself_may_be_listed_but_not_written() -> None:
    assert decide_path(FilesystemPolicy(), ".", is_write=False).is_allowed
    assert decide_path(FilesystemPolicy(), "/workspace/", is_write=True).rule == "path.malformed"


@pytest.mark.parametrize("is_write", [True, False])
@pytest.mark.parametrize("given_path", [".env", "./src/../.env.local", "/workspace/a/secrets", "secrets/x/y"])
def test_a_hidden_path_is_denied_by_name_of_its_pattern(given_path: str, is_write: bool) -> None:
    policy = FilesystemPolicy(deny_patterns=("**/.env*", "**/secrets/**"))
    decision = decide_path(policy, given_path, is_write=is_write)
    assert (decision.verdict, decision.rule) == ("deny", "filesystem.deny_patterns")
    assert "**/" in decision.reason
    assert decide_path(policy, "src/main.py", is_write=is_write).is_allowed


@pytest.mark.parametrize(
    "path",
    [
        b".git",
        b".git/hooks/pre-commit",
        b"sub/.git",
        b".GIT/config",
        b".git./config",
        b".git /config",
        b".git::$INDEX_ALLOCATION/config",
        ".g\u200cit/config".encode(),
        b"GIT~1/config",
        b".gitmodules",
        b"bare/HEAD",
        b".githooks/x",
        b".husky/pre-commit",
        b".github/workflows/ci.yml",
        b".gitlab-ci.yml",
        b".circleci/config.yml",
        b"Jenkinsfile",
        b"ci/Jenkinsfile.release",
        b"azure-pipelines.yml",
        b".mcp.json",
        b".claude/settings.json",
        b"pkg/AGENTS.md",
        b".cursor/rules/a.mdc",
        b".vscode/tasks.json",
        b".idea/workspace.xml",
        b".envrc",
        b".bashrc",
        b"home/.zshenv",
        b".pre-commit-config.yaml",
        b".npmrc",
        b".yarnrc.yml",
        b".cargo/config.toml",
        b"lib/evil.pth",
        b"sitecustomize.py",
        b".ssh/authorized_keys",
    ],
)
def test_a_path_that_runs_code_on_the_readers_machine_is_named_with_a_reason(path: bytes) -> None:
    assert runs_on_host(path)


@pytest.mark.parametrize(
    "path",
    [
        b"src/main.py",
        b"Makefile",
        b"conftest.py",
        b"package.json",
        b"README.md",
        b".gitignore",
        b".github/CODEOWNERS",
        b"src/head/index.ts",
        b"git/hooks",
        b"docs/vscode/tasks.json",
        b".environment",
        b"",
        b"\xff\xfe",
    ],
)
def test_an_ordinary_path_is_not_flagged(path: bytes) -> None:
    assert runs_on_host(path) is None
