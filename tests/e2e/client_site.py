"""An origin on loopback that real clients can work with: a git repository and four package indexes, over TLS.

Every host serves everything; what a client asks for is its own. Nothing is on disk.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.egress_world import server_context

COMMIT = "1234567890abcdef1234567890abcdef12345678"
HELLO = b"hello from the origin\n"


class ClientSite:
    """Serves until it is closed; ``port`` is on loopback."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """``host method path`` of each request that got through TLS."""
        self.authorizations: list[str] = []
        """The Authorization header of each request that had one."""
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                # The handshake in the connection's own thread: a client that refuses stops nobody else.
                self.request.settimeout(20)
                self.request = server_context().wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                super().finish()
                with contextlib.suppress(OSError):  # ssl.SSLError is one
                    self.request.unwrap()

            def do_GET(self) -> None:
                host, path = self.headers["Host"], self.path.partition("?")[0]
                site.requests.append(f"{host} {self.command} {self.path}")
                site.authorizations += self.headers.get_all("Authorization", [])
                found = _answer(host, path)
                kind, body = found or ("text/plain", b"no such thing\n")
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                pass  # a client that refuses the certificate

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(host: str, path: str) -> tuple[str, bytes] | None:
    first, _, rest = path.strip("/").partition("/")
    match first:
        case "" | "repos":
            return "text/plain", HELLO
        case "repository.git":
            return _git(rest)
        case "simple":
            return "text/html", f'<a href="/files/{rest.strip("/")}-1.0-py3-none-any.whl">1.0</a>'.encode()
        case "files":
            return "application/zip", _wheel(rest.partition("-")[0])
        case "crates":
            return _crates(host, rest)
        case "modules":
            return _modules(rest)
        case "npm":
            return "application/json", json.dumps(_package(host, rest)).encode()
    return None


def _git(path: str) -> tuple[str, bytes] | None:
    # Plain text: a server of the older protocol, which every git still speaks.
    match path:
        case "info/refs":
            return "text/plain", f"{COMMIT}\trefs/heads/main\n".encode()
        case "HEAD":
            return "text/plain", b"ref: refs/heads/main\n"
    return None


def _wheel(name: str) -> bytes:
    meta = f"{name}-1.0.dist-info"
    return _zip(
        {
            f"{name}.py": "",
            f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            f"{meta}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{meta}/RECORD": f"{name}.py,,\n{meta}/METADATA,,\n{meta}/WHEEL,,\n{meta}/RECORD,,\n",
        }
    )


def _package(host: str, name: str) -> dict[str, Any]:
    version = {"name": name, "version": "1.0.0", "dist": {"tarball": f"https://{host}/npm/{name}.tgz"}}
    return {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}


def _crates(host: str, path: str) -> tuple[str, bytes] | None:
    if path == "config.json":
        return "application/json", json.dumps({"dl": f"https://{host}/crates/dl"}).encode()
    if path.startswith("dl/"):
        return "application/gzip", _crate()
    if path == "le/ft/leftover":
        line = {"name": "leftover", "vers": "1.0.0", "deps": [], "features": {}, "yanked": False}
        return "text/plain", json.dumps(line | {"cksum": hashlib.sha256(_crate()).hexdigest()}).encode()
    return None


def _crate() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in {
            "Cargo.toml": '[package]\nname = "leftover"\nversion = "1.0.0"\nedition = "2021"\n',
            "src/lib.rs": "",
        }.items():
            member = tarfile.TarInfo(f"leftover-1.0.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    # Without a time in it: the index has its digest.
    return gzip.compress(packed.getvalue(), mtime=0)


def _modules(path: str) -> tuple[str, bytes] | None:
    module, _, wanted = path.partition("/@v/")
    match wanted:
        case "v1.0.0.info":
            return "application/json", b'{"Version": "v1.0.0", "Time": "2026-01-01T00:00:00Z"}'
        case "v1.0.0.mod":
            return "text/plain", f"module {module}\n".encode()
        case "v1.0.0.zip":
            text = {f"{module}@v1.0.0/go.mod": f"module {module}\n", f"{module}@v1.0.0/a.go": "package a\n"}
            return "application/zip", _zip(text)
    return None


def _zip(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return packed.getvalue()
