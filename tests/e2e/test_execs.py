"""Every program that a command's processes start is reported, whatever they do to hide or be in the way."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from attached_guest import ROOT, Box, guest_box

from sandbox.container.seccomp import load_seccomp
from sandbox.errors import GuestError
from sandbox.guest import codec
from sandbox.guest.messages import Command, CommandResult, ExecSeen, GuestConfig, SpawnFailed

pytestmark = pytest.mark.docker

ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def confined(**changes: Any) -> dict[str, Any]:
    """The shipped seccomp profile, with some rules replaced: name of a system call to errno."""
    profile = json.loads(load_seccomp("agent", None).text)
    for name, errno in changes.items():
        for rule in profile["syscalls"]:
            rule["names"] = [known for known in rule["names"] if known != name]
        profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
        profile["syscalls"].append({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno})
    return {"security_opt": ["no-new-privileges", f"seccomp={json.dumps(profile)}"]}


@pytest.fixture(scope="module", autouse=True)
def _built_guest() -> None:
    subprocess.run(["make", "-s", "-C", str(ROOT / "images" / "guest")], check=True)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with guest_box(tmp_path / "ws", **confined()) as box:
        yield box


@pytest.fixture
async def blind(tmp_path: Path) -> AsyncIterator[Box]:
    """The control: the same container, where nobody observes."""
    async with guest_box(tmp_path / "blind", GuestConfig(observe_execs=False), **confined()) as box:
        yield box


async def run(
    box: Box, *argv: str | bytes, stdin: bytes = b"", seconds: float = 30
) -> tuple[CommandResult, list[ExecSeen]]:
    seen: list[ExecSeen] = []
    command = Command(argv, env=ENV, stdin=stdin, timeout_seconds=seconds)
    result = await box.channel.run(command, on_exec=seen.append)
    assert isinstance(result, CommandResult), result
    return result, seen


async def sh(box: Box, script: str, seconds: float = 30) -> tuple[CommandResult, list[ExecSeen]]:
    return await run(box, "sh", "-c", script, seconds=seconds)


async def python(box: Box, script: str, seconds: float = 30) -> tuple[CommandResult, list[ExecSeen]]:
    return await run(box, "python3", "-c", script, seconds=seconds)


def names(seen: list[ExecSeen]) -> list[str]:
    return [item.path.decode().rpartition("/")[2] for item in seen]


async def test_the_whole_tree_is_seen_with_its_parents(box: Box) -> None:
    script = (
        "import subprocess, sys\n"
        'code = \'import os; os.posix_spawn("/bin/true", ["true"], {})\'\n'
        "subprocess.run(['sh', '-c', 'python3 -c \"$0\"; :', code])"
    )
    result, seen = await python(box, script)
    assert result.exit_code == 0, result.stderr
    assert names(seen) == ["python3", "sh", "python3", "true"]
    assert seen[0].pid == result.claimed_pid
    assert [item.parent for item in seen[1:]] == [item.pid for item in seen[:-1]]
    assert seen[3].argv == (b"true",)
    assert seen[3].found == b"/usr/bin/true"
    assert result.execs_left_out == 0


async def test_a_search_along_path_is_one_exec_and_what_is_nowhere_none(box: Box) -> None:
    script = (
        "import os, subprocess\n"
        "subprocess.run(['true'], env={'PATH': '/nowhere:/workspace:/tmp:/usr/bin'})\n"
        "for path in ('/usr/bin/nonesuch', './nonesuch', '/bin/nonesuch', '/workspace/a/b'):\n"
        " try: os.execv(path, ['x'])\n"
        " except FileNotFoundError: print('none')\n"
    )
    result, seen = await python(box, script)
    assert names(seen) == ["python3", "true"]
    assert result.stdout == b"none\n" * 4


async def test_what_is_only_there_for_the_caller_still_runs(box: Box) -> None:
    """/proc/self is another place for the keeper: it must not say that nothing is there."""
    script = (
        "import os\nfd = os.open('/bin/echo', os.O_RDONLY)\nos.set_inheritable(fd, True)\nos.dup2(fd, 77)\n"
        "os.symlink('/proc/self/fd/77', 'link')\nif os.fork() == 0: os.execv('./link', ['echo', 'linked'])\n"
        "os.wait()\nos.execv('/proc/self/fd/77', ['echo', 'direct'])"
    )
    result, seen = await python(box, script)
    assert result.stdout == b"linked\ndirect\n"
    assert [item.path for item in seen[1:]] == [b"./link", b"/proc/self/fd/77"]


async def test_a_relative_path_is_found_from_the_callers_directory(box: Box) -> None:
    result, seen = await sh(box, "cd /usr/bin && ./true && cd / && bin/true; exec usr/bin/true")
    assert result.exit_code == 0
    assert [(item.path, item.found) for item in seen[1:]] == [
        (b"./true", b"/usr/bin/true"),
        (b"bin/true", b"/usr/bin/true"),
        (b"usr/bin/true", b"/usr/bin/true"),
    ]


async def test_arguments_are_cut_and_counted(box: Box) -> None:
    _, (_, many, long, fits) = await python(
        box,
        "import subprocess as s\ns.run(['/bin/true'] + [str(n) for n in range(5000)])\n"
        "s.run(['/bin/true', 'x' * 100_000])\ns.run(['/bin/true'] + ['y' * 256] * 31)",
    )
    assert (len(many.argv), many.is_cut) == (codec.EXEC_ARGS_MAX, True)
    assert (long.argv, long.is_cut) == ((b"/bin/true", b"x" * 256), True)
    assert (fits.argv, fits.is_cut) == ((b"/bin/true", *[b"y" * 256] * 31), False)


async def test_bytes_that_are_no_text_arrive_as_they_are(box: Box) -> None:
    _, seen = await run(box, "/bin/true", b"\xff\n\x1b[31m", "")
    assert [item.argv for item in seen] == [(b"/bin/true", b"\xff\n\x1b[31m", b"")]


EXECVE = (
    "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "NR = {'x86_64': 59, 'aarch64': 221}[os.uname().machine]\n"
    "def execve(path, argv):\n libc.syscall(NR, path, argv, None)\n"
    " print(os.strerror(ctypes.get_errno()), flush=True)\n"
)


async def test_pointers_that_lead_nowhere_harm_nobody(box: Box) -> None:
    script = EXECVE + (
        "P = ctypes.c_void_p\n"
        "for path, argv in ((P(0), P(0)), (P(8), P(8)), (P(2**63), P(2**64 - 8)),\n"
        "                   (b'/bin/true', P(2**47 - 12)), (b'', P(0)),\n"
        "                   (b'/' + b'a' * 5000, P(0))):\n execve(path, argv)\n"
        "execve(b'/bin/true', P(0))"
    )
    result, seen = await python(box, script)
    assert result.stdout.decode().split("\n")[:-1] == [
        "Bad address", "Bad address", "Bad address", "Bad address", "No such file or directory",
        "File name too long",
    ]  # fmt: skip
    assert [(item.path[:9], item.argv) for item in seen[1:]] == [
        (b"", ()), (b"", ()), (b"", ()), (b"/bin/true", ()), (b"", ()), (b"/aaaaaaaa", ()),
        (b"/bin/true", ()),
    ]  # fmt: skip
    assert len(seen[6].path) == codec.EXEC_PATH_MAX


async def test_a_path_at_the_end_of_memory_is_read_to_its_end(box: Box) -> None:
    script = EXECVE + (
        "import mmap\npages = mmap.mmap(-1, 8192)\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(pages))\n"
        "libc.mprotect(ctypes.c_void_p(start + 4096), 4096, 0)\npages[4086:4096] = b'/bin/true\\0'\n"
        "execve(ctypes.c_void_p(start + 4086), None)"
    )
    result, seen = await python(box, script)
    assert result.exit_code == 0
    assert seen[1].path == b"/bin/true"


async def test_vfork_posix_spawn_and_threads_do_not_stall(box: Box) -> None:
    script = (
        "import os, threading\n"
        "def spawn():\n for _ in range(10):\n  os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)\n"
        "threads = [threading.Thread(target=spawn) for _ in range(20)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "t = threading.Thread(target=lambda: os.execv('/bin/echo', ['echo', 'from a thread']))\n"
        "t.start()\nt.join()"
    )
    result, seen = await python(box, script)
    assert result.stdout == b"from a thread\n"
    assert names(seen) == ["python3", *["true"] * 200, "echo"]
    assert seen[-1].pid == result.claimed_pid  # the process, not the thread that asked
    assert {item.parent for item in seen[1:-1]} == {result.claimed_pid}


async def test_two_hundred_at_once_are_all_seen(box: Box) -> None:
    result, seen = await sh(
        box, "i=0; while [ $i -lt 200 ]; do /bin/echo $i & i=$((i+1)); done; wait; echo end"
    )
    assert result.stdout.endswith(b"end\n")
    assert {item.argv[1] for item in seen[1:]} == {str(n).encode() for n in range(200)}


async def test_a_signal_while_it_waits_does_not_count_an_exec_twice(box: Box) -> None:
    script = (
        "import os, signal, subprocess\nsignal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "for _ in range(100): subprocess.run(['/bin/true'])\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)"
    )
    result, seen = await python(box, script)
    assert result.exit_code == 0, result.stderr
    assert names(seen) == ["python3", *["true"] * 100]


async def test_a_daemon_is_seen_and_still_dies_with_its_command(box: Box) -> None:
    result, seen = await sh(
        box, "(setsid sh -c 'setsid sleep 600 & echo $! >pid' &) ; while [ ! -s pid ]; do sleep 0.01; done"
    )
    assert result.exit_code == 0
    assert {"setsid", "sh", "sleep"} <= set(names(seen))
    result, _ = await sh(box, "kill -0 $(cat pid)")
    assert result.exit_code != 0


async def test_a_fork_bomb_that_executes_holds_up_nobody(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", pids_limit=100, **confined()) as box:
        await box.channel.write_file("bomb", b"while :; do sh bomb & done\n", must_create=True)
        bomb = asyncio.create_task(sh(box, "sh bomb; while :; do :; done", seconds=3))
        await asyncio.sleep(1)
        listing = await box.channel.list_files(".", is_recursive=False, max_entries=10)
        result, seen = await bomb
        assert result.timed_out
        assert len(seen) > 50
        result, seen = await sh(box, "/bin/true; /bin/true")
        assert names(seen) == ["sh", "true", "true"], listing


async def test_more_execs_than_the_bound_are_counted(box: Box) -> None:
    """Failed ones cost little and are execs all the same: the file is there, and no program."""
    await box.channel.write_file("plain", b"", must_create=True)
    script = (
        "import os\nfor _ in range(10_500):\n try: os.execv('/workspace/plain', ['x'])\n except OSError: pass"
    )
    result, seen = await python(box, script)
    assert result.exit_code == 0
    assert len(seen) == codec.EXECS_MAX
    assert result.execs_left_out == 501


async def test_a_host_that_reads_nothing_holds_up_no_exec(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", **confined()) as box:
        await box.channel.write_file("plain", b"", must_create=True)
        hold = asyncio.Event()
        read = box.stream.read

        async def held() -> Any:
            await hold.wait()
            return await read()

        script = (
            "import os\nfor _ in range(2_000):\n try: os.execv('/workspace/plain', ['x' * 250] * 32)\n"
            " except OSError: pass\nopen('done', 'w').write('x')\nprint('output')"
        )
        box.stream.read = held  # type: ignore[method-assign]
        running = asyncio.create_task(python(box, script))
        done = tmp_path / "ws" / "done"
        while not done.exists():  # noqa: ASYNC110 - the command has no other way to say so: nobody reads
            await asyncio.sleep(0.02)
        hold.set()
        result, seen = await running
        assert result.stdout == b"output\n"
        assert len(seen) + result.execs_left_out == 2_001
        assert result.execs_left_out > 0


# --- hiding ---

FILTER = (
    "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "X86 = os.uname().machine == 'x86_64'\n"
    "SECCOMP, EXECVE = (317, 59) if X86 else (277, 221)\n"
    "def install(action, flags):\n"
    " code = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, EXECVE,\n"
    "                    6, 0, 0, action, 6, 0, 0, 0x7fff0000)\n"
    " buffer = ctypes.create_string_buffer(code)\n"
    " program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(buffer)))\n"
    " result = libc.syscall(SECCOMP, 1, flags, program)\n"
    " return os.strerror(ctypes.get_errno()) if result < 0 else 'installed'\n"
)


async def test_a_second_listener_is_refused(box: Box, blind: Box) -> None:
    script = FILTER + "print(install(0x7fc00000, 8))"
    for place, answer in ((box, b"Device or resource busy\n"), (blind, b"installed\n")):
        result, _ = await python(place, script)
        assert result.stdout == answer


async def test_no_other_filter_lets_an_exec_pass_unseen(box: Box) -> None:
    """Whatever it returns for execve: the call is seen, or it does not happen."""
    script = FILTER + (
        "for action in (0x7fff0000, 0x7ffc0000, 0x7ff00000, 0x7fc00000, 0x50001, 0x30000, 0x80000000):\n"
        " pid = os.fork()\n if pid == 0:\n"
        "  install(action, 0)\n  os.execv('/bin/echo', ['echo', hex(action)])\n os.waitpid(pid, 0)"
    )
    result, seen = await python(box, script)
    happened = result.stdout.split()
    assert happened[:2] == [b"0x7fff0000", b"0x7ffc0000"]  # allow and log
    assert {item.argv[1] for item in seen[1:]} >= set(happened)


FOREIGN = r"""
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
static const char path[] = "/bin/true";
int main(void)
{
    if (fork() == 0) {
        register const char *const *none __asm__("rdx") = 0;
        long number = 0x40000000 + 520, result;
        static const char *argv[] = {path, 0};
        __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(path), "S"(argv), "r"(none)
                         : "rcx", "r11", "memory");
        printf("x32 %ld\n", result);
        fflush(stdout);
        _exit(0);
    }
    int status;
    wait(&status);
    if (WIFSIGNALED(status))
        printf("x32 signal %d\n", WTERMSIG(status));
    fflush(stdout);
    if (fork() == 0) {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "0"(11L), "b"(path), "c"(0L), "d"(0L) : "memory");
        printf("i386 %ld\n", result);
        fflush(stdout);
        _exit(0);
    }
    wait(&status);
    if (WIFSIGNALED(status))
        printf("i386 signal %d\n", WTERMSIG(status));
    return 0;
}
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "foreign.c").write_text(FOREIGN)
    # Not position-independent: the address of the path must fit 32 bits.
    flags = ["-static", "-no-pie", "-fno-pie", "-O1"]
    subprocess.run(["gcc", *flags, "-o", folder / "foreign", folder / "foreign.c"], check=True)
    return (folder / "foreign").read_bytes()


