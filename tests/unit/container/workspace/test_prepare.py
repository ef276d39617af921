"""Preparing and releasing a workspace, against the real kernel; no engine needed.

Where these run as root, mounts are real; as an ordinary user the id-mapped ones are skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.container.workspace.idmap import Exchange
from sandbox.container.workspace.mounts import list_mounts_beneath
from sandbox.container.workspace.prepare import (
    SANDBOX_UID,
    PreparedWorkspace,
    check_workspace,
    describe_workspace,
    prepare_workspace,
    release_workspace,
)
from sandbox.container.workspace.survey import leaves_workspace, read_manifest
from sandbox.digest import blake3_hex
from sandbox.errors import StateError, WorkspaceError
from sandbox.policy.paths import DenyPatterns

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a controller running as root")
NOTHING = DenyPatterns([])
SECRETS = DenyPatterns(["**/.env*", "**/secrets/**"])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "src" / "main.py").write_text("print()\n")
    (root / ".env").write_text("KEY=1\n")
    (root / "deep" / "secrets").mkdir(parents=True)
    (root / "deep" / "secrets" / "key").write_text("s\n")
    (root / "deep").chmod(0o750)
    return root


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "state" / "sessions" / "s1"
    yield directory
    release_workspace(directory)
    assert not list_mounts_beneath(os.fsencode(tmp_path))


def snapshot(root: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    """Everything about a tree that must not change."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        entry = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(entry.st_mode) else b""
        found[str(path)] = (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_mtime_ns, content)
    return found


def is_whiteout(path: Path) -> bool:
    entry = path.lstat()
    return stat.S_ISCHR(entry.st_mode) and entry.st_rdev == 0


def test_each_hidden_path_gets_one_whiteout_beneath_copies_of_its_parents(
    workspace: Path, session: Path
) -> None:
    before = snapshot(workspace)
    prepared = prepare_workspace(workspace, SECRETS, session)
    mask = session / "mask"
    assert {path.relative_to(mask).as_posix() for path in mask.rglob("*")} == {".env", "deep", "deep/secrets"}
    assert is_whiteout(mask / ".env")
    assert is_whiteout(mask / "deep" / "secrets")
    assert stat.S_IMODE((mask / "deep").stat().st_mode) == 0o750
    assert (mask / "deep").stat().st_mtime_ns == (workspace / "deep").stat().st_mtime_ns
    assert prepared.hidden == 2
    assert prepared.files == 1
    assert prepared.volume.name == "agent-runner-s1"
    assert prepared.volume.lower == (str(mask), str(session / "lower"))
    assert (session / "lower" / "src" / "main.py").read_text() == "print()\n"
    assert stat.S_IMODE(session.stat().st_mode) == 0o700
    assert snapshot(workspace) == before


@needs_root
def test_a_root_controller_shows_roots_files_as_the_sandboxs_and_writes_nothing(
    workspace: Path, session: Path
) -> None:
    prepared = prepare_workspace(workspace, SECRETS, session)
    assert (prepared.uid, prepared.gid) == (SANDBOX_UID, SANDBOX_UID)
    assert (session / "lower" / "src" / "main.py").stat().st_uid == SANDBOX_UID
    assert (workspace / "src" / "main.py").stat().st_uid == 0  # the control
    assert (session / "upper").stat().st_uid == SANDBOX_UID
    assert (session / "mask" / "deep").stat().st_uid == SANDBOX_UID
    with pytest.raises(OSError, match="Read-only"):
        (session / "lower" / "new").touch()


@needs_root
def test_another_owner_is_exchanged_too_and_an_owner_with_the_right_id_needs_no_mount(
    workspace: Path, session: Path
) -> None:
    for path in [workspace, *workspace.rglob("*")]:
        os.chown(path, 4242, 4343)
    assert prepare_workspace(workspace, SECRETS, session).uid == SANDBOX_UID
    assert (session / "lower" / "src").stat().st_uid == SANDBOX_UID
    assert (session / "lower" / "src").stat().st_gid == SANDBOX_UID
    release_workspace(session)
    for path in [workspace, *workspace.rglob("*")]:
        os.chown(path, 777, 777)
    assert prepare_workspace(workspace, SECRETS, session, uid=777).uid == 777
    assert (session / "lower").is_symlink()


