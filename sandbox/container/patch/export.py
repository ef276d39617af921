"""Turn what a session changed into a patch that a person reads and ``git apply`` takes. D4

git makes the diff, in a private empty repository without configuration, attributes or hooks: the
workspace's own repository, which the task can read and whose configuration runs programs, is never used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandbox.container.patch.changes import Change, Version, Withheld, find_changes
from sandbox.container.patch.ignored import find_ignored
from sandbox.container.patch.text import Kind, Section, split_patch
from sandbox.container.workspace.beneath import opened_root, remove_beneath
from sandbox.container.workspace.prepare import MANIFEST, PATCH_REPOSITORY, RESERVE, UPPER
from sandbox.container.workspace.quota import find_layers
from sandbox.container.workspace.survey import read_manifest
from sandbox.digest import Digest, digest_bytes
from sandbox.errors import HostError, StateError, WorkspaceError
from sandbox.policy.paths import DenyPatterns

_GIT_SECONDS = 300
"""For one git command on at most 256 MiB of files, chosen by an attacker."""

_ORDER: dict[Kind, int] = {"deleted": 0, "mode": 1, "modified": 2, "added": 2}


@dataclass(frozen=True)
class ChangedFile:
    """One path that the patch changes."""

    path: bytes
    """Relative to the workspace."""
    kind: Kind
    runs_on_host: str | None
    """Why applying it needs an explicit yes; None for an ordinary file."""

    @property
    def shown(self) -> str:
        """The path as text; bytes that are not UTF-8 as ``\\xNN``."""
        return self.path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ExportedPatch:
    """The patch of one session."""

    path: Path
    digest: Digest
    size_bytes: int
    """0: nothing changed, or nothing that a patch carries."""
    files: tuple[ChangedFile, ...]
    """In the patch's order: deletions, mode changes, the rest."""
    withheld: tuple[Withheld, ...]
    """What changed and is not in the patch, with the reason."""


def export_patch(
    session_directory: Path, workspace: Path, patterns: DenyPatterns, patch_path: Path
) -> ExportedPatch:
    """Write the patch (0600) and say what it changes and what it leaves out.

    Reads the session's upper layer and the user's directory; the container should be stopped, or files
    may be half written. Empty when nothing changed. Raises HostError without git, WorkspaceError or
    StateError when a layer cannot be read or the patch cannot be written.
    """
    require_git()
    manifest = _load_manifest(session_directory)
    try:
        (session_directory / RESERVE).unlink(missing_ok=True)  # kept for this
        with opened_root(workspace.resolve()) as base, opened_root(session_directory) as session:
            # By its path: the layers may be a mount of their own, and only we write in the folder above.
            layers = find_layers(session_directory)
            with opened_root(layers / UPPER) as upper:
                check = functools.partial(_check_ignore, session_directory, session)
                ignored = functools.partial(find_ignored, base, manifest, check)
                # A sparse image takes writes that the disk beneath it has no room for.
                is_image = layers != session_directory
                found = find_changes(upper, base, manifest, patterns, ignored, may_be_lost=is_image)
            patch = _make_patch(found.changes, session_directory, session)
        _write_private(patch_path, patch)
    except OSError as exc:
        raise WorkspaceError(
            f"cannot export the patch of {session_directory}: {exc.strerror} at {exc.filename!r}; "
            "the changes are kept there"
        ) from exc
    files = tuple(ChangedFile(part.path, part.kind, part.hazard) for part in split_patch(patch))
    return ExportedPatch(patch_path, digest_bytes(patch), len(patch), files, tuple(found.withheld))


def require_git() -> None:
    """Raise HostError when git is not installed."""
    if shutil.which("git") is None:
        raise HostError("cannot make or apply patches: git is not installed; install git")


