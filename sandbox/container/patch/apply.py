"""Apply a session's patch to the user's directory: all of it or nothing, and nothing that runs by itself. D4

git works on copies, in a folder of its own and told that there is no repository: neither the
configuration of one nor the user's plays a part, and it never writes beside the user's files. What came of
it is brought over by ``place``, which follows no link.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.container.patch import place
from sandbox.container.patch.changes import find_obstacle
from sandbox.container.patch.export import ChangedFile, git_environment, require_git
from sandbox.container.patch.text import Section, split_patch
from sandbox.container.workspace.beneath import opened_root
from sandbox.digest import Digest, digest_bytes
from sandbox.errors import WorkspaceError

_GIT_SECONDS = 300
_SHOWN = 10

# Not a repository, and never to become one.
_NO_REPOSITORY = "/dev/null"


@dataclass(frozen=True)
class ApplyReport:
    """What was applied, or would be."""

    files: tuple[ChangedFile, ...]
    """In the patch's order; empty when the patch is empty."""
    is_applied: bool
    """False after a check only, and for an empty patch."""


def apply_patch(
    patch: Path,
    digest: Digest,
    workspace: Path,
    *,
    allow_executable_paths: bool = False,
    is_check_only: bool = False,
) -> ApplyReport:
    """Apply the patch whose digest the record gives, or only check that it would apply.

    Refuses, with WorkspaceError and nothing written: another digest; paths that run code on this
    machine or links that leave the workspace, all named, unless allowed; files that changed so that
    the patch does not fit; anything beyond a symlink or outside the workspace. Permission bits of a
    changed file stay what they were, but for the executable bit.
    """
    require_git()
    content = _read_patch(patch, digest)
    sections = split_patch(content)
    files = tuple(ChangedFile(part.path, part.kind, part.hazard) for part in sections)
    if not allow_executable_paths:
        _refuse_hazards(files)
    if not sections:
        return ApplyReport((), is_applied=False)
    try:
        with opened_root(workspace.resolve(strict=True)) as directory, _scratch(directory) as copies:
            _check_paths(content, sections, copies, directory)
            _refuse_beyond_links(sections, directory)
            before = {part.path: place.find(directory, part.path) for part in sections}
            for path, found in before.items():
                if found is not None:
                    place.copy(directory, copies, path, found)
            _give(copies, directory)
            _run_git(copies, directory, content)
            _check_places(sections, directory)
            if not is_check_only:
                _bring(sections, copies, directory, before)
    except OSError as exc:
        raise WorkspaceError(f"cannot apply {patch} to {workspace}: {exc.strerror}; is it there?") from exc
    return ApplyReport(files, is_applied=not is_check_only)


def _read_patch(patch: Path, digest: Digest) -> bytes:
    try:
        content = patch.read_bytes()
    except OSError as exc:
        raise WorkspaceError(
            f"cannot read patch {patch}: {exc.strerror}; name a session with a patch"
        ) from exc
    if digest_bytes(content) != digest:
        raise WorkspaceError(
            f"refusing to apply {patch}: it is not the patch that the session recorded "
            f"(blake3 {digest.blake3}); it was changed since"
        )
    return content


def _refuse_hazards(files: tuple[ChangedFile, ...]) -> None:
    flagged = [f"{_printable(file.shown)} ({file.runs_on_host})" for file in files if file.runs_on_host]
    if flagged:
        more = f"; and {len(flagged) - _SHOWN} more" if len(flagged) > _SHOWN else ""
        raise WorkspaceError(
            f"refusing to apply {len(flagged)} paths that act on this machine: "
            f"{'; '.join(flagged[:_SHOWN])}{more}; read them, then use --allow-executable-paths"
        )


@contextlib.contextmanager
def _scratch(directory: int) -> Iterator[int]:
    """Hold an empty private folder open for git, which belongs to the workspace's owner."""
    with tempfile.TemporaryDirectory(prefix="agent-runner-apply-") as path, opened_root(path) as copies:
        _give(copies, directory)
        yield copies


def _give(copies: int, directory: int) -> None:
    """Hand the copies over to whom git will run as. Only our own folder, in which nobody else has written."""
    if (owner := _other_owner(directory)) is None:
        return
    os.fchown(copies, *owner)
    top = f"/proc/self/fd/{copies}"
    for parent, folders, files in os.walk(os.fsencode(top) + b"/."):
        for name in (*folders, *files):
            os.chown(parent + b"/" + name, *owner, follow_symlinks=False)


