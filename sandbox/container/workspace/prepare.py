"""Prepare the workspace of one session as a filtered overlay, and take it away again. D4

In the session's directory:

- ``mask``: a whiteout for every hidden path, beneath copies of the directories that lead there;
- ``lower``: the user's directory: a symlink to it, or (controller is root) an id-mapped mount of it.
  Either way a plain name: overlay options cannot carry a path with ``:``, ``,`` or a newline;
- ``upper`` and ``work``: what the session changes, in ``layers`` when a filesystem of their own bounds
  them (``layers.img``, see ``quota``); ``base.tree``: what it started from;
- ``reserve``: space kept for the patch until it is made.

The engine mounts it (``OverlayVolume``). The user's directory is never written to.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from sandbox.container.spec import OverlayVolume
from sandbox.container.workspace.beneath import ASIDE_PREFIX, opened, opened_root, remove_beneath
from sandbox.container.workspace.hidden import Hidden, find_appeared, find_hidden, show
from sandbox.container.workspace.idmap import Exchange, mount_exchanged
from sandbox.container.workspace.mounts import find_filesystem, unmount_beneath
from sandbox.container.workspace.quota import (
    IMAGE,
    LAYERS,
    Disk,
    DiskQuota,
    LayersFilesystem,
    check_free_space,
    find_layers,
    find_obstacle_at_sight,
)
from sandbox.container.workspace.survey import BaseTree, Identity, survey_workspace
from sandbox.container.workspace.upperfs import check_upper_filesystem
from sandbox.errors import StateError, WorkspaceError
from sandbox.policy.paths import DenyPatterns

SANDBOX_UID = 10001
"""Uid and gid inside when the controller is root; no account needs to exist for it."""

MANIFEST = "base.tree"
UPPER = "upper"
PATCH_REPOSITORY = "patch.git"
"""Where the patch is made, for moments only; named here so that a killed controller's is removed."""

RESERVE = "reserve"
RESERVE_BYTES = 16 * 1024 * 1024
"""Set aside while the session runs: a task that fills the disk must not cost the patch of its work."""

# Overlayfs refuses lower layers that compare names in their own way.
_NEVER_LOWER = frozenset(("vfat", "msdos", "exfat", "ntfs", "ntfs3", "hfs", "hfsplus"))

_SHOWN = 5
"""Paths named in one warning; the rest is counted."""

_OPTIONS_MAX = 3500
"""Bytes all paths of the mount may take: the kernel reads one page of options."""


