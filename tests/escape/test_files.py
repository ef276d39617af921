"""Attacks on the workspace by the code inside it, in real sessions, each with a control that succeeds.

What reads: one program tries every way to a hidden file it knows of, once with the deny patterns in force
and once without. What writes: one task makes the worst of its layer, and the patch is looked at on the host.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.workspace import quota
from sandbox.errors import StateError
from sandbox.guest.messages import CommandResult
from sandbox.session.actions import Action, CreateFile
from sandbox.session.result import RunResult
from tests.e2e.harness import (
    FINISH,
    Runner,
    command,
    create,
    engine_leftovers,
    loop_devices_of,
    mounts_beneath,
)
from tests.e2e.live_session import Live, python

pytestmark = pytest.mark.docker

SECRET = "hunter2-never-leaves"
PATTERNS = ["**/.env*", "**/secrets/**", "**/gehäuse/**"]
MIB = 1024 * 1024
RENAME_WHITEOUT = 4
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel holds the quota for root only")

# Where the secret is, for a task without deny patterns: by every one of these names.
HIDDEN = [
    b".env",
    b"src/secrets/key",
    b"config/deep/secrets/key",
    b"we[i]rd\\\n*dir/.env",
    b"\xff\xfe/.env\xff",
    "geha\u0308use/key".encode(),  # decomposed; the pattern is composed
    b"nested/.env",
]
LINKS = {
    b"relative": b".env",
    b"absolute": b"/workspace/.env",
    b"chain1": b"chain2",
    b"chain2": b"src/../chain3",
    b"chain3": b"./.env",
    b"folder": b"src/secrets",
    b"process": b"/proc/self/root/workspace/.env",
}

READ = r"""
import ctypes, json, os, subprocess, sys
SECRET = sys.argv[1].encode()
libc = ctypes.CDLL(None, use_errno=True)
tried = {}

def attempt(name):
    def run(way):
        try:
            found = way()
            tried[name] = "leaked" if SECRET in (found or b"") else "nothing"
        except OSError as error:
            tried[name] = error.strerror
    return run

def read(path, **options):
    with open(os.open(path, os.O_RDONLY, **options), "rb") as file:
        return file.read()

def everything(top):
    out = b""
    for parent, _, names in os.walk(top):
        for name in names:
            try:
                out += read(os.path.join(parent, name))
            except OSError:
                pass
    return out

NAMES = [bytes.fromhex(name) for name in json.loads(sys.argv[2])]
for number, name in enumerate(NAMES):
    attempt("name %d" % number)(lambda: read(name))
for link in ("relative", "absolute", "chain1", "process"):
    attempt("symlink " + link)(lambda: read(link))
attempt("symlink to a folder")(lambda: read("folder/key"))
attempt("hard link under an innocent name")(lambda: read("innocent.txt"))
attempt("hard link in another folder")(lambda: read("docs/notes.txt"))

@attempt("symlink made inside")
def _():
    os.symlink("/workspace/src/secrets", "/tmp/link")
    return read("/tmp/link/key")

@attempt("hard link made inside")
def _():
    os.link(".env", "mine")
    return read("mine")

@attempt("/proc/self/root")
def _(): return read("/proc/self/root/workspace/.env")

@attempt("/proc/self/cwd")
def _(): return read("/proc/self/cwd/.env")

@attempt("/proc/self/fd of a folder")
def _(): return read("/proc/self/fd/%d/secrets/key" % os.open("src", os.O_RDONLY))

@attempt("descriptor of a folder")
def _(): return read("secrets/key", dir_fd=os.open("src", os.O_RDONLY))

@attempt("every process's root, cwd and descriptors")
def _():
    out = b""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for way in ("root/workspace", "cwd"):
            try: out += read("/proc/%s/%s/.env" % (pid, way))
            except OSError: pass
        try: descriptors = os.listdir("/proc/%s/fd" % pid)
        except OSError: continue
        for number in descriptors:
            try: out += read("/proc/%s/fd/%s/.env" % (pid, number))
            except OSError: pass
    return out

@attempt("find over the whole tree")
def _(): return everything("/workspace")