def test_an_exchange_is_a_permutation_of_all_ids() -> None:
    for first, second in [(0, 10001), (10001, 0), (5, 6), (0, 4294967294), (7, 7)]:
        ranges = [tuple(map(int, line.split())) for line in Exchange(first, second).as_map().splitlines()]
        assert sum(count for _, _, count in ranges) == 4294967295
        seen = {inside: outside for inside, outside, count in ranges if count == 1}
        assert first == second or (seen[first], seen[second]) == (second, first)
        assert (Exchange(first, second).seen(first), Exchange(first, second).seen(second)) == (second, first)


def test_the_sandbox_is_never_root(workspace: Path, session: Path) -> None:
    with pytest.raises(WorkspaceError, match="uid 0"):
        prepare_workspace(workspace, NOTHING, session, uid=0)


def test_a_second_name_of_a_hidden_file_is_hidden(workspace: Path, session: Path) -> None:
    os.link(workspace / ".env", workspace / "src" / "innocent.txt")
    os.link(workspace / "deep" / "secrets" / "key", workspace / "other.txt")
    (workspace / "a").write_text("same inode, nothing hidden")
    os.link(workspace / "a", workspace / "b")
    prepared = prepare_workspace(workspace, SECRETS, session)
    assert is_whiteout(session / "mask" / "src" / "innocent.txt")
    assert is_whiteout(session / "mask" / "other.txt")
    assert not (session / "mask" / "a").exists()
    assert prepared.files == 3  # main.py, a, b


def test_a_pattern_is_taken_from_names_that_are_not_text(workspace: Path, session: Path) -> None:
    for name in (b"\xff\xfe.env", b".env\xff", b"new\nline", b'q"uo\\te', b"[id].ts"):
        Path(os.fsdecode(os.fsencode(workspace) + b"/" + name)).write_text("x")
    prepared = prepare_workspace(workspace, SECRETS, session)
    mask = [os.fsencode(path.name) for path in (session / "mask").iterdir()]
    assert b".env\xff" in mask
    assert b"\xff\xfe.env" not in mask
    assert prepared.files == 5
    assert prepared.base_tree_blake3 == blake3_hex((session / "base.tree").read_bytes())
    manifest = dict(read_manifest((session / "base.tree").read_bytes()))
    assert {b"new\nline", b'q"uo\\te', b"\xff\xfe.env", b"[id].ts"} < manifest.keys()


@pytest.mark.parametrize("name", ["a:b", "a,b", "with space", "new\nline", "back\\slash", 'q"uote', "\udcff"])
def test_a_workspace_path_may_hold_what_mount_options_cannot(
    tmp_path: Path, session: Path, name: str
) -> None:
    root = tmp_path / name
    root.mkdir()
    (root / "f").write_text("x")
    prepare_workspace(root, NOTHING, session)
    assert (session / "lower" / "f").read_text() == "x"


def test_the_base_digest_follows_the_visible_tree_only(workspace: Path, session: Path) -> None:
    def digest() -> str:
        found = prepare_workspace(workspace, SECRETS, session).base_tree_blake3
        release_workspace(session)
        return found

    first = digest()
    assert digest() == first
    (workspace / ".env").write_text("changed\n")
    (workspace / ".env.local").write_text("new\n")
    assert digest() == first
    (workspace / "link").symlink_to("src")
    second = digest()
    (workspace / "link").unlink()
    (workspace / "link").symlink_to("srd")
    third = digest()
    (workspace / "src" / "main.py").chmod(0o755)
    assert len({first, second, third, digest()}) == 4


