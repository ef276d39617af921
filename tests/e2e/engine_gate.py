"""A Unix socket in front of the engine's own: it can hold a request back, and it can die."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Self

ENGINE = "/var/run/docker.sock"
PIECE = 65536


class EngineGate:
    """Forwards connections to the engine. ``hold`` (method, part of the path) names requests that wait."""

    def __init__(self, path: Path, *, hold: tuple[bytes, bytes] | None = None) -> None:
        self.url = f"unix://{path}"
        self.held = threading.Event()
        """Set when the held request has arrived."""
        self._released = threading.Event()
        self._hold = hold
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._open: set[socket.socket] = set()
        self._is_dead = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.die()

    def release(self) -> None:
        """Let what is held pass, and everything after it."""
        self._released.set()

    def die(self) -> None:
        """Cut every connection and take no more, as an engine does that was killed."""
        self._is_dead = True
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._is_dead:
                client, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(ENGINE)
                self._open |= {client, engine}
                threading.Thread(target=self._pump, args=(client, engine, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(engine, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                if is_request and self._is_held(piece):
                    self.held.set()
                    self._released.wait(60)
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def _is_held(self, piece: bytes) -> bool:
        if self._hold is None or self._released.is_set():
            return False
        method, path = self._hold
        return piece.startswith(method) and path in piece.split(b"\r\n", 1)[0]
