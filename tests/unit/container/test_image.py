from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.image import blocked_paths, find_image, prepare_image
from sandbox.container.image_index import ImageIndex, index_image, read_index, resolve
from sandbox.errors import ImageError, StateError
from sandbox.policy.model import ShellPolicy
from tests.fakes.runtime import FakeRuntime

ID = "sha256:" + "a" * 64


class Tree:
    """A file system as a tar stream, as an engine exports it."""

    def __init__(self) -> None:
        self._content = io.BytesIO()
        self._archive = tarfile.TarFile(fileobj=self._content, mode="w")

    def file(self, name: str, content: bytes, mode: int = 0o755) -> Tree:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), mode
        self._archive.addfile(member, io.BytesIO(content))
        return self

    def symlink(self, name: str, target: str) -> Tree:
        return self._link(name, target, tarfile.SYMTYPE)

    def hardlink(self, name: str, target: str) -> Tree:
        return self._link(name, target, tarfile.LNKTYPE)

    def folder(self, name: str) -> Tree:
        member = tarfile.TarInfo(name)
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        self._archive.addfile(member)
        return self

    def chunks(self) -> Iterator[bytes]:
        self._archive.close()
        content = self._content.getvalue()
        yield from (content[start : start + 1000] for start in range(0, len(content), 1000))

    def index(self) -> ImageIndex:
        return read_index(ID, self.chunks())

    def _link(self, name: str, target: str, kind: bytes) -> Tree:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        self._archive.addfile(member)
        return self


def test_a_program_is_found_wherever_it_lies() -> None:
    index = (
        Tree().file("usr/bin/curl", b"1").file("opt/deep/down/curl", b"2").file("usr/bin/wget", b"3").index()
    )
    assert blocked_paths(index, ("curl",)) == ("/opt/deep/down/curl", "/usr/bin/curl")


def test_what_is_not_in_the_image_needs_no_cover() -> None:
    assert blocked_paths(Tree().file("usr/bin/ls", b"1").index(), ("curl", "sudo")) == ()


def test_what_is_no_program_is_left_alone() -> None:
    index = Tree().file("usr/share/completions/curl", b"text", 0o644).folder("etc/curl").index()
    assert blocked_paths(index, ("curl",)) == ()


def test_an_elf_file_without_the_bit_is_a_program_because_a_loader_runs_it() -> None:
    index = Tree().file("usr/lib/curl", b"\x7fELF...", 0o644).index()
    assert blocked_paths(index, ("curl",)) == ("/usr/lib/curl",)


def test_other_names_of_the_same_program_are_covered() -> None:
    index = (
        Tree()
        .file("usr/bin/curl", b"curl")
        .hardlink("usr/bin/fetch", "usr/bin/curl")
        .file("opt/copy", b"curl")
        .file("opt/other", b"other")
        .index()
    )
    assert blocked_paths(index, ("curl",)) == ("/opt/copy", "/usr/bin/curl", "/usr/bin/fetch")
    assert blocked_paths(index, ("fetch",)) == ("/opt/copy", "/usr/bin/curl", "/usr/bin/fetch")


def test_other_builds_under_a_name_with_a_version_are_covered() -> None:
    index = (
        Tree()
        .file("usr/bin/perl", b"static")
        .file("usr/bin/perl5.36-x86_64-linux-gnu", b"dynamic")
        .file("usr/bin/perlbug", b"script")
        .file("usr/bin/python3.11", b"3.11")
        .symlink("usr/bin/python3", "python3.11")
        .file("usr/bin/python3.12", b"3.12")
        .file("usr/bin/bzip2", b"bzip2")
        .file("usr/bin/gcc-12", b"gcc")
        .index()
    )
    assert blocked_paths(index, ("perl",)) == ("/usr/bin/perl", "/usr/bin/perl5.36-x86_64-linux-gnu")
    assert blocked_paths(index, ("python3",)) == ("/usr/bin/python3.11", "/usr/bin/python3.12")
    assert blocked_paths(index, ("gcc",)) == ("/usr/bin/gcc-12",)
    # Names of their own, and what the policy allows under a name of its own.
    assert blocked_paths(index, ("bzip",)) == ()
    assert blocked_paths(index, ("python",), ("python3", "python3.12")) == ()