@pytest.mark.skipif("__import__('os').uname().machine != 'x86_64'", reason="x86_64 has the other two ABIs")
async def test_an_exec_through_another_abi_does_not_happen(tmp_path: Path, foreign: bytes) -> None:
    """The shipped profile kills the caller; where one lets it pass, the observer's filter refuses it."""
    open_profile = {"security_opt": ["no-new-privileges", "seccomp=unconfined"]}
    told = {}
    for name, config, options in (
        ("shipped", GuestConfig(), confined()),
        ("unconfined", GuestConfig(), open_profile),
        ("control", GuestConfig(observe_execs=False), open_profile),
    ):
        async with guest_box(tmp_path / name, config, **options) as box:
            await box.channel.write_file("foreign", foreign, must_create=True)
            result, seen = await sh(box, "chmod +x foreign; ./foreign")
            told[name] = result.stdout.decode().split("\n")[:-1]
            assert "true" not in names(seen)
    assert told["shipped"] == ["x32 signal 31", "i386 signal 31"]
    assert told["unconfined"] == ["x32 -38", "i386 -38"]
    assert "i386 -38" not in told["control"]
    if not any("i386" in line for line in told["control"]):
        return  # It ran: what the observer refuses, this kernel can do.
    pytest.skip(f"untestable: this kernel has no i386 ABI ({told['control']})")


