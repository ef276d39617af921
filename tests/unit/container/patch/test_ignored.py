"""Build products stay out of a patch: which, by whose word, and nothing in silence. Real git, real files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sandbox.container.patch.export import export_patch
from sandbox.container.workspace.prepare import prepare_workspace, release_workspace
from sandbox.policy.paths import DenyPatterns

PATTERNS = DenyPatterns(["**/.env*", "**/secrets/**"])


class Project:
    """A workspace with an upper layer that a test fills."""

    def __init__(self, root: Path) -> None:
        self.workspace = root / "project"
        self.workspace.mkdir()
        self.directory = root / "state" / "sessions" / "s1"

    def start(self, files: Mapping[bytes, bytes]) -> None:
        for path, content in files.items():
            _put(self.workspace, path, content)
        prepare_workspace(self.workspace, PATTERNS, self.directory).wait_base_tree()

    def write(self, path: bytes, content: bytes = b"new\n") -> None:
        _put(self.directory / "upper", path, content)

    def delete(self, path: bytes) -> None:
        _put(self.directory / "upper", path, None)

    def export(self) -> tuple[set[bytes], dict[bytes, str]]:
        """The paths that the patch changes, and what is withheld with its reason."""
        exported = export_patch(self.directory, self.workspace, PATTERNS, self.directory / "patch.diff")
        return {file.path for file in exported.files}, {item.path: item.reason for item in exported.withheld}


def _put(root: Path, path: bytes, content: bytes | None) -> None:
    target = Path(os.fsdecode(os.fsencode(root) + b"/" + path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        os.mknod(target, stat.S_IFCHR, 0)
    else:
        target.write_bytes(content)


def _reason(count: int) -> str:
    return f"the project's .gitignore leaves it out ({count} new file{'s' if count > 1 else ''})"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    release_workspace(made.directory)


def test_new_files_that_the_project_ignores_are_withheld_and_counted_by_folder(project: Project) -> None:
    project.start({b".gitignore": b"build/\n*.pyc\n", b"src/a.py": b"1\n"})
    for path in (b"build/one", b"build/deep/two", b"src/a.pyc", b"src/b.py"):
        project.write(path)
    changed, withheld = project.export()
    assert changed == {b"src/b.py"}
    assert withheld == {b"build": _reason(2), b"src/a.pyc": _reason(1)}


def test_without_a_gitignore_nothing_is_left_out(project: Project) -> None:
    project.start({b"src/a.py": b"1\n"})
    project.write(b"build/one")
    assert project.export() == ({b"build/one"}, {})


def test_a_gitignore_that_the_task_writes_hides_nothing(project: Project) -> None:
    project.start({b"src/a.py": b"1\n", b"lib/.gitignore": b"*.o\n"})
    project.write(b".gitignore", b"*\n")
    project.write(b"src/.gitignore", b"*\n")
    project.write(b"lib/.gitignore", b"*\n")
    for path in (b"src/evil.py", b"evil", b"lib/evil", b"lib/x.o"):
        project.write(path)
    changed, withheld = project.export()
    assert changed == {
        b".gitignore",
        b"src/.gitignore",
        b"lib/.gitignore",
        b"src/evil.py",
        b"evil",
        b"lib/evil",
    }
    assert withheld == {b"lib/x.o": _reason(1)}  # the control: by the user's own


def test_a_gitignore_that_the_task_removes_still_counts(project: Project) -> None:
    project.start({b".gitignore": b"build/\n"})
    project.delete(b".gitignore")
    project.write(b"build/x")
    assert project.export() == ({b".gitignore"}, {b"build": _reason(1)})


def test_files_that_existed_are_never_left_out(project: Project) -> None:
    """Whether git tracks them nobody asks: that they were there is enough."""
    project.start(
        {b".gitignore": b"build/\n*.log\n", b"build/kept": b"1\n", b"a.log": b"1\n", b"b.log": b"1\n"}
    )
    project.write(b"build/kept", b"2\n")
    project.write(b"a.log", b"2\n")
    project.delete(b"b.log")
    project.write(b"build/new")
    assert project.export() == ({b"build/kept", b"a.log", b"b.log"}, {b"build": _reason(1)})


def test_nested_rules_and_negations_are_gits(project: Project) -> None:
    project.start(
        {
            b".gitignore": b"*.out\n/top\n",
            b"sub/.gitignore": b"!keep.out\n/only-here\n",
            b"sub/deep/.gitignore": b"*.txt\n",
        }
    )
    for path in (
        *(b"keep.out", b"sub/keep.out", b"sub/x.out", b"top", b"sub/top"),
        *(b"only-here", b"sub/only-here", b"sub/deep/a.txt", b"sub/b.txt"),
    ):
        project.write(path)
    changed, withheld = project.export()
    assert changed == {b"sub/keep.out", b"sub/top", b"only-here", b"sub/b.txt"}
    assert set(withheld) == {b"keep.out", b"sub/x.out", b"top", b"sub/only-here", b"sub/deep/a.txt"}


def test_a_file_in_the_place_of_an_ignored_folder_is_shown_and_the_loss_too(project: Project) -> None:
    project.start({b".gitignore": b"build/\n", b"build/a": b"1\n"})
    _put(project.directory / "upper", b"build", b"no folder\n")
    assert project.export() == ({b"build", b"build/a"}, {})


def test_an_ignored_file_in_the_place_of_a_folder_does_not_hide_what_was_lost(project: Project) -> None:
    project.start({b".gitignore": b"cache\n", b"cache/a": b"1\n"})
    _put(project.directory / "upper", b"cache", b"no folder\n")
    assert project.export() == ({b"cache/a"}, {b"cache": _reason(1)})


def test_a_folder_in_the_place_of_a_file_shows_that_the_file_is_gone(project: Project) -> None:
    project.start({b".gitignore": b"cache\n", b"cache": b"1\n"})
    project.write(b"cache/a")
    assert project.export() == ({b"cache"}, {b"cache": _reason(1)})


def test_a_hidden_gitignore_is_not_asked(tmp_path: Path, project: Project) -> None:
    project.start({b"secrets/.gitignore": b"*\n", b".gitignore": b"", b"x/a": b"1\n"})
    project.write(b"x/new")
    assert project.export() == ({b"x/new"}, {})


def test_a_gitignore_that_is_a_link_is_not_followed(tmp_path: Path, project: Project) -> None:
    (tmp_path / "outside").write_text("*\n")
    (project.workspace / ".gitignore").symlink_to(tmp_path / "outside")
    project.start({b"a": b"1\n"})
    project.write(b"new")
    assert project.export() == ({b"new"}, {})


@pytest.mark.parametrize(
    "name",
    [
        *(
            b":(exclude)x",
            b":!x",
            b":",
            b"!x",
            b"#x",
            b"*",
            b"[a]",
            b"a\nb",
            b'"q"',
            b"\xff",
            b" ",
            b"x ",
            b"\\",
        ),
        *(b"\xe2\x80\xae", b"\x1b[2J", b"-z", b"--stdin", b"...", b"..a"),
    ],
)
def test_odd_names_are_judged_like_any_other(project: Project, name: bytes) -> None:
    """By name alone they are kept, in an ignored folder withheld, each by itself."""
    project.start({b".gitignore": b"build/\n"})
    for path in (name, b"d/" + name, b"build/" + name, name + b"d/build/x"):
        project.write(path)
    changed, withheld = project.export()
    assert changed == {name, b"d/" + name}
    assert withheld == {b"build": _reason(1), name + b"d/build": _reason(1)}


def test_more_answers_than_a_pipe_holds_do_not_block(project: Project) -> None:
    """Question and answer are larger than both pipes: whoever only asks waits for ever."""
    project.start({b".gitignore": b"node_modules/\n"})
    for number in range(3000):
        project.write(b"node_modules/%s/%d.js" % (b"package" * 20, number), b"")
    project.write(b"real.js")
    assert project.export() == ({b"real.js"}, {b"node_modules": _reason(3000)})


def test_ignored_files_do_not_fill_the_patch_up(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.container.patch.changes.TOTAL_BYTES_MAX", 1000)
    project.start({b".gitignore": b"build/\n", b"src": b"1\n"})
    project.write(b"build/large", b"x" * 900)
    project.write(b"src", b"x" * 600)
    assert project.export() == ({b"src"}, {b"build": _reason(1)})


def test_rules_that_git_cannot_judge_hide_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file too large to be one, and a user who replaced it by a folder meanwhile."""
    project.start({b".gitignore": b"#" * 1024 * 1024 + b"\n*\n", b"sub/.gitignore": b"*\n"})
    (project.workspace / "sub" / ".gitignore").unlink()
    (project.workspace / "sub" / ".gitignore").mkdir()
    project.write(b"new")
    project.write(b"sub/new")
    assert project.export() == ({b"new", b"sub/new"}, {})