@attempt("the layers, by their paths in mountinfo")
def _():
    out = b""
    for line in open("/proc/self/mountinfo"):
        if " /workspace " not in line: continue
        for option in line.split()[-1].split(","):
            key, _, value = option.partition("=")
            if key in ("lowerdir", "upperdir", "workdir"):
                for layer in value.split(":"):
                    out += everything(layer)
    try: return out + read("/workspace/.env")  # without the mask the plain name is the control
    except OSError: return out

@attempt("an ancestor renamed")
def _():
    os.system("mv config config2")
    return read("config2/deep/secrets/key")

@attempt("an ancestor copied")
def _():
    os.system("cp -r config2 config3")
    return read("config3/deep/secrets/key")

@attempt("an ancestor removed and made again")
def _():
    os.makedirs("again/deep", exist_ok=True)
    os.system("cp -r config2/deep/. again/deep/; rm -rf config2; mkdir -p config2/deep")
    return read("again/deep/secrets/key")

@attempt("a hidden name made and removed again")
def _():
    before = read(".env") if os.path.exists(".env") else b""
    open(".env", "w").write("mine")
    os.remove(".env")
    return before + (read(".env") if os.path.exists(".env") else b"")

print(json.dumps(tried))
"""


@dataclass
class World:
    """A workspace full of traps, and sessions on it."""

    live: Live

    def make(self) -> None:
        """Put the secret under every name."""
        top = os.fsencode(self.live.workspace)
        for path in HIDDEN:
            target = Path(os.fsdecode(top + b"/" + path))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(SECRET)
        for name, to in LINKS.items():
            os.symlink(to, top + b"/" + name)  # noqa: PTH211  # names are bytes
        (self.live.workspace / "docs").mkdir()
        os.link(top + b"/.env", top + b"/innocent.txt")
        os.link(top + b"/src/secrets/key", top + b"/docs/notes.txt")
        (self.live.workspace / "src" / "a.txt").write_text("one\n")
        (self.live.workspace / ".ENV").write_text("another file, as this filesystem compares names")
        (self.live.workspace / "nested" / ".git").write_text("gitdir: /workspace/../outside\n")

    def tree(self) -> dict[str, tuple[int, int, bytes]]:
        """All that is the user's, for comparing; no link is followed."""
        found = {}
        for path in self.live.workspace.rglob("*"):
            entry = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(entry.st_mode) else b""
            found[os.fsencode(path).hex()] = (entry.st_mode, entry.st_mtime_ns, content)
        return found

    def run(self, program: str, *arguments: str, patterns: list[str] | None = None, **sections: Any) -> Ran:
        """Run a Python program of the task in a session of its own."""
        said: list[CommandResult] = []

        async def work(guest: Any, session: Any) -> None:
            said.append(await guest.run(python(program, *arguments, timeout_seconds=100.0)))

        filesystem = {"deny_patterns": PATTERNS if patterns is None else patterns}
        result = asyncio.run(self.live.run(work, filesystem=filesystem, **sections))
        assert not engine_leftovers(result.session)
        assert not mounts_beneath(self.live.state)
        assert not loop_devices_of(self.live.state)
        return Ran(result, said[0])


@dataclass
class Ran:
    """A session that is over, and what its program said."""

    result: RunResult
    said: CommandResult

    @property
    def out(self) -> str:
        assert self.said.exit_code == 0, self.said.stderr.decode()
        return self.said.stdout.decode()

    @property
    def patch(self) -> bytes:
        assert self.result.patch
        return Path(self.result.patch.path).read_bytes()

    @property
    def withheld(self) -> dict[str, str]:
        assert self.result.patch
        return dict(line.split(": ", 1) for line in self.result.patch.withheld)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(Live(tmp_path))
    (made.live.workspace / "src").mkdir(parents=True)
    made.make()
    return made


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines for a reader: one per attack."""
    lines: list[str] = []
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


def test_no_way_to_a_hidden_file_leads_there_and_without_patterns_each_does(
    world: World, report: list[str]
) -> None:
    names = json.dumps([name.hex() for name in HIDDEN])
    control = json.loads(world.run(READ, SECRET, names, patterns=[]).out)
    tried = json.loads(world.run(READ, SECRET, names).out)
    report += [f"  {name:52.52} control: {control[name]:10.10} masked: {tried[name]}" for name in tried]
    assert {name for name, outcome in control.items() if outcome != "leaked"} == set()
    assert {name for name, outcome in tried.items() if outcome == "leaked"} == set()
    assert tried.keys() == control.keys()


WRITE = r"""
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
tried = {}