def _other_owner(directory: int) -> tuple[int, int] | None:
    """Return the workspace's owner and group when we are root and it is not ours; else None."""
    entry = os.fstat(directory)
    return (entry.st_uid, entry.st_gid) if os.geteuid() == 0 and entry.st_uid != 0 else None


def _bring(
    sections: list[Section], copies: int, directory: int, before: dict[bytes, place.Found | None]
) -> None:
    """Deletions first: a file may give way to a folder of its name."""
    owner, before, done = _other_owner(directory), dict(before), 0
    try:
        for part in sorted(sections, key=lambda part: part.kind != "deleted"):
            if part.kind == "deleted":
                place.remove(directory, part.path, before[part.path])
                before[part.path] = None  # what changes its kind is deleted and added
            else:
                place.put(copies, directory, part.path, before[part.path], owner)
            done += 1
    except (OSError, WorkspaceError) as exc:
        reason = str(exc).removeprefix("cannot apply the patch: ")
        raise WorkspaceError(
            f"cannot apply the patch: it was not applied in full ({done} of {len(sections)} paths): {reason}"
        ) from exc


def _check_paths(content: bytes, sections: list[Section], copies: int, directory: int) -> None:
    """Make sure that git reads the same paths from the patch as the hazards were judged on."""
    listed = _run_git(copies, directory, content, "--numstat", "-z")
    theirs = {line.split(b"\t", 2)[2] for line in listed.split(b"\0") if line}
    if theirs != {part.path for part in sections}:
        raise WorkspaceError("refusing to apply the patch: git reads other paths from it; export it again")


def _check_places(sections: list[Section], directory: int) -> None:
    """Refuse what ``git apply --check`` lets pass and then fails at halfway."""
    deleted = {part.path for part in sections if part.kind == "deleted"}
    for path in {part.path for part in sections if part.kind != "deleted"}:
        if (left := find_obstacle(directory, path, deleted)) is not None:
            raise WorkspaceError(
                f"cannot apply the patch: {_show(path)} cannot be written while {_show(left)} is there; "
                "move it away, or apply the rest by hand"
            )


def _refuse_beyond_links(sections: list[Section], directory: int) -> None:
    """Name the link: git, who sees copies, could only say that there is no such file."""
    deleted = {part.path for part in sections if part.kind == "deleted"}
    folders: set[bytes] = set()
    for part in sections:
        above = part.path.split(b"/")[:-1]
        folders.update(b"/".join(above[:depth]) for depth in range(1, len(above) + 1))
    for folder in sorted(folders - deleted):
        found = place.find(directory, folder)
        if found is not None and stat.S_ISLNK(found.entry.st_mode):
            raise WorkspaceError(
                f"refusing to apply the patch: {_show(folder)} is a symbolic link, and the patch changes "
                "what lies beyond it; put the folder back"
            )


def _run_git(copies: int, directory: int, content: bytes, *options: str) -> bytes:
    as_owner: dict[str, object] = {}
    if (owner := _other_owner(directory)) is not None:
        # A patch of a stranger's: git does not need to be root to read it.
        as_owner = {"user": owner[0], "group": owner[1], "extra_groups": []}
    try:
        done = subprocess.run(
            ["git", "apply", "-p1", "--whitespace=nowarn", *options, "-"],
            input=content,
            capture_output=True,
            cwd=f"/proc/self/fd/{copies}",
            pass_fds=(copies,),
            env=git_environment(_NO_REPOSITORY),
            process_group=0,  # Ctrl-C in the terminal is for us alone
            timeout=_GIT_SECONDS,
            check=False,
            **as_owner,  # type: ignore[call-overload]  # user, group, extra_groups or nothing
        )
    except subprocess.TimeoutExpired as exc:
        raise WorkspaceError(f"cannot apply the patch: git took longer than {_GIT_SECONDS} s") from exc
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode(errors="backslashreplace").splitlines() if line]
        said = _printable("; ".join(lines[:3]) or "git said nothing")
        raise WorkspaceError(
            f"cannot apply the patch: it does not fit: {said}; "
            "were files changed since the session, or was it applied already?"
        )
    out: bytes = done.stdout
    return out


def _show(path: bytes) -> str:
    return _printable(path.decode("utf-8", "backslashreplace"))


def _printable(text: str) -> str:
    """Escape control characters: names come from the task and are shown on a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