async def test_an_undumpable_caller_is_seen_without_its_path(box: Box) -> None:
    script = (
        "import ctypes, os, subprocess\nlibc = ctypes.CDLL(None)\npid = os.fork()\n"
        "if pid == 0:\n libc.prctl(4, 0, 0, 0, 0)\n os.execv('/bin/true', ['true'])\nos.wait()"
    )
    result, seen = await python(box, script)
    assert result.exit_code == 0
    assert (seen[1].path, seen[1].argv, seen[1].is_cut) == (b"", (), True)
    assert seen[1].parent == result.claimed_pid


async def test_a_raced_path_is_a_claim_but_the_exec_is_always_seen(box: Box) -> None:
    """The caller's memory changes between the keeper's look and the kernel's: only the path is in doubt."""
    script = EXECVE + (
        "import threading\nfor _ in range(60):\n pid = os.fork()\n if pid == 0:\n"
        "  path = ctypes.create_string_buffer(b'/bin/nothere', 32)\n"
        "  def flip():\n   while True:\n    path.value = b'/bin/true'\n    path.value = b'/bin/nothere'\n"
        "  threading.Thread(target=flip, daemon=True).start()\n  execve(path, None)\n  os._exit(7)\n"
        " print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)"
    )
    result, seen = await python(box, script)
    ran = result.stdout.split().count(b"0")
    assert len(seen) - 1 >= ran
    assert result.execs_left_out == 0


