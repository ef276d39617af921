"""Apply a session's patch to the user's directory: all of it or nothing, and nothing that runs by itself. D4

git checks and writes, told that there is no repository: paths count from the workspace even when it is
a folder inside one, and neither the repository's configuration nor the user's plays a part.
"""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sandbox.container.patch.changes import find_obstacle
from sandbox.container.patch.export import ChangedFile, git_environment, require_git
from sandbox.container.patch.text import Section, split_patch
from sandbox.container.workspace.beneath import open_beneath, opened_root
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
        with opened_root(workspace.resolve(strict=True)) as directory:
            _check_paths(content, sections, directory)
            _run_git(directory, content, "--check")
            _check_places(sections, directory)
            if is_check_only:
                return ApplyReport(files, is_applied=False)
            modes = _read_modes(directory, sections)
            _run_git(directory, content)
            _restore_modes(directory, modes)
    except OSError as exc:
        raise WorkspaceError(f"cannot apply {patch} to {workspace}: {exc.strerror}; is it there?") from exc
    return ApplyReport(files, is_applied=True)


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


def _check_paths(content: bytes, sections: list[Section], directory: int) -> None:
    """Make sure that git reads the same paths from the patch as the hazards were judged on."""
    listed = _run_git(directory, content, "--numstat", "-z")
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


def _run_git(directory: int, content: bytes, *options: str) -> bytes:
    owner = os.fstat(directory)
    as_owner: dict[str, object] = {}
    if os.geteuid() == 0 and owner.st_uid != 0:
        # Files made in a user's directory belong to that user, and git does not need to be root.
        as_owner = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    try:
        done = subprocess.run(
            ["git", "apply", "-p1", "--whitespace=nowarn", *options, "-"],
            input=content,
            capture_output=True,
            # By descriptor: the directory that was checked is the one that is written.
            cwd=f"/proc/self/fd/{directory}",
            pass_fds=(directory,),
            env=git_environment(_NO_REPOSITORY),
            process_group=0,  # Ctrl-C in the terminal is for us alone
            timeout=_GIT_SECONDS,
            check=False,
            **as_owner,  # type: ignore[call-overload]  # user, group, extra_groups or nothing
        )
    except subprocess.TimeoutExpired as exc:
        raise WorkspaceError(f"cannot apply the patch: git took longer than {_GIT_SECONDS} s") from exc
    if done.returncode != 0:
        said = [line for line in done.stderr.decode(errors="backslashreplace").splitlines() if line]
        what = "does not fit" if "--check" in options else "was not applied in full"
        raise WorkspaceError(
            f"cannot apply the patch: it {what}: {_printable('; '.join(said[:3]) or 'git said nothing')}; "
            "were files changed since the session, or was it applied already?"
        )
    out: bytes = done.stdout
    return out


def _read_modes(directory: int, sections: list[Section]) -> dict[bytes, int]:
    """Return the permission bits of regular files that exist before."""
    modes: dict[bytes, int] = {}
    for part in sections:
        try:
            handle = open_beneath(directory, part.path, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            continue  # a new file
        entry = os.fstat(handle)
        os.close(handle)
        if stat.S_ISREG(entry.st_mode):
            modes[part.path] = stat.S_IMODE(entry.st_mode)
    return modes


def _restore_modes(directory: int, modes: dict[bytes, int]) -> None:
    """git writes 0644 or 0755; a file that was private stays private."""
    for path, before in modes.items():
        try:
            handle = open_beneath(directory, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            continue  # deleted by the patch
        try:
            entry = os.fstat(handle)
            if stat.S_ISREG(entry.st_mode):
                is_executable = bool(entry.st_mode & 0o100)
                kept = before & 0o777
                if is_executable != bool(before & 0o100):
                    kept = kept | (kept & 0o444) >> 2 if is_executable else kept & ~0o111
                os.chmod(f"/proc/self/fd/{handle}", kept)
        finally:
            os.close(handle)


def _show(path: bytes) -> str:
    return _printable(path.decode("utf-8", "backslashreplace"))


def _printable(text: str) -> str:
    """Escape control characters: names come from the task and are shown on a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
