"""One session's directory on the host: what is in it, and who owns it while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sandbox.container.reaper import claim_session
from sandbox.container.workspace.quota import find_layers


@dataclass(frozen=True)
class SessionDirectory:
    """Paths of one session beneath the state directory."""

    path: Path

    @property
    def session_id(self) -> str:
        """The session's id is its directory's name."""
        return self.path.name

    @property
    def ledger(self) -> Path:
        """JSON Lines, one event a line, each naming the one before by digest."""
        return self.path / "ledger.jsonl"

    @property
    def statement(self) -> Path:
        """The sealed in-toto statement, a DSSE envelope."""
        return self.path / "statement.json"

    @property
    def result(self) -> Path:
        """The document that ``--output json`` printed."""
        return self.path / "result.json"

    @property
    def patch(self) -> Path:
        """The changes as a git-style diff."""
        return self.path / "patch.diff"

    @property
    def changes(self) -> Path:
        """The upper layer, kept when no patch could be made of it; absent otherwise."""
        return self.path / "changes"

    @property
    def changes_image(self) -> Path:
        """The same where the layers had a filesystem of their own: its image, to be mounted read-only."""
        return self.path / "changes.img"

    @property
    def kept(self) -> str:
        """Say where the changes are that no patch could be made of."""
        if find_layers(self.path) == self.path:
            return str(self.changes)
        how = "mount -o loop,ro,nosuid,nodev,noexec; the changes are in its folder upper"
        return f"{self.changes_image} ({how})"

    @property
    def egress(self) -> Path:
        """Mounted read-only in the container; holds the gateway's socket."""
        return self.path / "egress"

    @property
    def egress_socket(self) -> Path:
        """Where the gateway listens."""
        return self.egress / "proxy.sock"

    @property
    def trust(self) -> Path:
        """Mounted read-only in the container when something is inspected; root certificates, no keys."""
        return self.path / "trust"


def create_session_directory(state: Path, session_id: str, owner: str) -> SessionDirectory:
    """Claim a session's directory, readable by its user only. Raises StateError when it cannot be made."""
    directory = SessionDirectory(claim_session(state / "sessions", session_id, owner))
    # The sandbox's user looks a socket up in it; nobody else gets past the session's own directory.
    directory.egress.mkdir(mode=0o755)
    return directory
