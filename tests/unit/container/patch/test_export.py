"""Exporting a patch from an upper layer, hostile ones included, and applying it. Real git, real files."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox.container.patch import changes
from sandbox.container.patch.apply import apply_patch
from sandbox.container.patch.changes import is_refused_by_git
from sandbox.container.patch.export import ExportedPatch, export_patch
from sandbox.container.patch.text import find_hazard, split_patch
from sandbox.container.workspace.prepare import prepare_workspace, release_workspace
from sandbox.digest import Digest
from sandbox.errors import HostError, StateError, WorkspaceError
from sandbox.policy.paths import DenyPatterns

PATTERNS = DenyPatterns(["**/.env*", "**/secrets/**"])

BASE = {
    b"README.md": b"one\ntwo\nthree\n",
    b"src/main.py": b"print(1)\n",
    b"src/deep/er/x.txt": b"x\n",
    b"bin/data": bytes(range(256)) * 20,
    b"odd/new\nline": b"n\n",
    b'odd/q"uo\\te\t': b"q\n",
    b"odd/\xff\xfe": b"b\n",
    b"odd/\xc3\xa9 space": b"e\n",
    b"odd/no-newline": b"no newline at the end",
    b"odd/crlf.txt": b"one\r\ntwo\r\n",
    b"empty": b"",
    b".env": b"SECRET=1\n",
    b"src/secrets/key": b"SECRET\n",
}


@dataclass
class Session:
    """A prepared workspace whose upper layer a test fills."""

    workspace: Path
    directory: Path

    @property
    def upper(self) -> bytes:
        return os.fsencode(self.directory / "upper")

    def write(self, path: bytes, content: bytes, mode: int = 0o644) -> None:
        self._make_parent(path)
        target = self.upper + b"/" + path
        Path(os.fsdecode(target)).write_bytes(content)
        Path(os.fsdecode(target)).chmod(mode)

    def link(self, path: bytes, target: bytes) -> None:
        self._make_parent(path)
        Path(os.fsdecode(self.upper + b"/" + path)).symlink_to(os.fsdecode(target))

    def delete(self, path: bytes) -> None:
        self._make_parent(path)
        os.mknod(self.upper + b"/" + path, stat.S_IFCHR, 0)

    def replace_folder(self, path: bytes) -> None:
        """Remove a folder and make it again, as overlayfs records that."""
        folder = Path(os.fsdecode(self.upper + b"/" + path))
        folder.mkdir(parents=True, exist_ok=True)
        os.setxattr(folder, "user.overlay.opaque", b"y")

    def _make_parent(self, path: bytes) -> None:
        Path(os.fsdecode(self.upper + b"/" + path)).parent.mkdir(parents=True, exist_ok=True)

    def export(self) -> ExportedPatch:
        return export_patch(self.directory, self.workspace, PATTERNS, self.directory / "patch.diff")

    def apply(self, exported: ExportedPatch, *, allow: bool = False) -> None:
        apply_patch(exported.path, exported.digest, self.workspace, allow_executable_paths=allow)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    workspace = tmp_path / "project"
    for path, content in BASE.items():
        target = Path(os.fsdecode(os.fsencode(workspace) + b"/" + path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (workspace / "link").symlink_to("README.md")
    (workspace / "run.sh").write_text("#!/bin/sh\n")
    (workspace / "run.sh").chmod(0o755)
    directory = tmp_path / "state" / "sessions" / "s1"
    prepare_workspace(workspace, PATTERNS, directory).wait_base_tree()
    yield Session(workspace, directory)
    release_workspace(directory)


def tree(root: Path) -> dict[bytes, tuple[str, bytes]]:
    """The files of a tree as git would see them: kind and content by path."""
    found: dict[bytes, tuple[str, bytes]] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in files + folders:
            path = folder + b"/" + name
            entry = os.lstat(path)
            relative = os.path.relpath(path, os.fsencode(root))
            if stat.S_ISLNK(entry.st_mode):
                found[relative] = ("link", os.readlink(path))
            elif stat.S_ISREG(entry.st_mode):
                kind = "x" if entry.st_mode & 0o100 else "-"
                found[relative] = (kind, Path(os.fsdecode(path)).read_bytes())
    return found


def withheld(exported: ExportedPatch) -> dict[bytes, str]:
    return {item.path: item.reason for item in exported.withheld}


def test_every_kind_of_change_survives_export_and_apply(session: Session) -> None:
    expected = tree(session.workspace)
    session.write(b"README.md", b"one\n2\nthree\nfour\n")
    expected[b"README.md"] = ("-", b"one\n2\nthree\nfour\n")
    session.write(b"bin/data", b"\0\1\2" * 500)
    expected[b"bin/data"] = ("-", b"\0\1\2" * 500)
    session.write(b"src/main.py", BASE[b"src/main.py"], 0o755)
    expected[b"src/main.py"] = ("x", BASE[b"src/main.py"])
    session.write(b"run.sh", b"#!/bin/sh\nexit\n", 0o644)
    expected[b"run.sh"] = ("-", b"#!/bin/sh\nexit\n")
    session.delete(b"src/deep")
    del expected[b"src/deep/er/x.txt"]
    session.delete(b"link")
    expected[b"link"] = ("-", b"now a file\n")
    os.unlink(session.upper + b"/link")
    session.write(b"link", b"now a file\n")
    session.link(b"empty", b"src/main.py")
    expected[b"empty"] = ("link", b"src/main.py")
    for name in (b"odd/new\nline", b'odd/q"uo\\te\t', b"odd/\xff\xfe", b"odd/\xc3\xa9 space"):
        session.write(name, b"changed\n")
        expected[name] = ("-", b"changed\n")
    session.write(b"odd/no-newline", b"still none")
    expected[b"odd/no-newline"] = ("-", b"still none")
    session.write(b"odd/crlf.txt", b"one\r\n2\r\n")
    expected[b"odd/crlf.txt"] = ("-", b"one\r\n2\r\n")
    session.write(b"new/folder/a\nb", b"", 0o755)
    expected[b"new/folder/a\nb"] = ("x", b"")

    exported = session.export()
    assert exported.withheld == ()
    session.apply(exported)
    assert tree(session.workspace) == expected


def test_deletions_and_mode_changes_come_first(session: Session) -> None:
    session.write(b"README.md", b"changed\n")
    session.write(b"aaa", b"new\n")
    session.delete(b"src/main.py")
    session.write(b"run.sh", b"#!/bin/sh\n", 0o644)
    exported = session.export()
    assert [(file.kind, file.path) for file in exported.files] == [
        ("deleted", b"src/main.py"),
        ("mode", b"run.sh"),
        ("modified", b"README.md"),
        ("added", b"aaa"),
    ]
    assert exported.path.read_bytes().startswith(b"diff --git a/src/main.py b/src/main.py\ndeleted file")
    assert stat.S_IMODE(exported.path.stat().st_mode) == 0o600


def test_a_file_becomes_a_folder_and_a_folder_a_file(session: Session) -> None:
    expected = tree(session.workspace)
    session.write(b"README.md/inside", b"1\n")
    session.write(b"src", b"was a folder\n")
    session.replace_folder(b"odd")
    session.write(b"odd/only", b"one\n")
    for path in [path for path in expected if path.startswith((b"odd/", b"src/")) or path == b"README.md"]:
        if not path.startswith(b"src/secrets"):
            del expected[path]
    exported = session.export()
    # The hidden folder stays on the host, so a file cannot take its parent's place: only that is withheld.
    assert withheld(exported) == {b"src": "src/secrets/key stays in its place on the host"}
    session.apply(exported)
    expected |= {b"README.md/inside": ("-", b"1\n"), b"odd/only": ("-", b"one\n")}
    assert tree(session.workspace) == expected


def test_a_folder_that_was_filled_since_keeps_a_file_from_its_place(session: Session) -> None:
    session.write(b"src/deep", b"was a folder\n")
    exported = session.export()
    mine = session.workspace / "src" / "deep" / "mine"
    mine.write_text("the user's\n")
    before = tree(session.workspace)
    with pytest.raises(WorkspaceError, match=r"src/deep cannot be written while src/deep/mine is there"):
        session.apply(exported)
    assert tree(session.workspace) == before
    mine.unlink()  # the control
    session.apply(exported)
    assert (session.workspace / "src" / "deep").read_text() == "was a folder\n"


def test_what_git_cannot_carry_in_a_folder_withholds_only_the_file_in_its_place(tmp_path: Path) -> None:
    """An empty folder within, a FIFO, a hidden second name: none may keep the other changes from the host."""
    workspace = tmp_path / "project"
    for folder in ("nested/empty", "empty", "full"):
        (workspace / folder).mkdir(parents=True)
    (workspace / "nested" / "x").write_text("x\n")
    (workspace / "full" / "x").write_text("x\n")
    (workspace / ".env").write_text("SECRET\n")
    (workspace / "second-name").hardlink_to(workspace / ".env")
    directory = tmp_path / "state" / "sessions" / "s1"
    prepare_workspace(workspace, PATTERNS, directory).wait_base_tree()
    session = Session(workspace, directory)
    try:
        for path in (b"nested", b"empty", b"full", b"second-name/in", b"other"):
            session.write(path, b"new\n")
        exported = session.export()
        assert withheld(exported) == {
            b"nested": "nested/empty stays in its place on the host",
            b"second-name/in": "second-name stays in its place on the host",
        }
        session.apply(exported)
    finally:
        release_workspace(directory)
    found = tree(workspace)
    assert {path for path, (_, content) in found.items() if content == b"new\n"} == {
        b"empty",
        b"full",
        b"other",
    }
    assert found[b"second-name"] == found[b".env"] == ("-", b"SECRET\n")


def test_a_folder_in_the_place_of_a_link_is_applied(session: Session) -> None:
    session.write(b"link/inside", b"1\n")
    exported = session.export()
    session.apply(exported)
    assert (session.workspace / "link" / "inside").read_text() == "1\n"
    assert (session.workspace / "README.md").read_bytes() == BASE[b"README.md"]


@pytest.mark.parametrize("name", [b" /x", b" /a b", b"a /b/ c", b" ", b'" "/ x', b"b/ b/ /b"])
@pytest.mark.parametrize("content", [b"", b"text\n", b"\0binary" * 300])
def test_blanks_in_names_leave_no_doubt_where_they_end(session: Session, name: bytes, content: bytes) -> None:
    """The header is the only line that names an empty or binary file, and git splits it at blanks."""
    session.write(name, content, 0o755)
    exported = session.export()
    assert [file.path for file in exported.files] == [name]
    session.apply(exported)
    assert tree(session.workspace)[name] == ("x", content)


@pytest.mark.parametrize(
    "name",
    [
        *(
            b".gitmodules",
            b".GITMODULES ",
            b".gitmodules:x",
            b".gitmodules/x",
            b"d\\.gitmodules",
            b"gitmod~1",
        ),
        *(b"gi7eba~1", b"gi7eb~12", b"g~123456", b"~1234567", b"d\\~1234567.", b"GI7EBA~1 "),
    ],
)
def test_a_link_that_git_refuses_does_not_spoil_the_patch(session: Session, name: bytes) -> None:
    session.link(name, b"README.md")
    session.write(b"good", b"1\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"good"]
    assert list(withheld(exported)) == [name]
    session.apply(exported)


@pytest.mark.parametrize("name", [b"gitmod~5", b"~123456", b"gi7eba~0", b"gitmodules", b"gi7eba~1x"])
def test_a_link_that_only_looks_a_little_like_it_is_carried(session: Session, name: bytes) -> None:
    session.link(name, b"README.md")
    exported = session.export()
    assert [file.path for file in exported.files] == [name]
    session.apply(exported)
    assert tree(session.workspace)[name] == ("link", b"README.md")


def test_what_a_full_patch_lacks_is_the_large_and_new(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.container.patch.changes.TOTAL_BYTES_MAX", 1000)
    session.write(b"aaa/large", b"x" * 900)
    session.write(b"small", b"x" * 100)
    session.write(b"src/main.py", b"print(2)\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"small", b"src/main.py"]
    assert list(withheld(exported)) == [b"aaa/large"]


def test_nothing_changed_is_an_empty_patch(session: Session) -> None:
    session.write(b"README.md", BASE[b"README.md"])  # copied up, not changed
    exported = session.export()
    assert (exported.size_bytes, exported.files, exported.withheld) == (0, (), ())
    assert not apply_patch(exported.path, exported.digest, session.workspace).is_applied


@pytest.mark.parametrize("seed", range(12))
def test_random_changes_round_trip(session: Session, seed: int) -> None:
    """Each seed edits a random part of the tree; the applied tree equals a model kept beside."""
    chance = random.Random(seed)  # noqa: S311  # reproducible, not secret
    expected = tree(session.workspace)
    names = [
        b"a",
        b"b c",
        b"\xf0\x9f\x90\x8d",
        b"\xfe",
        b"d\tq",
        b"-x",
        b"--",
        b'"',
        b"e\n",
        b"a/b",
        b"b c/z/z",
    ]
    for path in [*(path for path in BASE if b"SECRET" not in BASE[path]), b"link", b"run.sh"]:
        match chance.randrange(5):
            case 0:
                session.delete(path)
                del expected[path]
            case 1:
                content = chance.randbytes(chance.randrange(3000))
                mode = chance.choice([0o644, 0o755, 0o600, 0o700])
                session.write(path, content, mode)
                expected[path] = ("x" if mode & 0o100 else "-", content)
            case 2:
                session.link(path, chance.choice([b"empty", b"bin/data", b"no where"]))
                expected[path] = ("link", os.readlink(session.upper + b"/" + path))
            case _:
                pass
    for name in chance.sample(names[:-2], 5) + chance.sample(names[-2:], 1):
        if name in (b"a", b"b c") or name.startswith((b"a/", b"b c/")):
            name = b"new/" + name.replace(b"/", b"_")
        content = b"\n".join(chance.randbytes(3).hex().encode() for _ in range(chance.randrange(50)))
        session.write(name, content)
        expected[name] = ("-", content)
    exported = session.export()
    assert exported.withheld == ()
    session.apply(exported)
    assert tree(session.workspace) == expected


@pytest.mark.parametrize("attributes", [b"* text eol=crlf\n", b"* text=auto\n*.md filter=evil ident\n"])
def test_attributes_and_configuration_of_the_workspace_change_nothing(
    session: Session, attributes: bytes
) -> None:
    """The workspace is a repository with filters, line-ending rules and its own configuration."""
    git = ["git", "-C", str(session.workspace)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "config", "core.autocrlf", "true"], check=True)
    ran = session.workspace / "ran"
    for key in ("core.fsmonitor", "filter.evil.smudge", "filter.evil.clean"):
        subprocess.run([*git, "config", key, f"touch {ran}; cat"], check=True)
    (session.workspace / ".gitattributes").write_bytes(attributes)
    session.write(b"README.md", b"one\n$Id$\n2\n")
    session.write(b"odd/crlf.txt", b"one\r\n2\r\nx\n")
    session.apply(session.export())
    found = tree(session.workspace)
    assert found[b"README.md"] == ("-", b"one\n$Id$\n2\n")
    assert found[b"odd/crlf.txt"] == ("-", b"one\r\n2\r\nx\n")
    assert not ran.exists()


def test_a_workspace_that_is_a_folder_of_a_repository_is_patched_in_that_folder(session: Session) -> None:
    subprocess.run(["git", "init", "-q", str(session.workspace.parent)], check=True)
    session.write(b"README.md", b"changed\n")
    session.apply(session.export())
    assert (session.workspace / "README.md").read_bytes() == b"changed\n"
    assert not (session.workspace.parent / "README.md").exists()


def test_private_files_stay_private(session: Session) -> None:
    (session.workspace / "README.md").chmod(0o600)
    (session.workspace / "run.sh").chmod(0o700)
    release_workspace(session.directory)
    prepare_workspace(session.workspace, PATTERNS, session.directory).wait_base_tree()
    session.write(b"README.md", b"changed\n", 0o755)
    session.write(b"run.sh", b"changed\n", 0o700)
    session.apply(session.export())
    assert stat.S_IMODE((session.workspace / "README.md").stat().st_mode) == 0o700
    assert stat.S_IMODE((session.workspace / "run.sh").stat().st_mode) == 0o700


# Hostile upper layers


def test_files_that_match_a_deny_pattern_never_reach_the_patch(session: Session) -> None:
    session.write(b".env", b"PLANTED=1\n")
    session.write(b"sub/.env.local", b"PLANTED=1\n")
    session.write(b"src/secrets/planted", b"x\n")
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"fine"]
    assert withheld(exported).keys() == {b".env", b"sub/.env.local", b"src/secrets"}
    assert b"PLANTED" not in exported.path.read_bytes()


def test_removing_what_surrounds_a_hidden_file_leaves_the_hidden_file(session: Session) -> None:
    session.delete(b"src")
    exported = session.export()
    assert {file.path for file in exported.files} == {b"src/main.py", b"src/deep/er/x.txt"}
    assert b"SECRET" not in exported.path.read_bytes()
    session.apply(exported)
    assert (session.workspace / "src" / "secrets" / "key").exists()


def test_an_opaque_mark_and_whiteouts_of_hidden_files_delete_nothing_hidden(session: Session) -> None:
    session.replace_folder(b"src")
    session.replace_folder(b"")
    session.delete(b".env")
    exported = session.export()
    assert {b".env", b"src/secrets/key"}.isdisjoint(file.path for file in exported.files)
    assert {file.kind for file in exported.files} == {"deleted"}
    assert b"SECRET" not in exported.path.read_bytes()


def test_a_write_that_was_cut_off_is_withheld_and_its_lookalikes_are_not(session: Session) -> None:
    session.write(b"src/.agent-runner-0123456789abcdef.tmp", b"half a li")
    session.write(b"src/.agent-runner-0123456789abcdef.tmp.py", b"whole\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"src/.agent-runner-0123456789abcdef.tmp.py"]
    assert [item.path for item in exported.withheld] == [b"src/.agent-runner-0123456789abcdef.tmp"]


def test_special_files_are_withheld(session: Session) -> None:
    os.mkfifo(session.upper + b"/fifo")
    if os.geteuid() == 0:
        os.mknod(session.upper + b"/disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
        os.mknod(session.upper + b"/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"fine"]
    assert set(withheld(exported)) >= {b"fifo"}
    assert all("cannot be in a patch" in item.reason for item in exported.withheld)


def test_a_symlink_is_carried_as_a_link_and_never_followed(session: Session, tmp_path: Path) -> None:
    (tmp_path / "host-secret").write_text("HOSTSECRET\n")
    session.link(b"abs", os.fsencode(tmp_path / "host-secret"))
    session.link(b"dir", os.fsencode(tmp_path))
    session.link(b"src/up", b"../../host-secret")
    session.link(b"src/tricky", b"main.py/../../../x")
    session.link(b"ok", b"src/main.py")
    session.link(b"hook", b".git/hooks/pre-commit")
    exported = session.export()
    assert b"HOSTSECRET" not in exported.path.read_bytes()
    flagged = {file.path for file in exported.files if file.runs_on_host}
    assert flagged == {b"abs", b"dir", b"src/up", b"src/tricky", b"hook"}
    before = tree(session.workspace)
    with pytest.raises(WorkspaceError, match="refusing to apply 5 paths") as caught:
        session.apply(exported)
    assert "\n" not in str(caught.value)
    assert tree(session.workspace) == before


def test_an_upper_folder_that_is_a_symlink_on_the_host_is_not_entered(
    session: Session, tmp_path: Path
) -> None:
    """The manifest says ``odd`` is a folder; meanwhile it became a link to somewhere precious."""
    precious = tmp_path / "precious"
    shutil.copytree(session.workspace / "odd", precious)
    session.write(b"odd/crlf.txt", b"overwritten\n")
    exported = session.export()
    shutil.rmtree(session.workspace / "odd")
    (session.workspace / "odd").symlink_to(precious)
    again = export_patch(session.directory, session.workspace, PATTERNS, session.directory / "again.diff")
    assert (again.files, withheld(again).keys()) == ((), {b"odd/crlf.txt"})
    with pytest.raises(WorkspaceError, match="beyond it"):
        session.apply(exported)
    assert (precious / "crlf.txt").read_bytes() == BASE[b"odd/crlf.txt"]


def test_the_repositorys_own_folder_is_withheld_in_every_spelling(session: Session) -> None:
    for name in (b".git", b".GIT", b".git ", b".git.", b"git~1", b"a\\.git", b".git::$DATA", b"x/.git"):
        session.write(name + b"/hooks/pre-commit", b"#!/bin/sh\nevil\n", 0o755)
    session.write(".g\u200cit/config".encode(), b"[core]\n")
    session.link(b".gitmodules", b"README.md")
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"fine"]
    assert len(exported.withheld) == 10
    session.apply(exported)


GIT_NAMES = [b".git", b".GIT", b".git.", b".git ", b".git . .", b"git~1", b"GIT~1 ", b"a\\.git", b".git:x"]
PLAIN_NAMES = [
    b".gitx",
    b"git~2",
    b"x.git",
    b"git",
    b".gi",
    b"a\\b",
    b"...",
    b". ",
    b"x:y",
    b"-",
    b"\xff.git",
]
ODD_NAMES = [b"a\\git~1", ".g\u200cit".encode(), ".git\ufeff".encode(), ".g\u00edt".encode()]


@pytest.mark.parametrize("name", [*GIT_NAMES, *PLAIN_NAMES, *ODD_NAMES])
def test_a_name_is_withheld_exactly_when_git_refuses_it(tmp_path: Path, name: bytes) -> None:
    subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / "r")], check=True)
    git = ["git", "-C", str(tmp_path / "r"), "-c", "core.protectHFS=true"]
    blob = subprocess.run([*git, "hash-object", "-w", "--stdin"], input=b"", capture_output=True, check=True)
    done = subprocess.run(
        [*git, "update-index", "--add", "--cacheinfo", b"100644," + blob.stdout.strip() + b"," + name],
        capture_output=True,
        check=False,
        env={**os.environ, "GIT_INDEX_FILE": str(tmp_path / "index")},
    )
    assert is_refused_by_git(name) == (done.returncode != 0)


def test_set_user_id_bits_are_dropped_and_said(session: Session) -> None:
    session.write(b"su", b"x\n", 0o4755)
    exported = session.export()
    assert [file.path for file in exported.files] == [b"su"]
    assert "set-user-id" in withheld(exported)[b"su"]
    session.apply(exported)
    assert not (session.workspace / "su").stat().st_mode & stat.S_ISUID


def test_a_terabyte_of_nothing_is_withheld(session: Session) -> None:
    session.write(b"huge", b"x")
    os.truncate(session.upper + b"/huge", 1 << 40)
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"fine"]
    assert str(1 << 40) in withheld(exported)[b"huge"]


def test_what_exceeds_the_whole_patch_is_withheld(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.container.patch.changes.TOTAL_BYTES_MAX", 1000)
    session.write(b"a", b"a" * 600)
    session.write(b"b", b"b" * 600)
    session.write(b"c", b"c" * 300)
    exported = session.export()
    assert [file.path for file in exported.files] == [b"a", b"c"]
    assert "full" in withheld(exported)[b"b"]


def test_hard_links_are_separate_files(session: Session) -> None:
    session.write(b"one", b"same\n")
    os.link(session.upper + b"/one", session.upper + b"/two")
    session.apply(session.export())
    assert (session.workspace / "one").read_bytes() == (session.workspace / "two").read_bytes() == b"same\n"


def test_a_pit_of_folders_ends_where_paths_end(session: Session) -> None:
    descriptor = os.open(session.upper, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 250, dir_fd=descriptor)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"fine"]
    assert any("longer than" in item.reason for item in exported.withheld)


def test_locked_files_and_folders_are_read_by_their_owner(session: Session) -> None:
    session.write(b"locked/f", b"x\n", 0)
    os.chmod(session.upper + b"/locked", 0)
    assert [file.path for file in session.export().files] == [b"locked/f"]


def test_marks_of_a_mount_without_userxattr_stop_the_export(session: Session) -> None:
    session.write(b"moved/f", b"x\n")
    os.setxattr(session.upper + b"/moved", b"user.overlay.redirect", b"/src")
    with pytest.raises(WorkspaceError, match="userxattr"):
        session.export()


def test_an_empty_folder_is_reported(session: Session) -> None:
    (Path(os.fsdecode(session.upper)) / "void").mkdir()
    assert "empty folder" in withheld(session.export())[b"void"]


def test_content_that_looks_like_a_patch_stays_content(session: Session) -> None:
    evil = b"diff --git a/x b/.git/config\n--- a/x\n+++ b/.git/config\n@@ -0,0 +1 @@\n+[core]\n"
    session.write(b"evil.txt", evil)
    session.write(b"README.md", evil)
    exported = session.export()
    assert {file.path for file in exported.files} == {b"evil.txt", b"README.md"}
    session.apply(exported)
    assert (session.workspace / "evil.txt").read_bytes() == evil


# What the user did meanwhile


def test_a_file_the_user_changed_meanwhile_is_withheld_not_reverted(session: Session) -> None:
    session.write(b"README.md", b"the agent's\n")
    session.delete(b"src/main.py")
    session.delete(b"empty")
    session.write(b"mine", b"the agent's\n")
    (session.workspace / "README.md").write_text("the user's, longer\n")
    (session.workspace / "src" / "main.py").write_text("the user's, longer\n")
    (session.workspace / "empty").unlink()
    (session.workspace / "mine").write_text("the user's\n")
    exported = session.export()
    assert exported.files == ()
    assert withheld(exported).keys() == {b"README.md", b"src/main.py", b"empty", b"mine"}


def test_a_patch_that_no_longer_fits_is_refused_whole(session: Session) -> None:
    session.write(b"README.md", b"changed\n")
    session.write(b"aaa", b"new\n")
    exported = session.export()
    (session.workspace / "README.md").write_text("something else\n")
    before = tree(session.workspace)
    with pytest.raises(WorkspaceError, match="does not fit"):
        session.apply(exported)
    assert tree(session.workspace) == before


def test_applying_twice_is_refused(session: Session) -> None:
    session.write(b"README.md", b"changed\n")
    exported = session.export()
    session.apply(exported)
    with pytest.raises(WorkspaceError, match="applied already"):
        session.apply(exported)


def test_a_check_changes_nothing(session: Session) -> None:
    session.write(b"README.md", b"changed\n")
    exported = session.export()
    before = tree(session.workspace)
    report = apply_patch(exported.path, exported.digest, session.workspace, is_check_only=True)
    assert (report.is_applied, len(report.files)) == (False, 1)
    assert tree(session.workspace) == before


# Applying


def test_paths_that_run_code_are_in_the_patch_and_need_an_explicit_yes(session: Session) -> None:
    session.write(b".github/workflows/ci.yml", b"on: push\n")
    session.write(b".vscode/tasks.json", b"{}\n")
    session.write(b"fine", b"x\n")
    exported = session.export()
    assert {file.path for file in exported.files if file.runs_on_host} == {
        b".github/workflows/ci.yml",
        b".vscode/tasks.json",
    }
    before = tree(session.workspace)
    with pytest.raises(WorkspaceError, match=r"\.github/workflows/ci\.yml .*--allow-executable-paths"):
        session.apply(exported)
    assert tree(session.workspace) == before
    session.apply(exported, allow=True)
    assert (session.workspace / ".vscode" / "tasks.json").exists()


def test_another_patch_than_the_recorded_one_is_refused(session: Session) -> None:
    session.write(b"fine", b"x\n")
    exported = session.export()
    exported.path.write_bytes(exported.path.read_bytes() + b"\n")
    with pytest.raises(WorkspaceError, match="not the patch that the session recorded"):
        session.apply(exported)
    with pytest.raises(WorkspaceError, match="cannot read patch"):
        apply_patch(session.directory / "none", Digest("", ""), session.workspace)


def test_without_git_the_error_says_what_to_install(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="install git"):
        session.export()


def test_a_released_session_has_no_patch_any_more(session: Session) -> None:
    release_workspace(session.directory)
    with pytest.raises(StateError, match="released"):
        session.export()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a controller running as root")
def test_root_applies_as_the_workspaces_owner(session: Session) -> None:
    session.write(b"new/file", b"x\n")
    session.write(b"README.md", b"changed\n")
    exported = session.export()
    for folder, folders, files in os.walk(os.fsencode(session.workspace)):
        for name in [b".", *folders, *files]:
            os.chown(folder + b"/" + name, 4242, 4343, follow_symlinks=False)
    for parent in session.workspace.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    session.apply(exported)
    assert (session.workspace / "new" / "file").stat().st_uid == 4242
    assert (session.workspace / "README.md").stat().st_uid == 4242


def test_a_patch_of_another_making_is_not_read() -> None:
    with pytest.raises(WorkspaceError, match="git header"):
        split_patch(b"--- a/x\n+++ b/x\n")
    with pytest.raises(WorkspaceError, match="does not name one path"):
        split_patch(b"diff --git a/x b/.git/config\nnew file mode 100644\n")
    with pytest.raises(WorkspaceError, match="renames"):
        split_patch(b"diff --git a/x b/x\nsimilarity index 100%\nrename from x\nrename to y\n")


@pytest.mark.parametrize(
    ("path", "target", "is_hazard"),
    [
        (b"a/b/l", b"../../c", False),
        (b"a/b/l", b"../../../c", True),
        (b"a/l", b"./x/./y", False),
        (b"a/l", b"x/../y", True),
        (b"l", b"..", True),
        (b"l", b"/workspace/x", True),
        (b"l", b".envrc", True),
        (b"l", b"x", False),
        (b".husky/l", b"x", True),
        (b"l", None, False),
    ],
)
def test_which_links_need_a_yes(path: bytes, target: bytes | None, is_hazard: bool) -> None:
    assert (find_hazard(path, target) is not None) == is_hazard


def test_more_ignored_names_than_a_pipe_holds_do_not_hold_up_the_export(tmp_path: Path) -> None:
    workspace, directory = tmp_path / "project", tmp_path / "state" / "sessions" / "s1"
    workspace.mkdir()
    (workspace / ".gitignore").write_text("build/\n")
    prepare_workspace(workspace, PATTERNS, directory).wait_base_tree()
    try:
        (directory / "upper" / "build").mkdir()
        for number in range(1500):  # over 300 KB of answers
            (directory / "upper" / "build" / f"{number:0200}").touch()
        (directory / "upper" / "seen").write_text("the control\n")
        exported: list[ExportedPatch] = []
        # In a thread that nobody waits for: what is tested may wait for ever.
        export = threading.Thread(
            target=lambda: exported.append(
                export_patch(directory, workspace, PATTERNS, directory / "patch.diff")
            ),
            daemon=True,
        )
        export.start()
        export.join(60)
        assert exported
        assert [file.path for file in exported[0].files] == [b"seen"]
        assert withheld(exported[0])[b"build"].endswith("(1500 new files)")
    finally:
        release_workspace(directory)


def test_a_mass_of_new_files_and_folders_is_bounded_and_hides_nothing_of_the_users(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (b"", b"src/", b"aaa/"):
        for number in range(20):
            session.write(folder + b"mass%d" % number, b"x\n")
    session.write(b"src/main.py", b"print(2)\n")
    session.delete(b"README.md")
    session.write(b"node_modules/late", b"x\n")
    everything = {file.path for file in session.export().files}  # the control: without a limit all is there
    assert len(everything) == 63
    monkeypatch.setattr(changes, "NEW_PATHS_MAX", 30)
    exported = session.export()
    kept = {file.path for file in exported.files}
    assert {b"src/main.py", b"README.md"} <= kept
    assert 20 <= len(kept) < 33
    told = [item for item in exported.withheld if "were not looked at" in item.reason]
    assert told
    assert {item.weight for item in told} == {"alarming"}


def test_folders_nested_by_the_thousand_do_not_keep_what_stands_beside_them_from_the_patch(
    session: Session,
) -> None:
    deep = os.open(session.upper, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir(b"d", dir_fd=deep)
        below = os.open(b"d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    session.write(b"zzz/beside/new.txt", b"x\n")
    exported = session.export()
    assert [file.path for file in exported.files] == [b"zzz/beside/new.txt"]
    (cut,) = [item for item in exported.withheld if "were not looked at" in item.reason]
    assert 300 < cut.path.count(b"/") < 2048


def test_build_products_do_not_use_up_what_new_work_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "NEW_PATHS_MAX", 30)
    workspace, directory = tmp_path / "project", tmp_path / "state" / "sessions" / "s1"
    workspace.mkdir()
    (workspace / ".gitignore").write_text("build/\n")
    prepare_workspace(workspace, PATTERNS, directory).wait_base_tree()
    try:
        for folder, count in (("build", 100), ("src", 5)):
            (directory / "upper" / folder).mkdir()
            for number in range(count):
                (directory / "upper" / folder / str(number)).touch()
        exported = export_patch(directory, workspace, PATTERNS, directory / "patch.diff")
        assert [file.path for file in exported.files] == [b"src/%d" % number for number in range(5)]
        assert b"build" in withheld(exported)
    finally:
        release_workspace(directory)