@dataclass(frozen=True)
class PreparedWorkspace:
    """A workspace that the engine can mount; its survey may still be under way."""

    session_directory: Path
    volume: OverlayVolume
    uid: int
    """Whom processes inside must run as; never 0."""
    gid: int
    hidden: int
    """Hidden paths; a hidden directory counts once."""
    survey: Future[BaseTree]
    """Runs while the engine creates the container."""
    disk: Disk | None = None
    """What bounds the layers; None when no quota was asked for."""

    def wait_base_tree(self) -> BaseTree:
        """Wait for the survey, write the manifest that ``export_patch`` needs, and return the tree.

        Call it before the first command is run. Raises WorkspaceError for files the sandbox could not
        read, StateError when the manifest cannot be written. Blocking; call it as often as you like.
        """
        found = self.survey.result()
        try:
            # Not after the release: nothing would remove it again.
            if (self.session_directory / _MARKER).exists():
                _write_once(self.session_directory / MANIFEST, found.manifest)
        except OSError as exc:
            raise StateError(
                f"cannot write in {self.session_directory}: {exc.strerror}; free space there"
            ) from exc
        return found

    @property
    def base_tree_blake3(self) -> str:
        """Digest of the visible tree; waits for the survey as ``wait_base_tree`` does."""
        return self.wait_base_tree().blake3

    @property
    def files(self) -> int:
        """Visible files and symlinks; waits for the survey."""
        return self.wait_base_tree().files

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works differently inside, one line each; waits for the survey."""
        return (*self.wait_base_tree().warnings, *(self.disk.warnings if self.disk else ()))


def prepare_workspace(
    workspace: Path,
    patterns: DenyPatterns,
    session_directory: Path,
    *,
    uid: int | None = None,
    quota: DiskQuota | None = None,
) -> PreparedWorkspace:
    """Build everything the overlay needs in ``session_directory``, which is created (0700) if missing.

    ``uid`` is the user inside: missing means 10001 for a root controller and the caller's own
    otherwise, who can have no other. ``quota`` bounds what the session writes; None leaves that to the
    caller. Returns as soon as the engine can mount: the survey of sizes, modes
    and times goes on in a thread that only reads (``wait_base_tree``). Raises WorkspaceError or
    StateError with one line to act on; nothing is left behind then. Release it with
    ``release_workspace``.
    """
    source, identity = _check_places(workspace, session_directory, uid)
    hidden = find_hidden(source, patterns)
    _create_private(session_directory)
    taken = [name for name in (_MARKER, _LOWER, *_OWNED) if os.path.lexists(session_directory / name)]
    if taken:
        raise StateError(
            f"cannot prepare a workspace in {session_directory}: {taken[0]} is there already; "
            "use a new session, or remove this one with agent-runner gc"
        )
    try:
        return _build(source, hidden, identity, session_directory, quota)
    except OSError as exc:
        release_workspace(session_directory)
        raise StateError(
            f"cannot prepare the workspace in {session_directory}: {exc.strerror} at {exc.filename!r}; "
            "free space there or set AGENT_RUNNER_STATE"
        ) from exc
    except BaseException:
        release_workspace(session_directory)
        raise


def check_workspace(
    workspace: Path,
    session_directory: Path,
    patterns: DenyPatterns | None = None,
    *,
    uid: int | None = None,
) -> tuple[str, ...]:
    """Refuse what ``prepare_workspace`` would refuse, and return its warnings; leaves nothing behind."""
    source, identity = _check_places(workspace, session_directory, uid)
    hidden = find_hidden(source, patterns or DenyPatterns(()))
    return survey_workspace(source, hidden.paths, identity).warnings


def describe_workspace(
    workspace: Path, session_directory: Path, quota: DiskQuota | None = None
) -> tuple[OverlayVolume, int, int]:
    """Return the volume, uid and gid that ``prepare_workspace`` would give; makes nothing."""
    _, identity = _check_places(workspace, session_directory, None)
    session = session_directory.resolve()
    if quota is None or find_obstacle_at_sight():
        return _volume(session, session), identity.uid, identity.gid
    most = Disk(session, quota, "filesystem").most_bytes
    return _volume(session, session / LAYERS, most), identity.uid, identity.gid


def find_uncovered(workspace: Path, patterns: DenyPatterns, session_directory: Path) -> tuple[str, ...]:
    """Name what patterns match and the mask does not cover: one warning, or nothing. Before the release."""
    mask = os.fsencode(session_directory.resolve() / _MASK)
    appeared = find_appeared(os.fsencode(workspace.resolve()), patterns, mask)
    if not appeared:
        return ()
    shown = ", ".join(show(path) for path in appeared[:_SHOWN]) + (" …" if len(appeared) > _SHOWN else "")
    return (
        f"{len(appeared)} paths that deny patterns match were made on the host while the session ran, and "
        f"were visible inside: {shown}",
    )


def keep_changes(session_directory: Path, folder: Path, image: Path) -> None:
    """Keep a session's changes where the release does not remove them: as ``folder``, else as an ``image``.

    An image is kept whole: copying what a task made could fill the disk, or never end. Raises
    WorkspaceError or OSError.
    """
    session = session_directory.resolve()
    if find_layers(session) == session:
        (session / UPPER).rename(folder)
        return
    unmount_beneath(os.fsencode(session))  # which writes it out
    (session / IMAGE).rename(image)


def release_workspace(session_directory: Path) -> None:
    """Unmount and remove all that ``prepare_workspace`` and the overlay left; idempotent.

    Export the patch first: the upper layer goes too. Needs nothing but the path, so the reaper can
    clean up after a killed controller. The user's files are beneath a mount or behind a symlink here:
    a directory without our marker is left alone, every mount beneath it is gone before anything is
    removed, ``lower`` itself is never descended into, and no removal enters a mount or follows a
    link. Raises WorkspaceError when something stays; calling again goes on from there.
    """
    try:
        with opened_root(session_directory) as directory:
            if not _is_marked(directory):
                return
            unmount_beneath(os.readlink(b"/proc/self/fd/%d" % directory))
            _remove_lower(directory, session_directory)
            # Deep folders are set aside under names of their own; a killed removal leaves some.
            aside = [name for name in os.listdir(directory) if name.startswith(ASIDE_PREFIX.decode())]
            for name in (*_OWNED, *aside):
                remove_beneath(directory, os.fsencode(name))
            os.unlink(_MARKER, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise WorkspaceError(
            f"cannot release the workspace in {session_directory}: {exc.strerror}; remove it as its owner"
        ) from exc


_MASK, _LOWER, _WORK = "mask", "lower", "work"
_OWNED = (_MASK, UPPER, _WORK, LAYERS, IMAGE, MANIFEST, f"{MANIFEST}.new", PATCH_REPOSITORY, RESERVE)
"""What is removed with all it holds; ``lower`` is not among them."""
_MARKER = ".agent-runner-workspace"
"""Made first and removed last: what stands beside it under the names above is ours."""


def _check_places(workspace: Path, session_directory: Path, uid: int | None) -> tuple[bytes, Identity]:
    """Check everything but the tree itself; return the resolved workspace and who works in it."""
    try:
        source = workspace.resolve(strict=True)
        with opened_root(source) as directory:
            root = os.fstat(directory)
            filesystem = find_filesystem(directory)
    except FileNotFoundError as exc:
        raise WorkspaceError(f"cannot use workspace {workspace}: it does not exist; create it") from exc
    except NotADirectoryError as exc:
        raise WorkspaceError(f"cannot use workspace {workspace}: it is not a directory; name one") from exc
    except (OSError, RuntimeError) as exc:
        raise WorkspaceError(f"cannot use workspace {workspace}: {exc}; make it readable") from exc
    if filesystem in _NEVER_LOWER:
        raise WorkspaceError(
            f"cannot use workspace {workspace}: {filesystem} cannot be a layer of an overlay; "
            "copy it to a local Linux filesystem"
        )
    session = session_directory.resolve()
    if session.is_relative_to(source):
        raise WorkspaceError(
            f"cannot use workspace {workspace}: the state directory {session} lies in it; "
            "choose a directory below, or set AGENT_RUNNER_STATE elsewhere"
        )
    if source.is_relative_to(session) or source.is_relative_to(session.parent):
        raise WorkspaceError(
            f"cannot use workspace {workspace}: it lies in the state directory {session.parent}; name another"
        )
    _check_session_path(session)
    check_upper_filesystem(session)
    check_free_space(session)
    return os.fsencode(source), _choose_identity(workspace, root, uid)


def _check_session_path(session: Path) -> None:
    text = os.fsencode(session)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", session.name):
        raise StateError(
            f"cannot name a volume after session {session.name!r}: use letters, digits, '_', '.' and '-'"
        )
    if re.search(rb"[:,\\\"'\x00-\x20\x7f-\xff]", text) or 4 * len(text) > _OPTIONS_MAX:
        raise StateError(
            f"cannot keep sessions in {str(session.parent)!r}: mount options cannot carry that path "
            "(blanks, ':', ',', quotes, backslashes, other than ASCII, or too long); set AGENT_RUNNER_STATE"
        )


def _choose_identity(workspace: Path, root: os.stat_result, uid: int | None) -> Identity:
    caller = os.geteuid()
    if uid == 0:
        raise WorkspaceError("cannot run as uid 0 inside the sandbox: choose any other uid")
    if caller == 0:
        inside = SANDBOX_UID if uid is None else uid
        return Identity(inside, inside, Exchange(root.st_uid, inside), Exchange(root.st_gid, inside))
    if uid not in (None, caller):
        raise WorkspaceError(
            f"cannot run as uid {uid} in workspace {workspace}: without root the sandbox's user is the "
            f"caller's, {caller}; leave the uid out"
        )
    # The engine gives no supplementary groups, and an ordinary user can change no owner: as it is.
    gid = os.getegid() or SANDBOX_UID
    return Identity(caller, gid, Exchange(caller, caller), Exchange(gid, gid))


def _create_private(session_directory: Path) -> None:
    try:
        session_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise StateError(
            f"cannot create session directory {session_directory}: {exc.strerror}; set AGENT_RUNNER_STATE"
        ) from exc


def _build(
    source: bytes, hidden: Hidden, identity: Identity, session_directory: Path, quota: DiskQuota | None
) -> PreparedWorkspace:
    session = session_directory.resolve()
    (session / _MARKER).touch(mode=0o600, exist_ok=False)
    _set_space_aside(session / RESERVE)
    filesystem = LayersFilesystem(session, quota) if quota else None
    try:
        _make_mask(session / _MASK, hidden, identity)
        _make_lower(source, hidden.root, identity, session / _LOWER)
        disk = filesystem.finish() if filesystem else None
    finally:
        if filesystem:
            filesystem.abandon()
    layers = disk.layers if disk else session
    (layers / UPPER).mkdir()
    (layers / _WORK).mkdir(mode=0o700)
    # The root of the overlay looks like the root of the upper layer.
    _look_like(layers / UPPER, hidden.root, identity)
    return PreparedWorkspace(
        session_directory=session,
        volume=_volume(session, layers, disk.most_bytes if disk else 0),
        uid=identity.uid,
        gid=identity.gid,
        hidden=len(hidden.paths),
        survey=_start_survey(source, hidden, identity),
        disk=disk,
    )


def _set_space_aside(reserve: Path) -> None:
    with reserve.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as exc:
            raise StateError(
                f"cannot set {RESERVE_BYTES // 1024 // 1024} MiB aside in {reserve.parent}: {exc.strerror}; "
                "free space there or set AGENT_RUNNER_STATE"
            ) from exc


def _start_survey(source: bytes, hidden: Hidden, identity: Identity) -> Future[BaseTree]:
    """Survey in a thread. It writes nothing, so that a release need not wait for it."""
    future: Future[BaseTree] = Future()

    def survey() -> None:
        try:
            future.set_result(survey_workspace(source, hidden.paths, identity))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=survey, name="workspace-survey", daemon=True).start()
    return future


def _write_once(path: Path, content: bytes) -> None:
    if path.exists():
        return
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def _volume(session: Path, layers: Path, most_bytes: int = 0) -> OverlayVolume:
    return OverlayVolume(
        name=f"agent-runner-{session.name}",
        lower=(str(session / _MASK), str(session / _LOWER)),
        upper=str(layers / UPPER),
        work=str(layers / _WORK),
        # userxattr keeps overlayfs's marks where an ordinary user can read them when the patch is
        # made, and switches redirects and metadata-only copies off: every change is in plain sight.
        flags=("userxattr", "nosuid", "nodev"),
        most_bytes=most_bytes,
    )


def _make_mask(mask: Path, found: Hidden, identity: Identity) -> None:
    """Lay whiteouts. A directory that is in several layers looks like the topmost: copy its looks."""
    root = os.fsencode(mask)
    mask.mkdir()
    parents = sorted(found.leading)
    for path in parents:
        if path:
            os.mkdir(root + b"/" + path, 0o700)
    for path in found.paths:
        os.mknod(root + b"/" + path, stat.S_IFCHR, 0)
    for path in reversed(parents):
        if path:
            _look_like(root + b"/" + path, found.leading[path], identity)
    _look_like(mask, found.root, identity)


def _look_like(path: bytes | Path, entry: os.stat_result, identity: Identity) -> None:
    """Give a directory of ours the owner, mode and times another appears with inside."""
    if os.geteuid() == 0:
        os.chown(path, identity.users.seen(entry.st_uid), identity.groups.seen(entry.st_gid))
    os.chmod(path, stat.S_IMODE(entry.st_mode))
    os.utime(path, ns=(entry.st_atime_ns, entry.st_mtime_ns))


def _make_lower(source: bytes, root: os.stat_result, identity: Identity, lower: Path) -> None:
    is_exchanged = any(ids.first != ids.second for ids in (identity.users, identity.groups))
    if not is_exchanged:
        os.symlink(source, lower)
        return
    lower.mkdir(mode=0o700)
    with opened_root(source) as directory:
        mount_exchanged(directory, lower, identity.users, identity.groups)
    seen = lower.stat()
    if (seen.st_ino, seen.st_uid, seen.st_gid) != (root.st_ino, identity.uid, identity.gid):
        raise WorkspaceError(
            f"cannot show {os.fsdecode(source)} to the sandbox's user: the mount at {lower} is not what "
            "was asked for; is another program mounting there?"
        )


def _is_marked(directory: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(_MARKER, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _remove_lower(directory: int, session_directory: Path) -> None:
    """Remove the name ``lower`` only: a symlink, or a mount point that is empty once unmounted."""
    try:
        entry = os.stat(_LOWER, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(entry.st_mode):
        os.unlink(_LOWER, dir_fd=directory)
        return
    # open_beneath refuses a mount point; rmdir refuses what is not empty. Both must agree.
    with opened(os.fsencode(_LOWER), os.O_DIRECTORY | os.O_RDONLY, directory=directory) as lower:
        if os.listdir(lower):
            raise WorkspaceError(
                f"refusing to remove {session_directory / _LOWER}: it is not empty after unmounting; "
                "look at it, and remove it by hand"
            )
    os.rmdir(_LOWER, dir_fd=directory)