def test_symlinks_that_leave_are_named_and_allowed(workspace: Path, session: Path) -> None:
    (workspace / "out").symlink_to("/etc/passwd")
    (workspace / "src" / "up").symlink_to("../../x")
    (workspace / "src" / "fine").symlink_to("../deep")
    warnings = prepare_workspace(workspace, SECRETS, session).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("2 symlinks lead out")
    assert "out, src/up" in warnings[0]


def test_where_a_links_text_leads() -> None:
    assert leaves_workspace(b"a/b", b"../../c")
    assert leaves_workspace(b"a", b"/workspace/x")
    assert not leaves_workspace(b"a/b", b"../c")
    assert not leaves_workspace(b"a", b"b/../c")


def test_a_linked_worktree_is_named(workspace: Path, session: Path) -> None:
    (workspace / ".git").write_text("gitdir: /elsewhere\n")
    assert any(
        ".git is a file" in warning for warning in prepare_workspace(workspace, SECRETS, session).warnings
    )


def _add_fifo(root: Path) -> None:
    os.mkfifo(root / "src" / "pipe")


def _add_socket(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root / "src")  # the path of a socket is short
        try:
            server.bind("pipe")
        finally:
            os.chdir(here)


def _add_device(root: Path) -> None:
    os.mknod(root / "src" / "pipe", stat.S_IFCHR, 0)


@pytest.mark.parametrize(
    ("add", "kind"), [(_add_fifo, "FIFO"), (_add_socket, "socket"), (_add_device, "character device")]
)
def test_special_files_are_refused_unless_hidden(
    workspace: Path, session: Path, add: Callable[[Path], None], kind: str
) -> None:
    add(workspace)
    with pytest.raises(WorkspaceError, match=f"src/pipe is a {kind}; remove it or hide it") as caught:
        prepare_workspace(workspace, SECRETS, session)
    assert "\n" not in str(caught.value)
    assert not session.exists() or not list(session.iterdir())
    assert prepare_workspace(workspace, DenyPatterns(["pipe"]), session).hidden == 1


def test_files_the_sandbox_could_not_read_are_refused_unless_hidden(workspace: Path, session: Path) -> None:
    (workspace / "src" / "locked").write_text("x")
    (workspace / "src" / "locked").chmod(0)
    with pytest.raises(WorkspaceError, match="src/locked is not readable"):
        check_workspace(workspace, session, SECRETS)
    prepared = prepare_workspace(workspace, SECRETS, session)
    with pytest.raises(WorkspaceError, match="src/locked is not readable"):
        prepared.wait_base_tree()
    release_workspace(session)
    assert prepare_workspace(workspace, DenyPatterns(["locked"]), session).hidden == 1


@needs_root
def test_a_mount_beneath_the_workspace_is_refused_unless_hidden(workspace: Path, session: Path) -> None:
    (workspace / "mnt").mkdir()
    subprocess.run(["mount", "--bind", str(workspace / "src"), str(workspace / "mnt")], check=True)
    try:
        with pytest.raises(WorkspaceError, match="mnt is a mount of its own"):
            prepare_workspace(workspace, SECRETS, session)
        assert prepare_workspace(workspace, DenyPatterns(["mnt"]), session).hidden == 1
        release_workspace(session)
    finally:
        subprocess.run(["umount", str(workspace / "mnt")], check=True)


def test_bad_places_are_refused(tmp_path: Path, workspace: Path, session: Path) -> None:
    with pytest.raises(WorkspaceError, match="does not exist"):
        check_workspace(tmp_path / "absent", session)
    with pytest.raises(WorkspaceError, match="not a directory"):
        check_workspace(workspace / ".env", session)
    with pytest.raises(WorkspaceError, match=r"state directory .* lies in it"):
        check_workspace(workspace, workspace / "state" / "s")
    with pytest.raises(WorkspaceError, match="lies in the state directory"):
        check_workspace(workspace, tmp_path / "s")
    with pytest.raises(StateError, match="cannot carry that path"):
        check_workspace(workspace, tmp_path / "st:ate" / "s")
    with pytest.raises(StateError, match="name a volume"):
        check_workspace(workspace, tmp_path / "state" / "a b")
    assert not (tmp_path / "st:ate").exists()