def test_links_are_followed_through_merged_folders_and_alternatives() -> None:
    index = (
        Tree()
        .symlink("bin", "usr/bin")
        .symlink("usr/bin/awk", "/etc/alternatives/awk")
        .symlink("etc/alternatives/awk", "/bin/mawk")
        .file("usr/bin/mawk", b"mawk")
        .index()
    )
    assert resolve(index, "/bin/awk") == "/usr/bin/mawk"
    assert blocked_paths(index, ("awk",)) == ("/usr/bin/mawk",)


def test_links_cannot_leave_the_image_and_loops_end() -> None:
    index = (
        Tree()
        .symlink("usr/bin/up", "../../../../../usr/bin/real")
        .file("usr/bin/real", b"x")
        .symlink("a", "b")
        .symlink("b", "a")
        .symlink("usr/bin/dangling", "nowhere")
        .index()
    )
    assert resolve(index, "/usr/bin/up") == "/usr/bin/real"
    assert resolve(index, "/a") == ""
    assert blocked_paths(index, ("a", "dangling")) == ()


def busybox(*applets: str) -> Tree:
    words = b"\0".join(name.encode() for name in applets)
    return Tree().file("bin/busybox", b"\x7fELF BusyBox v1.36.1\0" + words + b"\0")


def test_one_applet_of_many_cannot_be_blocked_alone() -> None:
    index = busybox("rm", "sh").symlink("bin/rm", "busybox").symlink("bin/sh", "/bin/busybox").index()
    with pytest.raises(ImageError, match=r"cannot block rm .*/bin/busybox.*block busybox as well"):
        blocked_paths(index, ("rm",))
    assert blocked_paths(index, ("rm", "busybox", "sh")) == ("/bin/busybox",)


def test_an_applet_without_a_link_is_found_in_the_binary() -> None:
    tree = busybox("rm", "sh").file("bin/rm", b"coreutils")
    index = tree.index()
    with pytest.raises(ImageError, match="has it as an applet"):
        blocked_paths(index, ("rm",))
    assert blocked_paths(index, ("curl",)) == ()


def test_an_applet_table_is_found_across_the_chunks_it_is_read_in() -> None:
    padding = b"\x7fELF BusyBox v1\0" + b"x" * (1024 * 1024 - 18)
    index = Tree().file("bin/busybox", padding + b"\0wget\0").index()
    with pytest.raises(ImageError, match="cannot block wget"):
        blocked_paths(index, ("wget",))


def test_a_binary_of_many_names_is_many_programs_whatever_it_is_called() -> None:
    tree = Tree().file("usr/bin/box", b"box")
    for name in ("rm", "ls", "cp", "mv", "cat", "ln", "dd", "df"):
        tree.symlink(f"usr/bin/{name}", "box")
    with pytest.raises(ImageError, match="cannot block rm"):
        blocked_paths(tree.index(), ("rm",))


def test_blocking_that_takes_an_allowed_program_along_is_refused() -> None:
    index = Tree().file("usr/bin/python3.11", b"py").symlink("usr/bin/python3", "python3.11").index()
    assert blocked_paths(index, ("python3",), ("git",)) == ("/usr/bin/python3.11",)
    with pytest.raises(ImageError, match=r"also python3.11, which shell.allowed_binaries lists"):
        blocked_paths(index, ("python3",), ("python3.11",))


def test_a_name_given_with_its_path_is_blocked_by_name() -> None:
    index = Tree().file("usr/bin/curl", b"1").index()
    assert blocked_paths(index, ("/usr/bin/curl",)) == ("/usr/bin/curl",)


def test_a_stream_that_is_no_tar_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="no tar stream"):
        read_index(ID, iter([b"garbage" * 1000]))