def attempt(name):
    def run(way):
        try:
            tried[name] = repr(way())
        except OSError as error:
            tried[name] = error.strerror
    return run

def put(path, content=b"x"):
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)

def call(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

@attempt("whiteout by mknod")
def _(): os.mknod("docs/a.md", 0o020000, 0)

@attempt("whiteout by RENAME_WHITEOUT")
def _():
    put("docs/moved")
    call(libc.renameat2(-100, b"docs/moved", -100, b"docs/elsewhere", ctypes.c_uint(4)))

@attempt("whiteout over a hidden name by RENAME_EXCHANGE")
def _():
    put("swap")
    call(libc.renameat2(-100, b"swap", -100, b".env", ctypes.c_uint(2)))

for space in ("user", "trusted"):
    for mark in ("opaque", "redirect", "metacopy", "origin", "whiteout"):
        attempt("xattr %s.overlay.%s" % (space, mark))(
            lambda: os.setxattr("src", "%s.overlay.%s" % (space, mark), b"y"))
attempt("security.capability")(lambda: os.setxattr("src/a.txt", "security.capability", b"x" * 20))
attempt("unshare a user namespace")(lambda: call(libc.unshare(0x10000000)))
attempt("mount")(lambda: call(libc.mount(b"/", b"docs", None, 4096, None)))

attempt("fifo")(lambda: os.mkfifo("fifo"))
attempt("socket")(lambda: socket.socket(socket.AF_UNIX).bind("socket"))
attempt("device")(lambda: os.mknod("device", 0o020666, os.makedev(1, 3)))
attempt("sparse 1 PiB")(lambda: os.truncate(os.open("sparse", os.O_CREAT | os.O_RDWR), 1 << 50))
attempt("sparse 1 TiB")(lambda: os.truncate("sparse", 1 << 40))
attempt("set-uid")(lambda: (put("setuid"), os.chmod("setuid", 0o6755)))
attempt("names made later")(lambda: (put(".env.local"), put("src/deep/secrets/x"), put(".env")))
attempt("hard links in the layer")(lambda: (put("one", b"same"), os.link("one", "two")))
attempt("a link in place of a folder")(lambda: (os.system("rm -rf src"), os.symlink("/etc", "src")))
attempt("a link out")(lambda: os.symlink("../../../../etc/cron.d", "out"))
attempt("names")(lambda: [put(name) for name in
    (b"\x1b]0;title\x07", b"new\nline: ok", "\u202egpj.sh".encode(), b"...", b".. ", b"..\\..\\x", b"\xff",
     b"-rf", b"--help", b":(top)x", b"a" * 255)])
attempt("a repository")(lambda: (put(".git/config", b"[core]\n fsmonitor = touch /tmp/owned\n"),
    put(".gitattributes", b"* diff=x filter=x\n"), put("sub/.git", b"gitdir: /outside\n"),
    put("bare/HEAD", b"ref: refs/heads/x\n"), put("bare/config", b"[core]\n bare = true\n")))

def nest(levels):
    top = os.open(".", os.O_RDONLY)
    os.mkdir("pit"); os.chdir("pit")
    for _ in range(levels):
        os.mkdir("d"); os.chdir("d")
    put("bottom"); os.fchdir(top)
attempt("nested folders")(lambda: nest(5000))

def many(count):
    os.mkdir("many")
    for number in range(count):
        os.close(os.open("many/%d" % number, os.O_CREAT | os.O_WRONLY))
attempt("files en masse")(lambda: many(8000))
print(json.dumps(tried))
"""

REFUSED = {
    "whiteout by mknod": "Operation not permitted",
    "whiteout by RENAME_WHITEOUT": "Invalid argument",
    "whiteout over a hidden name by RENAME_EXCHANGE": "No such file or directory",
    "security.capability": "Invalid argument",
    "unshare a user namespace": "Operation not permitted",
    "mount": "Operation not permitted",
    "device": "Operation not permitted",
    "sparse 1 PiB": "File too large",
}


def test_whatever_a_task_makes_of_its_layer_the_patch_holds_plain_changes_only(
    world: World, report: list[str]
) -> None:
    before = world.tree()
    ran = world.run(WRITE)
    tried = json.loads(ran.out)
    report += [f"  {name:52.52} {outcome[:60]}" for name, outcome in tried.items()]
    assert {name: tried[name] for name in REFUSED} == REFUSED
    assert all("trusted" not in name or tried[name] == "Operation not permitted" for name in tried)
    assert tried["fifo"] == tried["socket"] == "None"  # the control: special files can be made
    assert world.tree() == before
    withheld = ran.withheld
    assert {".env", ".env.local", "src/deep/secrets", ".git", "sub/.git", "fifo", "socket", "sparse"} - {
        *withheld
    } == {"src/deep/secrets"}  # removed again with its folder: src is a link now
    assert any(
        path.startswith("pit/") and "were not looked at" in reason for path, reason in withheld.items()
    )
    assert SECRET.encode() not in ran.patch
    assert b"new file mode 120000" in ran.patch
    for bad in (b"\x1b", "\u202e".encode()):
        assert bad not in ran.patch.split(b"@@")[0]
    assert not Path("/tmp/owned").exists()  # what the repository's configuration would run
    patch = ran.result.patch
    assert patch and patch.files > 8000


def test_control_git_on_such_a_repository_runs_what_its_configuration_says(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with (tmp_path / ".git" / "config").open("a") as config:
        config.write(f"[core]\n fsmonitor = touch {tmp_path}/owned; false\n")
    subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "owned").exists()


@root_only
def test_control_marks_and_devices_can_be_made_where_nothing_forbids_it(tmp_path: Path) -> None:
    os.mknod(tmp_path / "whiteout", stat.S_IFCHR, 0)
    os.mknod(tmp_path / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "file").touch()
    libc = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(tmp_path / name) for name in ("file", "moved")]
    assert libc.renameat2(-100, names[0], -100, names[1], ctypes.c_uint(RENAME_WHITEOUT)) == 0
    assert stat.S_ISCHR((tmp_path / "file").lstat().st_mode)
    for mark in ("user.overlay.redirect", "trusted.overlay.opaque"):
        os.setxattr(tmp_path, mark, b"y")
    done = subprocess.run(["unshare", "-m", "mount", "--bind", "/", str(tmp_path)], check=False)
    assert done.returncode == 0


# --- quotas ---


@root_only
def test_a_full_workspace_ends_the_session_and_the_patch_so_far_is_kept(world: World) -> None:
    runner = Runner(world.live.directory)
    turns = [
        {"calls": [create("./src/b.txt", "two\n")]},
        {"calls": [command('python3 -c \'open("junk", "wb").write(bytes(1 << 30))\'')]},
        {"calls": [create("./src/never.txt", "never\n")]},
        FINISH,
    ]
    limits = {"workspace_bytes": 16 * MIB, "workspace_files": 1024, "workspace_quota": "filesystem"}
    finished = runner.run("--model", runner.script(*turns), policy=runner.policy(limits=limits))
    result = finished.json
    assert (result["status"], finished.code) == ("disk_full", 17), result["reason"]
    assert result["reason"] == "the workspace quota of 16.0 MiB (limits.workspace_bytes) is used up"
    assert result["spent"]["written_bytes"] <= 16 * MIB == result["limits"]["written_bytes"]
    assert "src/b.txt" in Path(result["patch"]["path"]).read_text()
    assert "No space left" in result["actions"][1]["excerpt"]
    assert len(result["actions"]) == 2
    control = runner.run("--model", runner.script(*turns[:1], *turns[2:]))
    assert control.json["status"] == "completed"


@root_only
def test_a_file_that_does_not_fit_ends_the_session_although_smaller_ones_would(world: World) -> None:
    outcomes: list[str] = []

    async def work(guest: Any, session: Any) -> None:
        await guest.run(python("open('junk', 'wb').write(bytes(12 << 20))"))
        for number, size in enumerate((MIB // 4, 8 * MIB, MIB // 4)):
            operation = CreateFile(f"src/{number}.txt", "x" * size)
            outcomes.append(
                (await session.broker.perform(Action(f"a{number}", "create", operation, b"{}"))).verdict
            )

    limits = {"workspace_bytes": 16 * MIB, "workspace_files": 1024}
    result = asyncio.run(world.live.run(work, limits=limits))
    assert (result.status, outcomes) == ("disk_full", ["done"]), result.reason
    assert [action.ok for action in result.actions] == [True, False]


@root_only
def test_the_kernel_counts_files_and_a_command_that_tidies_up_may_go_on(world: World) -> None:
    script = """
import os
made = 0
try:
    while True:
        os.close(os.open("f%d" % made, os.O_CREAT)); made += 1
except OSError as error:
    print(made, error.strerror)
for number in range(made):
    os.remove("f%d" % number)
try:
    with open("/tmp/big", "wb") as file:
        while True: file.write(bytes(1 << 20))
except OSError as error:
    print("tmp", error.strerror)
try:
    while True:
        os.close(os.open("/tmp/f%d" % made, os.O_CREAT)); made += 1
except OSError as error:
    print("tmp files", error.strerror)
"""
    limits = {"workspace_bytes": 16 * MIB, "workspace_files": 1024, "tmpfs_bytes": 8 * MIB}
    ran = world.run(script, limits=limits)
    first, *rest = ran.out.splitlines()
    assert 1000 < int(first.split()[0]) <= 1024 + 64
    assert first.endswith("No space left on device")
    assert rest == ["tmp No space left on device", "tmp files No space left on device"]
    assert ran.result.status == "completed"


def test_control_without_a_quota_the_same_work_fits(world: World) -> None:
    ran = world.run(
        "import os; open('junk', 'wb').write(bytes(64 << 20)); [os.mkdir('d%d' % n) for n in range(2000)]"
    )
    assert (ran.out, ran.result.status) == ("", "completed")


# --- the host's side ---


@pytest.mark.parametrize("is_denied", [True, False])
def test_a_name_made_on_the_host_while_a_session_runs_is_told(world: World, is_denied: bool) -> None:
    """It shows through: no whiteout was there for it. With patterns that do not match it, nothing is said."""

    async def work(guest: Any, session: Any) -> None:
        (world.live.workspace / "src" / ".env.late").write_text(SECRET)
        said = await guest.run(python("print(open('src/.env.late').read())"))
        assert SECRET in said.stdout.decode()

    patterns = {"deny_patterns": PATTERNS if is_denied else []}
    result = asyncio.run(world.live.run(work, filesystem=patterns))
    told = [warning for warning in result.warnings if "src/.env.late" in warning]
    assert bool(told) is is_denied
    assert result.status == "completed"


def test_watched_layers_end_a_session_that_writes_too_much(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without loop devices: said beforehand, and ended while the command still runs."""
    monkeypatch.setattr(quota, "find_obstacle_at_sight", lambda: "no loop devices, says this test")
    script = "import time; open('junk', 'wb').write(bytes(64 << 20)); time.sleep(60)"
    ended: list[CommandResult] = []

    async def work(guest: Any, session: Any) -> None:
        ended.append(await guest.run(python(script, timeout_seconds=90.0)))

    result = asyncio.run(world.live.run(work, limits={"workspace_bytes": 16 * MIB}))
    assert (result.status, ended) == ("disk_full", []), result.reason
    assert "limits.workspace_bytes" in result.reason
    assert [warning for warning in result.warnings if warning.startswith("workspace quota: watched")]
    assert result.patch
    with pytest.raises(StateError, match="workspace_quota: watched"):
        asyncio.run(world.live.run(work, limits={"workspace_quota": "filesystem"}))