@needs_root
@pytest.mark.parametrize("kind", ["overlay", "vfat"])
def test_a_state_directory_that_cannot_hold_an_upper_layer_is_refused(
    tmp_path: Path, workspace: Path, kind: str
) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    if kind == "overlay":
        for name in ("l", "u", "w"):
            (tmp_path / name).mkdir()
        options = f"lowerdir={tmp_path}/l,upperdir={tmp_path}/u,workdir={tmp_path}/w"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(point)], check=True)
    else:
        if shutil.which("mkfs.vfat") is None:
            pytest.skip("mkfs.vfat is not installed")
        subprocess.run(["truncate", "-s", "4M", str(tmp_path / "img")], check=True)
        subprocess.run(["mkfs.vfat", str(tmp_path / "img")], check=True, capture_output=True)
        if subprocess.run(["mount", "-o", "loop", str(tmp_path / "img"), str(point)], check=False).returncode:
            pytest.skip("this kernel mounts no vfat image")
    try:
        with pytest.raises(StateError, match=f"{kind} cannot hold .*AGENT_RUNNER_STATE"):
            check_workspace(workspace, point / "sessions" / "s")
        assert not list(point.iterdir())
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_tmpfs_without_user_attributes_is_refused_or_works(workspace: Path, session: Path) -> None:
    directory = Path("/dev/shm/agent-runner-test") / str(os.getpid()) / "s"
    try:
        assert check_workspace(workspace, directory, SECRETS) == ()
    except StateError as exc:
        assert "AGENT_RUNNER_STATE" in str(exc)
    assert not directory.exists()


def test_the_same_session_is_not_prepared_twice(workspace: Path, session: Path) -> None:
    prepare_workspace(workspace, SECRETS, session)
    with pytest.raises(StateError, match="already"):
        prepare_workspace(workspace, SECRETS, session)
    assert (session / "mask" / ".env").lstat()