class Source:
    """Counts how often an image is read."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.reads = tree, 0

    async def read_image(
        self, image_id: str, labels: dict[str, str], consume: Callable[[Iterator[bytes]], Any]
    ) -> Any:
        self.reads += 1
        assert labels == {"agent-runner.session": "image-index", "agent-runner.owner": "me"}
        return consume(self.tree.chunks())


async def test_an_image_is_read_once_and_the_index_is_private(tmp_path: Path) -> None:
    source = Source(busybox("rm").symlink("bin/rm", "busybox"))
    first = await index_image(source, ID, tmp_path, "me")
    assert await index_image(source, ID, tmp_path, "me") == first
    assert source.reads == 1
    (cache,) = (tmp_path / "images").iterdir()
    assert cache.name == f"{'a' * 64}.json"
    assert cache.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 0}', "null", '{"version": 2, "image_id": "x"}']
)
async def test_an_index_that_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    source = Source(Tree().file("usr/bin/curl", b"1"))
    first = await index_image(source, ID, tmp_path, "me")
    (cache,) = (tmp_path / "images").iterdir()
    cache.write_text(damage)
    source.tree = Tree().file("usr/bin/curl", b"1")
    assert await index_image(source, ID, tmp_path, "me") == first
    assert source.reads == 2
    assert json.loads(cache.read_text())["image_id"] == ID


async def test_a_state_directory_that_cannot_hold_the_index_is_a_state_error(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where the folder goes")
    with pytest.raises(StateError, match="cannot keep the image index"):
        await index_image(Source(Tree()), ID, tmp_path, "me")


async def test_an_absent_image_names_the_way_to_get_it() -> None:
    runtime = FakeRuntime(images={})
    with pytest.raises(ImageError, match="run make dev"):
        await find_image(runtime)
    with pytest.raises(ImageError, match="run docker pull other/image:1"):
        await find_image(runtime, "other/image:1")


async def test_a_prepared_image_names_what_to_cover_and_its_shell(tmp_path: Path) -> None:
    tree = Tree().file("usr/bin/curl", b"1").file("bin/sh", b"2").file("usr/bin/bash", b"3")
    runtime, source = FakeRuntime({"x": ID}), Source(tree)

    async def prepare(*blocked: str) -> tuple[str, ...]:
        image = await prepare_image(
            runtime,
            source,
            "x",
            ShellPolicy(blocked_commands=blocked),
            refusal_binary="/refused",
            state=tmp_path,
            owner="me",
        )
        assert (image.image_id, image.refusal_binary) == (ID, "/refused")
        return (image.shell, *image.blocked_paths)

    assert await prepare() == ("/usr/bin/bash",)
    assert await prepare("curl") == ("/usr/bin/bash", "/usr/bin/curl")
    assert await prepare("bash") == ("/bin/sh", "/usr/bin/bash")
    with pytest.raises(ImageError, match="no shell that is not blocked"):
        await prepare("bash", "sh")


async def test_a_prepared_image_names_where_it_keeps_the_roots_it_trusts(tmp_path: Path) -> None:
    tree = (
        Tree()
        .file("bin/sh", b"1")
        .file("etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", b"2", 0o444)
        .symlink("etc/pki/tls/certs/ca-bundle.crt", "../../ca-trust/extracted/pem/tls-ca-bundle.pem")
        .file("etc/ssl/certs/some-root.pem", b"3", 0o644)
        .file("opt/jdk/lib/security/cacerts", b"4", 0o644)
        .file("opt/cacerts", b"5", 0o644)
    )
    source = Source(tree)
    for _ in range(2):  # read from the image, then from the kept index
        image = await prepare_image(
            FakeRuntime({"x": ID}),
            source,
            "x",
            ShellPolicy(),
            refusal_binary="/refused",
            state=tmp_path,
            owner="me",
        )
        assert image.bundles == ("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",)
        assert image.truststores == ("/opt/jdk/lib/security/cacerts",)
    assert source.reads == 1
