"""Other forward proxies for the egress benchmark, each with rules as narrow as ours and a log of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sandbox.errors import HostError

SECONDS = 20.0


@dataclass(frozen=True)
class Peer:
    """A proxy that listens."""

    port: int
    pid: int


def find_peers() -> dict[str, str]:
    """Return the programs that are installed, by name."""
    places = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    found = {name: shutil.which(name, path=places) for name in ("tinyproxy", "squid")}
    return {name: program for name, program in found.items() if program}


@contextmanager
def run_peer(name: str, program: str, origin_port: int) -> Iterator[Peer]:
    """Run a peer that lets CONNECT through to the origin and to nothing else, and logs each connection."""
    # Not beneath our own directory: as root, squid runs as another user, who could not get there.
    with TemporaryDirectory(prefix=f"agent-runner-bench-{name}-", dir="/tmp") as place:
        _give_away(Path(place))
        with _running(name, program, Path(place), origin_port) as peer:
            yield peer


@contextmanager
def _running(name: str, program: str, place: Path, origin_port: int) -> Iterator[Peer]:
    port = _free_port()
    settings = place / "settings.conf"
    if name == "tinyproxy":
        (place / "allowed").write_text("^127\\.0\\.0\\.1$\n")
        settings.write_text(_TINYPROXY.format(port=port, place=place, origin=origin_port))
        command = [program, "-d", "-c", str(settings)]
    else:
        settings.write_text(_SQUID.format(port=port, place=place, origin=origin_port))
        command = [program, "-N", "-f", str(settings)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is ours to handle
    )
    try:
        _wait_listening(name, process, port)
        yield Peer(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_TINYPROXY = """\
Port {port}
Listen 127.0.0.1
MaxClients 100
Timeout 60
LogFile "{place}/access.log"
LogLevel Connect
Filter "{place}/allowed"
FilterDefaultDeny Yes
FilterCaseSensitive On
ConnectPort {origin}
"""
_SQUID = """\
http_port 127.0.0.1:{port}
visible_hostname benchmark
acl origin dst 127.0.0.1/32
acl origin_port port {origin}
acl tunnel method CONNECT
http_access allow tunnel origin origin_port
http_access deny all
cache deny all
cache_mem 8 MB
access_log stdio:{place}/access.log
cache_log {place}/cache.log
cache_store_log none
pid_filename none
coredump_dir {place}
pinger_enable off
shutdown_lifetime 0 seconds
"""


def _give_away(place: Path) -> None:
    """Let the user that squid changes to write its logs."""
    if os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam("proxy")
    except KeyError:
        return
    os.chown(place, user.pw_uid, user.pw_gid)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_listening(name: str, process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise HostError(
                    f"{name} does not listen on port {port}; try it by hand, or remove it to go without"
                ) from None
            time.sleep(0.02)