# --- when it cannot be ---


def without_notification() -> dict[str, Any]:
    profile = json.loads(load_seccomp("agent", None).text)
    rules = [rule for rule in profile["syscalls"] if not rule["comment"].startswith("ioctl, notification")]
    assert len(rules) == len(profile["syscalls"]) - 4
    return {"security_opt": ["no-new-privileges", f"seccomp={json.dumps(profile | {'syscalls': rules})}"]}


@pytest.mark.parametrize("options", [confined(seccomp=38), without_notification()], ids=["seccomp", "ioctls"])
async def test_without_user_notification_the_guest_refuses_to_start(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    async with guest_box(tmp_path / "ws", must_open=False, **options) as box:
        with pytest.raises(GuestError, match="cannot observe what commands execute"):
            await box.channel.open(GuestConfig())
    async with guest_box(tmp_path / "control", GuestConfig(observe_execs=False), **options) as box:
        result, seen = await run(box, "/bin/echo", "unobserved")
        assert (result.stdout, seen) == (b"unobserved\n", [])


async def test_execs_without_their_keeper_fail_and_the_command_is_lost(tmp_path: Path) -> None:
    async with guest_box(tmp_path / "ws", **confined()) as box:
        script = "while :; do /bin/true; done"
        running = asyncio.create_task(sh(box, script))
        box.container.reload()
        first = str(box.container.attrs["State"]["Pid"])
        keeper: list[str] = []
        while not keeper:  # the only child of PID 1
            keeper = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            await asyncio.sleep(0.05)
        subprocess.run(["kill", "-KILL", *keeper], check=True)
        result, _ = await running
        assert result.signal == 9
        assert result.exit_code is None
        result, seen = await sh(box, "/bin/true; :")
        assert names(seen) == ["sh", "true"]


async def test_a_program_that_cannot_be_started_is_no_stall(box: Box) -> None:
    seen: list[ExecSeen] = []
    await box.channel.write_file("plain", b"", must_create=True)
    for argv in (("nonesuch",), ("/nonesuch",), ("./plain",)):
        result = await box.channel.run(Command(argv, env=ENV), on_exec=seen.append)
        assert isinstance(result, SpawnFailed)
    assert [item.path for item in seen] == [b"./plain"]
