"""A Unix socket that the sandbox may knock at: any uid may, whoever sees the directory it lies in. D5"""

from __future__ import annotations

import os
import socket
from pathlib import Path

BACKLOG = 128


def open_door(path: Path) -> socket.socket:
    """Return a listening, non-blocking socket at ``path``; an existing path is never replaced.

    Raises OSError.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        # Socket addresses end at 108 bytes; a session's directory may lie deeper than that.
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        # Before listen: nobody connects in between. Any uid, since the sandbox has one of its own.
        os.chmod(path.name, 0o666, dir_fd=directory)  # noqa: S103  # the directory is the wall
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener
