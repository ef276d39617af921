"""The guest as PID 1 of a real container, against processes that try to get away, in or at it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from attached_guest import BUILD, ROOT, UID, AttachedStream, Box, guest_box

from sandbox.errors import GuestError
from sandbox.guest import codec
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import (
    Command,
    CommandResult,
    FileContent,
    FileFailed,
    GuestConfig,
    Listing,
    Relay,
    SearchResult,
    SpawnFailed,
)
from tests.egress_world import wait_until

pytestmark = pytest.mark.docker

PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
NO_LANDLOCK = "seccomp=" + json.dumps(
    {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {
                "names": ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": 38,
            }
        ],
    }
)
WITHOUT_LANDLOCK: dict[str, Any] = {"security_opt": ["no-new-privileges", NO_LANDLOCK]}


@pytest.fixture(scope="session", autouse=True)
def _built_guest() -> None:
    subprocess.run(["make", "-s", "-C", str(ROOT / "images" / "guest")], check=True)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with guest_box(tmp_path / "ws") as box:
        yield box


async def ended(channel: GuestChannel, command: Command, **listeners: Any) -> CommandResult:
    result = await channel.run(command, **listeners)
    assert isinstance(result, CommandResult), result
    return result


async def sh(
    channel: GuestChannel, script: str, timeout_seconds: float = 30.0, **fields: Any
) -> CommandResult:
    return await ended(
        channel, Command(("sh", "-c", script), env=PATH, timeout_seconds=timeout_seconds, **fields)
    )


async def python(channel: GuestChannel, script: str, timeout_seconds: float = 30.0) -> CommandResult:
    return await ended(channel, Command(("python3", "-c", script), env=PATH, timeout_seconds=timeout_seconds))


async def wait_for_content(channel: GuestChannel, path: str) -> bytes:
    while True:  # The command in the container has no other way to say that it is so far.
        read = await channel.read_file(path, 100)
        if isinstance(read, FileContent) and read.content:
            return read.content
        await asyncio.sleep(0.01)


async def survivors(channel: GuestChannel) -> list[str]:
    """Every process but PID 1, keepers, the relay and the asking shell: what outlived its command."""
    seen = await sh(
        channel,
        "for p in /proc/[0-9]*; do read -r name < $p/comm || continue;"
        ' [ "$name" = guest ] || [ $p = /proc/$$ ] || echo $p $name; done 2>/dev/null',
    )
    return seen.stdout.decode().split("\n")[:-1]


# --- commands ---


async def test_a_command_gets_its_arguments_environment_directory_and_stdin(box: Box) -> None:
    await box.channel.write_file("sub/x", b"", must_create=True)
    script = (
        "import os,sys; print(sys.argv[1:], dict(os.environ) == eval(sys.argv[1]), os.getcwd());"
        " print(len(sys.stdin.read()))"
    )
    env = PATH | {"NAME": "a=b\nc", "LC_CTYPE": "C.UTF-8"}
    result = await ended(
        box.channel,
        Command(("python3", "-c", script, repr(env), b"\xff"), "sub", env, stdin=b"i" * 1_000_000),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(b"True /workspace/sub\n1000000\n")
    assert b"'\\udcff'" in result.stdout


async def test_exit_status_and_signal_are_told_apart(box: Box) -> None:
    status = await sh(box.channel, "exit 137")
    signal = await sh(box.channel, "kill -9 $$")
    assert (status.exit_code, status.signal) == (137, None)
    assert (signal.exit_code, signal.signal) == (None, 9)
    assert status.claimed_pid > 1


async def test_figures_count_the_whole_tree(box: Box) -> None:
    result = await python(
        box.channel,
        "import os\nif os.fork() == 0:\n x = bytearray(60 << 20)\n while os.times().user < 0.3: pass\n"
        "else: os.wait()",
    )
    assert result.cpu_ms >= 300
    assert result.max_rss_bytes > 60 << 20
    assert result.wall_ms >= 300


async def test_output_arrives_while_the_command_still_runs(box: Box) -> None:
    first = asyncio.Event()
    running = asyncio.create_task(
        ended(
            box.channel,
            Command(("sh", "-c", "echo early; until [ -e go ]; do sleep 0.01; done"), env=PATH),
            on_output=lambda stream, data: first.set(),
        )
    )
    await first.wait()
    await box.channel.write_file("go", b"", must_create=True)
    assert (await running).stdout == b"early\n"


@pytest.mark.parametrize(
    ("command", "errno_name"),
    [
        (Command(("no-such-program",), env=PATH), "ENOENT"),
        (Command(("/etc/passwd",), env=PATH), "EACCES"),
        (Command(("true",), cwd="nowhere", env=PATH), "ENOENT"),
        (Command(("true",), cwd="..", env=PATH), "EXDEV"),
        (Command(("true",), cwd="/", env=PATH), "EXDEV"),
        (Command(("true", "x" * 200_000), env=PATH), "E2BIG"),
        (Command(("true", "x" * 2_000_000), env=PATH), "E2BIG"),
        (Command(("true", "a\0b"), env=PATH), "EINVAL"),
        (Command((), env=PATH), "EINVAL"),
    ],
)
async def test_a_command_that_cannot_start_says_why(box: Box, command: Command, errno_name: str) -> None:
    failed = await box.channel.run(command)
    assert isinstance(failed, SpawnFailed)
    assert failed.errno_name == errno_name
    assert (await box.channel.run(Command(("true",), env=PATH))) != failed  # and the guest goes on


async def test_a_command_starts_clean_of_the_guest(box: Box) -> None:
    result = await sh(
        box.channel,
        "ls -l /proc/self/fd | grep -v ^total | grep -v /proc/; "
        " grep -E '^(SigBlk|SigIgn|SigCgt|NoNewPrivs|CapEff):' /proc/self/status;"
        " ulimit -c; umask; ps -o sid= -p $$ 2>/dev/null || cut -d' ' -f6 /proc/$$/stat; echo $$",
    )
    text = result.stdout.decode()
    assert "SigBlk:\t0000000000000000" in text
    assert "SigIgn:\t0000000000000000" in text
    assert "NoNewPrivs:\t1" in text
    assert "CapEff:\t0000000000000000" in text
    descriptors = [line.split()[8] for line in text.splitlines() if "->" in line]
    assert descriptors == ["0", "1", "2"]
    assert text.splitlines()[-4:-2] == ["0", "0022"]
    assert text.split()[-1] == text.split()[-2]  # its own session


async def test_a_gigabyte_of_output_is_counted_and_dropped(box: Box) -> None:
    result = await sh(box.channel, "head -c 1000000000 /dev/zero", max_output_bytes=1000)
    assert (len(result.stdout), result.stdout_bytes) == (1000, 1_000_000_000)
    assert result.cut_bytes == 1_000_000_000 - 1000


async def test_the_last_output_of_a_command_is_not_lost(box: Box) -> None:
    result = await python(box.channel, "import os; os.write(1, b'o'*60000); os.write(2, b'e'*60000)")
    assert (result.stdout, result.stderr) == (b"o" * 60000, b"e" * 60000)


async def test_stdin_that_nobody_reads_holds_up_nothing(box: Box) -> None:
    result = await ended(
        box.channel, Command(("sh", "-c", "exec <&-; echo done"), env=PATH, stdin=b"x" * 500_000)
    )
    assert result.stdout == b"done\n"


async def test_a_host_that_reads_slowly_delays_output_but_no_timeout(tmp_path: Path) -> None:
    class Gated(AttachedStream):
        gate = asyncio.Event()

        async def read(self) -> Any:
            await self.gate.wait()
            return await super().read()

    Gated.gate.set()
    async with guest_box(tmp_path / "ws", stream_type=Gated) as box:
        await box.channel.run(Command(("true",), env=PATH))
        Gated.gate.clear()
        floods = [
            asyncio.create_task(sh(box.channel, "yes", timeout_seconds=1.0, max_output_bytes=8 << 20))
            for _ in range(3)
        ]
        quiet = asyncio.create_task(sh(box.channel, "echo > done; sleep 60", timeout_seconds=1.0))
        await asyncio.sleep(2.0)  # Longer than the timeouts, while nothing is read: that is what is tested.
        Gated.gate.set()
        results = await asyncio.gather(*floods, quiet)
        assert all(result.timed_out and result.wall_ms < 1900 for result in results)


# --- the end of process trees ---


async def test_a_timeout_kills_what_ignores_every_signal(box: Box) -> None:
    result = await sh(box.channel, "trap '' TERM INT HUP QUIT; while :; do sleep 60; done", 0.3)
    assert result.timed_out
    assert result.signal == 9
    assert await survivors(box.channel) == []


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setpgid(0, 0)
        open('daemon', 'w').write('up')
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
while not os.path.exists('daemon'): time.sleep(0.01)
{then}
"""


@pytest.mark.parametrize("options", [{}, WITHOUT_LANDLOCK], ids=["landlock", "no-landlock"])
async def test_a_daemon_does_not_outlive_its_command(tmp_path: Path, options: dict[str, Any]) -> None:
    async with guest_box(tmp_path / "ws", **options) as box:
        during = asyncio.create_task(python(box.channel, DAEMON.format(then="time.sleep(600)"), 1.0))
        await wait_for_content(box.channel, "daemon")
        assert await survivors(box.channel) != []  # the control: the search does find daemons
        assert (await during).timed_out
        assert await survivors(box.channel) == []
        assert (await python(box.channel, DAEMON.format(then="sys.exit(4)"))).exit_code == 4
        assert await survivors(box.channel) == []


BOMB = """
import os, time
try: os.setsid()
except OSError: pass
while True:
    try: os.fork()
    except OSError: pass
"""


@pytest.mark.parametrize("options", [{}, WITHOUT_LANDLOCK], ids=["landlock", "no-landlock"])
async def test_a_fork_bomb_dies_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    async with guest_box(tmp_path / "ws", pids_limit=200, **options) as box:
        result = await python(box.channel, BOMB, 1.0)
        assert result.timed_out
        assert await survivors(box.channel) == []


async def test_cancelling_a_call_kills_its_tree_before_it_returns(box: Box) -> None:
    started = asyncio.Event()
    call = asyncio.create_task(
        box.channel.run(
            Command(("sh", "-c", "setsid sleep 600 & sleep 600"), env=PATH),
            on_started=lambda pid: started.set(),
        )
    )
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await survivors(box.channel) == []


async def test_a_storm_of_orphans_leaves_no_zombie(box: Box) -> None:
    script = """
import os
for i in range(3000):
    if os.fork() == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.wait()
"""
    assert (await python(box.channel, script)).exit_code == 0
    assert await survivors(box.channel) == []


async def test_a_hundred_commands_run_at_the_same_time(box: Box) -> None:
    results = await asyncio.gather(*(sh(box.channel, f"echo {i}; sleep 0.2") for i in range(100)))
    assert [result.stdout for result in results] == [b"%d\n" % i for i in range(100)]


async def test_more_requests_than_the_guest_takes_are_refused(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", must_open=False) as box:
        await box.stream.write(codec.encode_config(GuestConfig()))
        for request_id in range(1, 66):
            frame, _ = codec.encode_spawn(request_id, Command(("sleep", "60"), env=PATH))
            await box.stream.write(frame)
        reader = codec.FrameReader()
        refused = None
        while refused is None:
            for kind, request_id, body in reader.feed((await box.stream.read())[1]):
                reply = codec.decode_reply(kind, body)
                if isinstance(reply, codec.Failed):
                    refused = (request_id, reply.is_spawn, reply.errno_name)
        assert refused == (65, True, "EAGAIN")


# --- the guest against its children ---


async def test_a_command_that_kills_all_it_can_reaches_nothing_of_the_guest(box: Box) -> None:
    other = asyncio.create_task(sh(box.channel, "echo > up; sleep 1; echo alive"))
    await wait_for_content(box.channel, "up")
    killer = await sh(box.channel, "kill -9 -1; kill -9 1; kill -9 $PPID; echo unharmed")
    assert killer.stdout == b"unharmed\n"
    assert (await other).stdout == b"alive\n"


async def test_control_without_landlock_the_same_command_kills_its_keeper(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", **WITHOUT_LANDLOCK) as box:
        killer = await sh(box.channel, "kill -9 $PPID; sleep 60", timeout_seconds=30.0)
        assert killer.signal == 9
        assert killer.wall_ms < 20_000
        assert not killer.timed_out
        assert await survivors(box.channel) == []  # PID 1 took over the keeper's duty


PEEK = """
import os, sys
pid = sys.argv[1]
for name in ('mem', 'environ', 'fd/1', 'fd/0', 'maps', 'cwd', 'root'):
    try:
        path = f'/proc/{pid}/{name}'
        if '/' in name or name in ('cwd', 'root'): os.readlink(path)
        else: open(path, 'rb').close()
        print(name, 'open')
    except OSError as error:
        print(name, 'refused', error.errno)
"""


@pytest.mark.parametrize("options", [{}, WITHOUT_LANDLOCK], ids=["landlock", "no-landlock"])
async def test_no_command_sees_into_the_guest(tmp_path: Path, options: dict[str, Any]) -> None:
    async with guest_box(tmp_path / "ws", **options) as box:
        seen = await sh(box.channel, f'for pid in 1 $PPID; do python3 -c "{PEEK}" $pid; done')
        assert seen.stdout.count(b"refused") == 14, seen
        assert b"open" not in seen.stdout
        # The control: the same looks at a process that may be traced succeed.
        control = await sh(box.channel, f'sleep 60 & python3 -c "{PEEK}" $!')
        assert control.stdout.count(b"open") == 7, control


async def test_no_command_sees_into_another(box: Box) -> None:
    other = asyncio.create_task(sh(box.channel, "echo $$ > pid; exec sleep 60", timeout_seconds=5.0))
    number = int(await wait_for_content(box.channel, "pid"))
    seen = await sh(box.channel, f'python3 -c "{PEEK}" {number}; kill -9 {number} || echo not killed')
    assert seen.stdout.count(b"refused") == 7
    assert b"not killed" in seen.stdout
    other.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await other


# --- files ---


async def test_a_file_is_written_whole_and_read_back(box: Box) -> None:
    content = os.urandom(16 << 20)
    assert await box.channel.write_file("deep/er/big", content, must_create=True) is None
    assert await box.channel.read_file("deep/er/big", 32 << 20) == FileContent(content, len(content))
    assert await box.channel.read_file("deep/er/big", 10, offset=5) == FileContent(
        content[5:15], len(content)
    )


async def test_replacing_keeps_the_mode_and_creating_replaces_nothing(box: Box, tmp_path: Path) -> None:
    path = tmp_path / "ws" / "tool"
    path.write_bytes(b"old")
    path.chmod(0o755)
    os.chown(path, UID, UID)
    refused = await box.channel.write_file("tool", b"new", must_create=True)
    assert isinstance(refused, FileFailed)
    assert refused.errno_name == "EEXIST"
    assert path.read_bytes() == b"old"
    assert await box.channel.write_file("tool", b"new", must_create=False) is None
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o755
    assert [entry.name for entry in (tmp_path / "ws").iterdir()] == ["tool"]  # no draft is left


@pytest.mark.parametrize(
    "options",
    [{}, {"security_opt": ["no-new-privileges", NO_LANDLOCK.replace("landlock_add_rule", "openat2")]}],
    ids=["openat2", "no-openat2"],
)
async def test_paths_do_not_lead_out_of_the_workspace(tmp_path: Path, options: dict[str, Any]) -> None:
    workspace = tmp_path / "ws"
    async with guest_box(workspace, **options) as box:
        setup = await sh(
            box.channel,
            "mkdir in && echo inside > in/file && ln -s /etc abs && ln -s ../../etc rel"
            " && ln -s /etc/passwd final && ln -s /proc/self/root magic"
            " && ln -s /tmp out && ln -s in/file near",
        )
        assert setup.exit_code == 0, setup
        assert await box.channel.read_file("in/file", 100) == FileContent(b"inside\n", 7)  # the control
        outside = ["abs/passwd", "rel/passwd", "final", "magic/etc/passwd", "../etc/passwd", "/etc/passwd"]
        outside += ["in/../../etc/passwd"]
        for path in outside:
            assert isinstance(await box.channel.read_file(path, 100), FileFailed), path
        for path in [
            "out/x",
            "abs/x",
            "../tmp/x",
            "/tmp/x",
            "magic/tmp/x",
            "final",
            "near",
            "in",
            "in/..",
            "",
        ]:
            assert isinstance(await box.channel.write_file(path, b"!", must_create=False), FileFailed), path
        for path in ["out", "abs", "..", "/", "magic"]:
            listed = await box.channel.list_files(path, is_recursive=True, max_entries=9)
            assert isinstance(listed, FileFailed), path
            assert isinstance(await box.channel.search("root", path, max_matches=9), FileFailed), path
        assert (await sh(box.channel, "ls /tmp; cat in/file")).stdout == b"inside\n"
        assert await box.channel.write_file("in/new/file", b"x", must_create=True) is None


async def test_what_is_no_regular_file_is_not_opened(box: Box) -> None:
    await sh(
        box.channel, "mkfifo fifo; mkdir dir; python3 -c \"import socket; socket.socket(1).bind('sock')\""
    )
    for path, errno_name in [("fifo", "EINVAL"), ("dir", "EISDIR"), ("sock", "EINVAL")]:
        read = await box.channel.read_file(path, 10)
        written = await box.channel.write_file(path, b"x", must_create=False)
        assert isinstance(read, FileFailed)
        assert isinstance(written, FileFailed)
        assert (read.errno_name, written.errno_name) == (errno_name, errno_name)
    listing = await box.channel.list_files(".", is_recursive=True, max_entries=10)
    assert isinstance(listing, Listing)
    assert [(entry.path, entry.kind) for entry in listing.entries] == [
        (b"dir", "directory"),
        (b"fifo", "other"),
        (b"sock", "other"),
    ]
    assert await box.channel.search("x", ".", max_matches=5) == SearchResult((), False)


async def test_a_listing_is_bounded_sorted_and_keeps_strange_names(box: Box) -> None:
    script = """
import os
for name in (b'b', b'a-b', b'\\xff\\n', b'.git/objects/x', b'a/z', b'a/.git/y'):
    os.makedirs(os.path.dirname(b'./' + name), exist_ok=True)
    open(name, 'w').close()
"""
    assert (await python(box.channel, script)).exit_code == 0
    whole = await box.channel.list_files(".", is_recursive=True, max_entries=100)
    assert isinstance(whole, Listing)
    assert [e.path for e in whole.entries] == sorted(e.path for e in whole.entries)
    assert len(whole.entries) == 10
    assert not whole.is_cut
    skipped = await box.channel.list_files("./", is_recursive=True, max_entries=100, skip_git=True)
    assert isinstance(skipped, Listing)
    assert [e.path for e in skipped.entries] == [b".git", b"a", b"a-b", b"a/.git", b"a/z", b"b", b"\xff\n"]
    flat = await box.channel.list_files("a", is_recursive=False, max_entries=1)
    assert isinstance(flat, Listing)
    assert ([e.path for e in flat.entries], flat.is_cut) == ([b"a/.git"], True)


async def test_a_search_finds_lines_and_skips_binaries(box: Box) -> None:
    await box.channel.write_file("src/a.py", b"import os\n\ndef main():\n    pass", must_create=True)
    await box.channel.write_file("src/b.bin", b"\0def main", must_create=True)
    await box.channel.write_file("long.txt", b"x" * 3_000_000 + b"def\ndef " + b"y" * 500, must_create=True)
    found = await box.channel.search("^ *(def|pass)", ".", max_matches=10)
    assert isinstance(found, SearchResult)
    assert [(m.path, m.line, m.text) for m in found.matches] == [
        (b"long.txt", 2, b"def " + b"y" * 396),
        (b"src/a.py", 3, b"def main():"),
        (b"src/a.py", 4, b"    pass"),
    ]
    wrong = await box.channel.search("(", ".", max_matches=10)
    assert isinstance(wrong, FileFailed)
    assert wrong.errno_name == "EINVAL"


async def test_a_hostile_expression_harms_only_its_worker(box: Box) -> None:
    await box.channel.write_file("a", b"a" * 2000 + b"\n", must_create=True)
    bomb = "(" * 5 + "a" + "{1,250})" * 5
    assert isinstance(await box.channel.search(bomb, ".", max_matches=1), FileFailed)
    slow = asyncio.create_task(box.channel.search(r"(.*)(.*)(.*)(.*)\4\3\2\1x", ".", max_matches=1))
    assert (await sh(box.channel, "echo fine")).stdout == b"fine\n"
    slow.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await slow
    assert isinstance(await box.channel.read_file("a", 1), FileContent)


# --- the relay ---

CLIENT = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
try:
    s.sendall(sys.argv[3].encode() * int(sys.argv[4]))
    s.shutdown(socket.SHUT_WR)
    data = b''
    while piece := s.recv(65536): data += piece
    print(len(data), data[:60])
except OSError as error:
    print('failed', type(error).__name__)
"""


@contextlib.asynccontextmanager
async def relay_box(tmp_path: Path, serve: Any, *relays: Relay) -> AsyncIterator[Box]:
    directory = tmp_path / "egress"
    directory.mkdir()
    server = await asyncio.start_unix_server(serve, directory / "proxy.sock")
    (directory / "proxy.sock").chmod(0o777)
    config = GuestConfig(egress_socket="/.agent-runner/egress/proxy.sock", relays=relays)
    volumes = {str(directory): {"bind": "/.agent-runner/egress", "mode": "ro"}}
    async with server, guest_box(tmp_path / "ws", config, volumes=volumes) as box:
        yield box


async def connect(box: Box, address: str, port: int, text: str, times: int) -> bytes:
    client = Command(
        ("python3", "-c", CLIENT, address, str(port), text, str(times)), env=PATH, timeout_seconds=20
    )
    result = await ended(box.channel, client)
    assert not result.stderr, result
    return result.stdout


async def test_the_relay_passes_half_closes_and_loses_nothing(tmp_path: Path) -> None:
    async def count_then_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()  # to the end: which only comes if the half-close is passed on
        writer.write(b"%d:" % len(data) + data)
        await writer.drain()
        writer.close()

    async with relay_box(tmp_path, count_then_answer, Relay("127.0.0.1", 3128, None)) as box:
        assert await connect(box, "127.0.0.1", 3128, "hi", 1) == b"4 b'2:hi'\n"
        size = 5_000_000
        assert (await connect(box, "127.0.0.1", 3128, "x", size)).startswith(b"5000008 b'5000000:xxx")
        answers = await asyncio.gather(*(connect(box, "127.0.0.1", 3128, "y", 1000) for _ in range(20)))
        assert all(answer.startswith(b"1005 b'1000:") for answer in answers)


async def test_more_clients_than_the_relay_takes_at_once_are_all_served(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    script = """
import socket, threading
served = []
def ask():
    s = socket.create_connection(('127.0.0.1', 3128))
    s.sendall(b'z' * 100000)
    s.shutdown(socket.SHUT_WR)
    size = 0
    while piece := s.recv(65536): size += len(piece)
    served.append(size)
threads = [threading.Thread(target=ask) for _ in range(400)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(served), set(served))
"""
    async with relay_box(tmp_path, echo, Relay("127.0.0.1", 3128, None)) as box:
        assert (await python(box.channel, script)).stdout == b"400 {100000}\n"


@pytest.mark.parametrize("options", [{}, WITHOUT_LANDLOCK], ids=["landlock", "no-landlock"])
async def test_the_relay_is_out_of_reach_or_its_death_ends_the_guest(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = GuestConfig(egress_socket="/nowhere", relays=(Relay("127.0.0.1", 3128, None),))
    kill_relay = (  # the child of PID 1 that is not the shell's parent
        "for p in /proc/[0-9]*; do [ $(cut -d' ' -f4 $p/stat) = 1 ] && [ ${p#/proc/} != $PPID ]"
        " && kill -9 ${p#/proc/}; done; sleep 1; echo done"
    )
    async with guest_box(tmp_path / "ws", config, **options) as box:
        if options:
            with pytest.raises(GuestError, match="the relay ended"):
                await sh(box.channel, kill_relay)
        else:
            assert (await sh(box.channel, kill_relay)).stdout == b"done\n"


async def test_a_connect_relay_asks_first_and_fails_fast_when_refused(tmp_path: Path) -> None:
    heads = []

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        if b"good.example" in head:
            writer.write(b"HTTP/1.1 200 ")
            await writer.drain()
            writer.write(b"OK\r\nX: y\r\n\r\nbanner;")
            writer.write(await reader.read())
        elif b"odd.example" in head:
            writer.write(b"HTTP/1.1 2000 OK\r\n\r\nleak")
        else:
            writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\nleak")
        await writer.drain()
        writer.close()

    async with relay_box(
        tmp_path,
        gateway,
        Relay("127.77.0.2", 443, "good.example:443"),
        Relay("127.77.0.3", 443, "bad.example:443"),
        Relay("127.77.0.4", 443, "odd.example:443"),
    ) as box:
        assert await connect(box, "127.77.0.2", 443, "hello", 1) == b"12 b'banner;hello'\n"
        assert heads == [b"CONNECT good.example:443 HTTP/1.1\r\nHost: good.example:443\r\n\r\n"]
        for address in ("127.77.0.3", "127.77.0.4"):
            assert await connect(box, address, 443, "hello", 1) == b"failed ConnectionResetError\n"


async def test_an_urgent_byte_neither_stalls_the_relay_nor_keeps_it_busy(tmp_path: Path) -> None:
    async def until_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        while data.count(b"after;") < 2 and (piece := await reader.read(1000)):
            data += piece
        writer.write(data)
        writer.close()

    script = """
import socket, time
s = socket.create_connection(('127.0.0.1', 3128))
s.settimeout(5)
for _ in range(2):
    s.sendall(b'before;')
    s.send(b'!', socket.MSG_OOB)
    s.sendall(b'after;')
print(s.recv(1000))
idle = socket.create_connection(('127.0.0.1', 3128))
idle.send(b'!', socket.MSG_OOB)
idle.sendall(b'x')
time.sleep(1)
"""
    async with relay_box(tmp_path, until_all, Relay("127.0.0.1", 3128, None)) as box:
        # Of two urgent bytes, the first becomes one like any other.
        said = (await python(box.channel, script)).stdout.replace(b"!", b"")
        assert said == b"b'before;after;before;after;'\n"
        assert relay_of(box).ticks() < os.sysconf("SC_CLK_TCK") / 2  # of the second that it had


async def test_an_answer_in_the_middle_of_an_upload_passes_the_relay(tmp_path: Path) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10)
        writer.write(b"403 no")
        writer.close()  # over unread bytes

    script = """
import socket, time
got = []
for _ in range(20):
    s = socket.create_connection(('127.0.0.1', 3128))
    try:
        for _ in range(100): s.sendall(b'x' * 65536)
    except OSError: pass
    try: got.append(s.recv(100))
    except OSError as error: got.append(error)
print(set(got))
"""
    async with relay_box(tmp_path, refuse, Relay("127.0.0.1", 3128, None)) as box:
        assert (await python(box.channel, script)).stdout == b"{b'403 no'}\n"


async def test_five_hundred_connections_lose_no_byte_and_leave_no_descriptor(tmp_path: Path) -> None:
    """Sizes at random, slow readers, half-closes, resets; the digest of every direction is compared."""

    async def answer_with_digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes((await reader.read(4)).rjust(4, b"\0"), "big")
        down = os.urandom(size)
        writer.write(hashlib.sha256(down).digest())
        seen = hashlib.sha256()

        async def listen() -> None:
            while data := await reader.read(50_000):
                seen.update(data)

        listening = asyncio.create_task(listen())
        with contextlib.suppress(OSError):
            for at in range(0, size, 30_000):
                writer.write(down[at : at + 30_000])
                await writer.drain()
            await listening
            writer.write(seen.digest())
            await writer.drain()
        listening.cancel()
        writer.close()

    script = """
import hashlib, os, random, socket, struct, threading, time
random.seed(7)
results = []
def ask(kind, up, down):
    s = socket.create_connection(('127.0.0.1', 3128))
    sent = os.urandom(up)
    def send():
        try:
            s.sendall(down.to_bytes(4, 'big'))
            for at in range(0, up, 20000): s.sendall(sent[at:at + 20000])
            s.shutdown(socket.SHUT_WR)
        except OSError: pass
    sender = threading.Thread(target=send)
    sender.start()
    if kind == 'reset':
        s.recv(10)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        s.close()
        sender.join()
        return
    data = b''
    while piece := s.recv(20000):
        data += piece
        if kind == 'slow': time.sleep(0.0005)
    sender.join()
    s.close()
    head, body, tail = data[:32], data[32:32 + down], data[32 + down:]
    results.append(hashlib.sha256(body).digest() == head and tail == hashlib.sha256(sent).digest())
for _ in range(5):
    kinds = random.choices(['slow', 'quick', 'reset'], k=100)
    ups, downs = random.choices([0, 1, 70000, 300000], k=100), random.choices([0, 1, 65536, 400000], k=100)
    threads = [threading.Thread(target=ask, args=one) for one in zip(kinds, ups, downs)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(len(results) > 250, set(results))
"""
    async with relay_box(tmp_path, answer_with_digest, Relay("127.0.0.1", 3128, None)) as box:
        assert await connect(box, "127.0.0.1", 3128, "x", 1)
        relay = relay_of(box)
        before = relay.descriptors()
        assert (await python(box.channel, script)).stdout == b"True {True}\n"
        await wait_until(lambda: relay.descriptors(sockets_only=True) <= before)
        assert relay.descriptors() <= before + 2 * 48  # its pipes, which it keeps


class RelayProcess:
    """The relay as the host sees it."""

    def __init__(self, pid: int) -> None:
        self._proc = Path("/proc") / str(pid)

    def descriptors(self, *, sockets_only: bool = False) -> int:
        places = [str(one.readlink()) for one in (self._proc / "fd").iterdir()]
        return sum(not sockets_only or "socket:" in place for place in places)

    def ticks(self) -> int:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def relay_of(box: Box) -> RelayProcess:
    """Find the one child of PID 1 that listens; it was forked before any command."""
    box.container.reload()
    pid = box.container.attrs["State"]["Pid"]
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return RelayProcess(min(children))


async def test_a_relay_without_a_gateway_resets_at_once(tmp_path: Path) -> None:
    config = GuestConfig(egress_socket="/nowhere", relays=(Relay("127.0.0.1", 3128, None),))
    async with guest_box(tmp_path / "ws", config) as box:
        answer = await connect(box, "127.0.0.1", 3128, "x", 1)
        assert answer.startswith(b"failed ")


# --- the end of the guest ---


async def test_the_container_ends_with_its_channel(box: Box) -> None:
    started = asyncio.Event()
    pending = asyncio.create_task(
        box.channel.run(Command(("sleep", "600"), env=PATH), on_started=lambda pid: started.set())
    )
    await started.wait()
    await box.channel.close()
    with pytest.raises(GuestError, match="closed"):
        await pending
    assert (await asyncio.to_thread(box.container.wait, timeout=20))["StatusCode"] == 0


async def test_a_garbled_frame_ends_the_guest_which_says_so(box: Box) -> None:
    await box.stream.write(struct.pack(">IBI", 6, codec.Type.KILL, 1) + b"?")
    with pytest.raises(
        GuestError, match="the guest ended; its last words: agent-runner guest: garbled frame"
    ):
        await box.channel.run(Command(("sleep", "1"), env=PATH))
    with pytest.raises(GuestError, match="last words"):
        await box.channel.read_file("x", 1)


async def test_a_configuration_that_cannot_be_met_is_quoted(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", must_open=False) as box:
        with pytest.raises(GuestError, match="cannot open the workspace '/nowhere': No such file"):
            await box.channel.open(GuestConfig(workspace="/nowhere"))


async def test_a_container_started_as_root_is_refused(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", must_open=False, user="0:0") as box:
        with pytest.raises(GuestError, match="refuses to run as root"):
            await box.channel.open(GuestConfig())


async def test_a_guest_that_is_killed_from_outside_fails_every_call(box: Box) -> None:
    calls = [asyncio.create_task(sh(box.channel, "sleep 60")) for _ in range(3)]
    await sh(box.channel, "true")
    await asyncio.to_thread(box.container.kill)
    for call in calls:
        with pytest.raises(GuestError, match="the guest ended"):
            await call


def test_the_refusal_program_names_what_was_blocked() -> None:
    refused = str(BUILD / "refused")
    done = subprocess.run(["/usr/bin/cu\x1b[31mrl"], executable=refused, capture_output=True, check=False)
    assert done.returncode == 126
    assert done.stderr == b"agent-runner: 'cu\\x1b[31mrl' is blocked by policy (shell.blocked_commands)\n"


async def test_a_blocked_program_is_refused_inside(tmp_path: Path) -> None:
    volumes = {str(BUILD / "refused"): {"bind": "/usr/bin/curl", "mode": "ro"}}
    async with guest_box(tmp_path / "ws", volumes=volumes) as box:
        result = await sh(box.channel, "curl --version || echo $?")
        assert result.stdout == b"126\n"
        assert b"'curl' is blocked" in result.stderr
    async with guest_box(tmp_path / "ws") as box:
        assert b"curl" in (await sh(box.channel, "curl --version")).stdout  # the control
