"""Find the files that ship with the package, and the state directory of this user. Reads no content."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox.errors import HostError, StateError


def shipped(relative: str) -> Path:
    """Return the path of a shipped file or folder, e.g. ``policy/production.yaml``.

    A wheel carries these folders inside the package; a checkout has them beside it.
    Raises StateError when neither has it: the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "_data", package.parent):
        candidate = root / relative
        if candidate.exists():
            return candidate
    raise StateError(
        f"cannot find shipped file {relative}: this installation is incomplete; install it again"
    )


def state_directory() -> Path:
    """Return where sessions, keys and the index live; not created here.

    ``AGENT_RUNNER_STATE`` wins, then ``XDG_STATE_HOME/agent-runner``, then ``~/.local/state/agent-runner``.
    Raises StateError for a user without a home directory.
    """
    if explicit := os.environ.get("AGENT_RUNNER_STATE"):
        return working_directory() / explicit
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as exc:
        raise StateError(
            f"cannot choose a state directory: uid {os.getuid()} has no home; set AGENT_RUNNER_STATE"
        ) from exc
    return working_directory() / base / "agent-runner"


def working_directory() -> Path:
    """Return where relative paths start. Raises HostError when that directory was removed meanwhile."""
    try:
        return Path.cwd()
    except FileNotFoundError as exc:
        raise HostError(
            "cannot tell the working directory: it was removed; change to one that exists"
        ) from exc