def git_environment(git_directory: Path | str) -> dict[str, str]:
    """Return an environment in which no configuration of user, machine or repository counts."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "GIT_DIR": str(git_directory),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": "/dev/null",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
    }


def _load_manifest(session_directory: Path) -> dict[bytes, bytes]:
    try:
        return dict(read_manifest((session_directory / MANIFEST).read_bytes()))
    except OSError as exc:
        raise StateError(
            f"cannot export the patch of {session_directory}: its {MANIFEST} cannot be read "
            f"({exc.strerror}); was it released already, or never surveyed to the end?"
        ) from exc


def _make_patch(changes: Sequence[Change], session_directory: Path, session: int) -> bytes:
    if not changes:
        return b""
    repository = session_directory / PATCH_REPOSITORY
    remove_beneath(session, PATCH_REPOSITORY.encode())
    try:
        _git(repository, "init", "--quiet", "--bare", "--template=")
        _git(repository, "fast-import", "--quiet", "--done", feed=_import_stream(changes))
        diff = _git(
            repository,
            *("diff-tree", "-r", "-p", "--binary", "--full-index", "--no-renames", "--no-ext-diff"),
            *("--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/"),
            *("refs/heads/before", "refs/heads/after"),
        )
    finally:
        remove_beneath(session, PATCH_REPOSITORY.encode())
    return b"".join(part.unambiguous for part in sorted(split_patch(diff), key=_reading_order))


def _check_ignore(
    session_directory: Path, session: int, rules: dict[bytes, bytes], paths: Sequence[bytes]
) -> set[bytes]:
    """Ask git, in an empty repository with these ``.gitignore`` files, which paths it ignores."""
    repository = session_directory / PATCH_REPOSITORY
    remove_beneath(session, PATCH_REPOSITORY.encode())
    try:
        _git(repository, "init", "--quiet", "--bare", "--template=")
        tree = os.fsencode(repository / "tree")
        for path, content in rules.items():
            folder = os.path.join(tree, os.path.dirname(path))
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, b".gitignore"), "xb") as file:
                file.write(content)
        arguments = (f"--work-tree={os.fsdecode(tree)}", "check-ignore", "--no-index", "-z", "--stdin")
        # "./" in front: a name that begins with ":" is no pathspec magic then. Exit 1: none is ignored.
        answer = _git(repository, *arguments, feed=(b"./" + path + b"\0" for path in paths), ok=(0, 1))
    except WorkspaceError:
        return set()  # names that git cannot judge hide nothing: all of it goes to the reviewer
    finally:
        remove_beneath(session, PATCH_REPOSITORY.encode())
    return {path.removeprefix(b"./") for path in answer.split(b"\0") if path}


def _reading_order(part: Section) -> tuple[int, bytes]:
    return _ORDER[part.kind], part.path


def _import_stream(changes: Sequence[Change]) -> Iterator[bytes]:
    """Yield two commits for ``git fast-import``: content and names inline, nothing read by git itself."""
    yield b"feature done\n"
    for branch in ("before", "after"):
        yield f"commit refs/heads/{branch}\ncommitter - <-> 0 +0000\ndata 0\n".encode()
        for change in changes:
            version: Version | None = change.before if branch == "before" else change.after
            if version is not None:
                yield b"M %o inline %s\n" % (version.mode, _quote(change.path))
                yield b"data %d\n" % len(version.content)
                yield version.content
                yield b"\n"
        yield b"\n"
    yield b"done\n"


def _quote(path: bytes) -> bytes:
    plain = set(range(0x20, 0x7F)) - set(b'"\\')
    return b'"' + b"".join(bytes([byte]) if byte in plain else b"\\%03o" % byte for byte in path) + b'"'


def _git(
    repository: Path, *arguments: str, feed: Iterator[bytes] | None = None, ok: tuple[int, ...] = (0,)
) -> bytes:
    command = ["git", "-c", "core.fsync=none", "-c", "core.quotePath=true", *arguments]
    if arguments[0] == "init":
        command.append(str(repository))
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=repository.parent,
        env=git_environment(repository),
        process_group=0,  # Ctrl-C in the terminal is for us alone
    ) as process:
        stdin, process.stdin = process.stdin, None
        assert stdin is not None  # noqa: S101
        # git answers while it reads, and stops reading when nobody takes the answers: fed from here, both
        # would wait for ever on the first names that fill a pipe, and no limit of time would count.
        feeder = threading.Thread(target=_feed, args=(stdin, feed or ()), name="git-feed", daemon=True)
        feeder.start()
        try:
            out, err = process.communicate(timeout=_GIT_SECONDS)
            feeder.join()
        except subprocess.TimeoutExpired as exc:
            process.kill()
            raise WorkspaceError(
                f"cannot make the patch: git {arguments[0]} took longer than {_GIT_SECONDS} s; "
                "the changes are kept in the session's folder"
            ) from exc
        except BaseException:
            process.kill()
            raise
    if process.returncode not in ok:
        said = (err.decode(errors="replace").strip().splitlines() or ["it said nothing"])[0]
        raise WorkspaceError(
            f"cannot make the patch: git {arguments[0]} failed: {said}; "
            "the changes are kept in the session's folder"
        )
    return out


def _feed(stdin: IO[bytes], pieces: Iterable[bytes]) -> None:
    # Ended before it had read all: its exit code says how.
    with contextlib.suppress(BrokenPipeError), stdin:
        for piece in pieces:
            stdin.write(piece)


def _write_private(path: Path, content: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