def fill_upper(upper: Path) -> None:
    """What a hostile task leaves: locked folders, links to the user's files, a pit of folders."""
    (upper / "locked" / "inner").mkdir(parents=True)
    (upper / "locked" / "inner" / "f").write_text("x")
    (upper / "locked" / "inner").chmod(0)
    (upper / "locked").chmod(0)
    descriptor = os.open(upper, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def test_release_removes_everything_but_the_users_files(workspace: Path, session: Path) -> None:
    before = snapshot(workspace)
    prepare_workspace(workspace, SECRETS, session)
    upper = session / "upper"
    fill_upper(upper)
    (upper / "link").symlink_to(workspace)
    (upper / "up").symlink_to("../lower")
    (session / "keep.jsonl").write_text("the record\n")
    release_workspace(session)
    assert [path.name for path in session.iterdir()] == ["keep.jsonl"]
    assert snapshot(workspace) == before
    release_workspace(session)
    release_workspace(session.parent / "never-existed")


def test_release_removes_what_a_killed_removal_had_set_aside(workspace: Path, session: Path) -> None:
    prepare_workspace(workspace, SECRETS, session)
    (session / ".removing-0123456789abcdef" / "deep").mkdir(parents=True)
    (session / "removing-of-somebody-else").mkdir()
    release_workspace(session)
    assert [path.name for path in session.iterdir()] == ["removing-of-somebody-else"]


@needs_root
def test_without_the_unmount_the_users_files_are_in_reach_and_still_survive(
    workspace: Path, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_workspace(workspace, SECRETS, session)
    # Read-write, unlike ours, and in places where no mount of ours is: the worst that could be found.
    for name in ("lower", "mask", "upper/in"):
        (session / name).mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", str(workspace), str(session / name)], check=True)
    assert (session / "upper" / "in" / "src" / "main.py").exists()  # the control: it is in reach
    before = snapshot(workspace)
    with monkeypatch.context() as patched:
        patched.setattr("sandbox.container.workspace.prepare.unmount_beneath", lambda directory: None)
        with pytest.raises(WorkspaceError):
            release_workspace(session)
    assert snapshot(workspace) == before
    release_workspace(session)
    assert not list(session.iterdir())
    assert snapshot(workspace) == before


def test_a_removal_without_those_guards_would_destroy_files(tmp_path: Path, workspace: Path) -> None:
    """The control of the two tests above: the bait is real, a naive removal swallows it."""
    link = tmp_path / "naive"
    link.mkdir()
    (link / "lower").symlink_to(workspace)
    subprocess.run(["rm", "-rf", f"{link}/lower/"], check=False)
    subprocess.run(["find", "-L", str(link), "-mindepth", "1", "-delete"], check=False, capture_output=True)
    assert not (workspace / "src" / "main.py").exists()


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("mask", "upper", "work", "lower"):
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "thesis.txt").write_text("years\n")
    release_workspace(tmp_path / "project")
    assert len(list((tmp_path / "project").rglob("thesis.txt"))) == 4


def test_a_lower_that_holds_files_after_unmounting_is_never_descended_into(
    workspace: Path, session: Path
) -> None:
    prepare_workspace(workspace, SECRETS, session)
    release_workspace(session)
    (session / ".agent-runner-workspace").touch()
    (session / "lower").mkdir()
    (session / "lower" / "thesis.txt").write_text("years\n")
    with pytest.raises(WorkspaceError, match="refusing to remove"):
        release_workspace(session)
    assert (session / "lower" / "thesis.txt").exists()
    (session / "lower" / "thesis.txt").unlink()


def test_a_session_directory_behind_a_symlink_is_not_entered(workspace: Path, session: Path) -> None:
    prepare_workspace(workspace, SECRETS, session)
    link = session.parent / "link"
    link.symlink_to(session)
    with pytest.raises(WorkspaceError):
        release_workspace(link)
    assert (session / "mask").exists()


_PREPARE = """
import os, signal, sys
from pathlib import Path
import sandbox.container.workspace.prepare as module
from sandbox.policy.paths import DenyPatterns
step = sys.argv[3]
if step != "end":
    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, step, stop)
module.prepare_workspace(Path(sys.argv[1]), DenyPatterns(["**/.env*"]), Path(sys.argv[2])).wait_base_tree()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("step", ["_make_mask", "_look_like", "_make_lower", "_start_survey", "end"])
def test_what_a_killed_controller_left_is_released(workspace: Path, session: Path, step: str) -> None:
    before = snapshot(workspace)
    done = subprocess.run([sys.executable, "-c", _PREPARE, str(workspace), str(session), step], check=False)
    assert done.returncode == -9
    assert list(session.iterdir())
    release_workspace(session)
    assert not list(session.iterdir())
    assert snapshot(workspace) == before


def test_a_failure_halfway_leaves_nothing(
    workspace: Path, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "lower")

    monkeypatch.setattr("sandbox.container.workspace.prepare._start_survey", fail)
    with pytest.raises(StateError, match="No space left"):
        prepare_workspace(workspace, SECRETS, session)
    assert not list(session.iterdir())


def test_what_is_returned_can_be_compared(workspace: Path, session: Path) -> None:
    prepared = prepare_workspace(workspace, SECRETS, session)
    assert isinstance(prepared, PreparedWorkspace)
    assert prepared.volume.upper == str(session / "upper")
    assert prepared.volume.flags == ("userxattr", "nosuid", "nodev")


def test_the_survey_can_be_asked_after_the_release_and_leaves_nothing(workspace: Path, session: Path) -> None:
    prepared = prepare_workspace(workspace, SECRETS, session)
    release_workspace(session)
    assert prepared.base_tree_blake3
    assert not list(session.iterdir())


def test_a_described_workspace_is_the_one_that_is_prepared(workspace: Path, session: Path) -> None:
    described = describe_workspace(workspace, session)
    assert not session.exists()
    prepared = prepare_workspace(workspace, SECRETS, session)
    assert described == (prepared.volume, prepared.uid, prepared.gid)
