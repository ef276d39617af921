"""Each control of a container, seen from inside beside a container without it; and an engine that fails."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.docker import DockerRuntime
from sandbox.container.image import blocked_paths, find_image
from sandbox.container.image_index import index_image
from sandbox.container.reaper import ReapReport, claim_session, current_owner, reap
from sandbox.container.runtime import Owned
from sandbox.container.spec import ContainerSpec
from sandbox.errors import EngineError
from sandbox.policy.model import MIB, Limits, Policy, ShellPolicy
from tests.containers import IMAGE, UID, make_places, make_spec, read_all

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
LIMITS = Limits(memory_bytes=64 * MIB, cpus=0.5, pids=24, nofile=2048, tmpfs_bytes=4 * MIB)

PROBE = r"""
import ctypes, json, os, resource, socket, subprocess
def attempt(action):
    try:
        return action() or "done"
    except OSError as exc:
        return type(exc).__name__ + ":" + str(exc.errno)
def write(path, size=1):
    with open(path, "wb") as file:
        file.write(b"x" * size)
def run(path):
    with open(path, "w") as file:
        file.write("#!/bin/sh\nexit 0\n")
    os.chmod(path, 0o755)
    return "exit %d" % subprocess.run([path]).returncode
def fork_until(limit):
    children = []
    try:
        while len(children) < limit:
            pid = os.fork()
            if pid == 0:
                os.read(hold[0], 1)
                os._exit(0)
            children.append(pid)
    except OSError:
        pass
    os.write(hold[1], b"x" * len(children))
    for pid in children:
        os.waitpid(pid, 0)
    return len(children)
def open_until(limit):
    files = []
    try:
        while len(files) < limit:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for file in files:
        os.close(file)
    return len(files)
def lookup(name):
    try:
        return socket.gethostbyname(name)
    except OSError:
        return "unknown"
def keyctl():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(250, 0, -3, 0) < 0:
        raise OSError(ctypes.get_errno(), "keyctl")
hold = os.pipe()
status = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "seccomp": status["Seccomp"],
    "no_new_privs": status["NoNewPrivs"],
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "resolver": open("/etc/resolv.conf").read(),
    "host_name": lookup("allowed.example"),
    "write_root": attempt(lambda: write("/usr/probe")),
    "exec_tmp": attempt(lambda: run("/tmp/probe")),
    "exec_home": attempt(lambda: run(os.environ["HOME"] + "/probe")),
    "exec_workspace": attempt(lambda: run("/workspace/probe")),
    "exec_shm": attempt(lambda: run("/dev/shm/probe")),
    "write_tmp": attempt(lambda: write("/tmp/probe")),
    "write_8_mib": attempt(lambda: write("/tmp/large", 8 << 20)),
    "forks": fork_until(64),
    "files": open_until(2000),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
    "keyctl": attempt(keyctl),
    "cpu_quota": attempt(lambda: int(open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read()))
        if os.path.exists("/sys/fs/cgroup/cpu") else open("/sys/fs/cgroup/cpu.max").read(),
    "cgroup": open("/proc/self/cgroup").read().splitlines()[0].split(":")[2],
    "environment": dict(os.environ),
    "curl": subprocess.run(["/usr/bin/curl", "--version"], capture_output=True).stdout.decode()[:5],
}))
"""


@pytest.fixture
async def runtime() -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime()
    yield made
    await made.close()


@pytest.fixture(scope="module")
def places_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


async def run_python(
    runtime: DockerRuntime, spec: ContainerSpec, program: str
) -> tuple[dict[str, bytes], Any]:
    container = await runtime.create(replace(spec, command=("/usr/bin/python3", "-c", program)))
    try:
        read = await read_all(await runtime.start(container))
        return read, await runtime.state(container)
    finally:
        await runtime.remove(container, spec.workspace.name)


@pytest.fixture(scope="module")
def inside(places_root: Path) -> dict[str, Any]:
    """What the probe sees in a container of ours, strict limits."""

    async def probe() -> dict[str, Any]:
        runtime = DockerRuntime()
        policy = Policy(name="strict", limits=LIMITS, shell=ShellPolicy(workspace_exec=False))
        places = make_places(places_root)
        refusal = Path(places.guest_binary)
        refusal.write_text("#!/bin/sh\necho blocked\n")
        spec = make_spec(
            places,
            await runtime.image_id(IMAGE),
            policy,
            blocked_paths=("/usr/bin/curl",),
            hosts={"allowed.example": "127.77.0.1"},
        )
        read, _ = await run_python(runtime, spec, PROBE)
        await runtime.close()
        assert read["stdout"], read["stderr"].decode()
        return dict(json.loads(read["stdout"]))

    return asyncio.run(probe())


@pytest.fixture(scope="module")
def outside() -> dict[str, Any]:
    """What the same probe sees in a container that Docker makes when nothing is asked for."""
    command = ["docker", "run", "--rm", "--tmpfs", "/workspace:exec", "-e", "HOME=/root"]
    command += ["--security-opt", "seccomp=unconfined", IMAGE, "/usr/bin/python3", "-c", PROBE]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def test_no_process_is_root_or_holds_a_capability(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert (outside["uid"], outside["capabilities"] > 0) == (0, True)
    assert (inside["uid"], inside["capabilities"]) == (UID, 0)


def test_seccomp_and_no_new_privileges_are_on(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert (outside["seccomp"], outside["no_new_privs"], outside["keyctl"]) == ("0", "0", "done")
    assert (inside["seccomp"], inside["no_new_privs"]) == ("2", "1")
    assert inside["keyctl"] == "PermissionError:1"


def test_there_is_no_network_and_no_resolver(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert len(outside["interfaces"]) > 1
    assert inside["interfaces"] == ["lo"]
    assert inside["resolver"].split("\n")[0] == "nameserver 127.0.0.1"
    assert "search" not in inside["resolver"]


def test_an_allowed_name_has_its_loopback_address(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert outside["host_name"] == "unknown"
    assert inside["host_name"] == "127.77.0.1"


def test_only_scratch_is_writable_and_nothing_in_it_runs(
    inside: dict[str, Any], outside: dict[str, Any]
) -> None:
    scratch = ("exec_tmp", "exec_home", "exec_workspace")
    assert outside["write_root"] == "done"
    assert [outside[name] for name in scratch] == ["exit 0"] * 3
    assert inside["write_root"] in ("OSError:30", "PermissionError:13")
    assert inside["write_tmp"] == "done"
    assert [inside[name] for name in (*scratch, "exec_shm")] == ["PermissionError:13"] * 4


def test_limits_hold(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert (outside["forks"], outside["files"] > 900, outside["write_8_mib"]) == (64, True, "done")
    assert inside["forks"] < LIMITS.pids
    assert inside["files"] < LIMITS.nofile
    assert inside["write_8_mib"] == "OSError:28"
    assert outside["core"] != 0
    assert inside["core"] == 0


def test_the_cpu_quota_is_in_the_cgroup(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert outside["cpu_quota"] in (-1, "max 100000\n")
    assert inside["cpu_quota"] in (50_000, "50000 100000\n")


def test_the_cgroup_path_says_nothing_of_the_host(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert inside["cgroup"] == "/"


def test_a_blocked_program_is_covered(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    assert outside["curl"] == "curl "
    assert inside["curl"] == "block"


def test_no_value_of_the_host_is_in_the_environment(
    inside: dict[str, Any],
) -> None:
    expected = {"HOME", "PATH", "LANG", "TERM", "HOSTNAME", "NODE_USE_ENV_PROXY", "NO_PROXY", "no_proxy"}
    expected |= {f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL")}
    expected |= {f"{name}_proxy" for name in ("http", "https", "all")}
    assert set(inside["environment"]) - {"LC_CTYPE"} == expected  # Python itself sets LC_CTYPE
    assert inside["environment"]["HOSTNAME"] == "sandbox"


async def test_proxies_of_the_users_docker_configuration_stay_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = "http://user:secret@proxy.invalid:1"
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": {"ftpProxy": secret}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    control = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", IMAGE, "env"], capture_output=True, check=True
    )
    assert secret.encode() in control.stdout
    runtime = DockerRuntime()
    spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE))
    read, _ = await run_python(runtime, spec, "import os; print(os.environ)")
    await runtime.close()
    assert b"HTTP_PROXY" in read["stdout"]
    assert secret.encode() not in read["stdout"]


@pytest.mark.parametrize(("limit_mib", "is_killed"), [(256, False), (48, True)])
async def test_memory_beyond_the_limit_kills(
    runtime: DockerRuntime, tmp_path: Path, limit_mib: int, is_killed: bool
) -> None:
    policy = Policy(name="memory", limits=Limits(memory_bytes=limit_mib * MIB))
    spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE), policy)
    read, state = await run_python(runtime, spec, "x = bytearray(100 << 20); print(len(x), flush=True)")
    assert (read["stdout"] == b"", state.is_oom_killed) == (is_killed, is_killed)


@pytest.mark.parametrize(("is_allowed", "output"), [(True, b"ran\n"), (False, b"PermissionError\n")])
async def test_workspace_exec_decides_whether_built_files_run(
    runtime: DockerRuntime, tmp_path: Path, is_allowed: bool, output: bytes
) -> None:
    policy = Policy(name="exec", shell=ShellPolicy(workspace_exec=is_allowed))
    spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE), policy)
    program = """
import os, subprocess
open("x", "w").write("#!/bin/sh\\necho ran\\n"); os.chmod("x", 0o755)
try: subprocess.run(["./x"])
except OSError as exc: print(type(exc).__name__)
"""
    read, _ = await run_python(runtime, spec, program)
    assert read["stdout"] == output


async def test_changes_land_in_the_upper_layer_only(runtime: DockerRuntime, tmp_path: Path) -> None:
    places = make_places(tmp_path)
    user = Path(places.workspace.lower[1])
    (user / "kept").write_text("as it was")
    user.chmod(0o777)
    spec = make_spec(places, await runtime.image_id(IMAGE))
    program = "open('new', 'w').write('x'); print(open('kept').read())"
    read, _ = await run_python(runtime, spec, program)
    assert read["stdout"] == b"as it was\n"
    assert [path.name for path in user.iterdir()] == ["kept"]
    assert [path.name for path in Path(places.workspace.upper).iterdir()] == ["new"]


async def test_paths_with_colons_and_spaces_are_mounted(runtime: DockerRuntime, tmp_path: Path) -> None:
    spec = make_spec(make_places(tmp_path / "a:b c"), await runtime.image_id(IMAGE))
    Path(spec.workspace.lower[1], "seen").touch()
    read, _ = await run_python(runtime, spec, "import os; print(os.listdir('.'))")
    assert read["stdout"] == b"['seen']\n"


@pytest.mark.parametrize("name", ["a,ro,b", "a\\b", "a\nb"])
async def test_paths_that_mount_options_cannot_carry_are_refused(
    runtime: DockerRuntime, tmp_path: Path, name: str
) -> None:
    spec = make_spec(make_places(tmp_path / name), await runtime.image_id(IMAGE))
    with pytest.raises(EngineError, match="rename the directory"):
        await runtime.create(spec)
    assert spec.workspace.name not in volume_names()


def import_image(name: str, *changes: str) -> str:
    """Import an image with one empty file in it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    command = ["docker", "import", *(f"--change={change}" for change in changes), "-", name]
    done = subprocess.run(command, input=content.getvalue(), capture_output=True, check=True)
    return done.stdout.decode().strip()


def volume_names() -> set[str]:
    listed = subprocess.run(["docker", "volume", "ls", "-q"], capture_output=True, check=True)
    return set(listed.stdout.decode().split())


async def test_a_volume_that_the_image_smuggles_in_is_refused_and_removed(
    runtime: DockerRuntime, tmp_path: Path
) -> None:
    image = import_image("agent-runner/test-volume", "VOLUME /data", "CMD x")
    try:
        spec = make_spec(make_places(tmp_path), image)
        with pytest.raises(EngineError, match=r"did not apply mounts: .*/data"):
            await runtime.create(spec)
        session = spec.label("agent-runner.session")
        assert [owned for owned in await runtime.owned() if owned.session_id == session] == []
        assert spec.workspace.name not in volume_names()
    finally:
        subprocess.run(["docker", "rmi", "-f", image], capture_output=True, check=True)


async def test_an_images_entrypoint_user_and_health_check_do_not_count(
    runtime: DockerRuntime, tmp_path: Path
) -> None:
    changes = ('ENTRYPOINT ["/evil"]', 'CMD ["evil"]', "USER root", "HEALTHCHECK --interval=1s CMD /evil")
    image = import_image("agent-runner/test-config", *changes)
    try:
        spec = make_spec(make_places(tmp_path), image)
        container = await runtime.create(spec)
        inspected = json.loads(
            subprocess.run(["docker", "inspect", container], capture_output=True, check=True).stdout
        )[0]
        await runtime.remove(container, spec.workspace.name)
        assert [inspected["Path"], inspected["Args"]] == [spec.command[0], []]
        assert inspected["Config"]["Healthcheck"]["Test"] == ["NONE"]
        assert inspected["Config"]["User"] == f"{UID}:{UID}"
    finally:
        subprocess.run(["docker", "rmi", "-f", image], capture_output=True, check=True)


async def test_a_limit_that_is_not_in_force_ends_the_container_at_its_start(
    runtime: DockerRuntime, tmp_path: Path
) -> None:
    spec = replace(make_spec(make_places(tmp_path), await runtime.image_id(IMAGE)), command=("/bin/cat",))
    container = await runtime.create(spec)
    # What an engine does that loses a control between our look at it and the start.
    subprocess.run(["docker", "update", "--pids-limit", "5000", container], capture_output=True, check=True)
    with pytest.raises(EngineError, match="pids limit: asked 256, got 5000"):
        await runtime.start(container)
    with pytest.raises(EngineError):
        await runtime.state(container)
    assert spec.workspace.name not in volume_names()


async def test_a_cancelled_creation_leaves_nothing(runtime: DockerRuntime, tmp_path: Path) -> None:
    spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE))
    creating = asyncio.create_task(runtime.create(spec))
    await asyncio.sleep(0)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    session = spec.label("agent-runner.session")
    assert [owned for owned in await runtime.owned() if owned.session_id == session] == []


@pytest.mark.parametrize(
    ("address", "words"),
    [("unix:///nonexistent/docker.sock", "no engine answers"), ("tcp://127.0.0.1:1", "Unix socket")],
)
async def test_an_absent_engine_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    runtime = DockerRuntime()
    with pytest.raises(EngineError, match=words) as raised:
        await runtime.facts()
    await runtime.close()
    assert address in str(raised.value)
    assert "DOCKER_HOST" in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_a_socket_that_refuses_is_an_absent_engine(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))  # bound, but nobody listens
        runtime = DockerRuntime(f"unix://{tmp_path}/dead.sock")
        with pytest.raises(EngineError, match=r"no engine answers .*refused"):
            await runtime.facts()
        await runtime.close()


class Relay:
    """A Unix socket in front of the real engine, which can vanish as an engine does that is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def vanish(self) -> None:
        self.path.unlink()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect("/var/run/docker.sock")
            self._open += [client, engine]
            for source, sink in ((client, engine), (engine, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    made = Relay(tmp_path / "engine.sock")
    yield made
    if made.path.exists():
        made.vanish()


async def test_an_engine_that_dies_under_a_run_is_an_engine_error_at_once(
    runtime: DockerRuntime, relay: Relay, tmp_path: Path
) -> None:
    through = DockerRuntime(f"unix://{relay.path}")
    spec = replace(make_spec(make_places(tmp_path), await through.image_id(IMAGE)), command=("/bin/cat",))
    container = await through.create(spec)
    try:
        stream = await through.start(container)
        await stream.write(b"alive")
        assert await stream.read() == ("stdout", b"alive")
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        relay.vanish()
        async with asyncio.timeout(10):
            with pytest.raises(EngineError):
                await reading
        with pytest.raises(EngineError):
            await stream.write(b"x")
        await stream.close()
        with pytest.raises(EngineError, match="no engine answers"):
            await through.remove(container, spec.workspace.name)
    finally:
        await through.close()
        await runtime.remove(container, spec.workspace.name)


async def test_a_stream_that_breaks_while_the_container_runs_is_not_taken_for_its_end(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.container.docker.END_SECONDS", 0.2)
    through = DockerRuntime(f"unix://{relay.path}")
    spec = replace(make_spec(make_places(tmp_path), await through.image_id(IMAGE)))
    spec = replace(spec, command=("/bin/sleep", "100"))
    container = await through.create(spec)
    stream = await through.start(container)
    for sock in relay._open:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # every connection breaks; the engine itself still answers
    try:
        with pytest.raises(EngineError, match="running"):
            await stream.read()
    finally:
        await stream.close()
        await through.remove(container, spec.workspace.name)
        await through.close()


async def test_the_base_image_has_no_program_that_changes_its_user(
    runtime: DockerRuntime, tmp_path: Path
) -> None:
    program = """
import os, stat
found = [os.path.join(d, f) for d, _, fs in os.walk("/usr") for f in fs
         if os.lstat(os.path.join(d, f)).st_mode & (stat.S_ISUID | stat.S_ISGID)]
print(len(os.listdir("/usr/bin")) > 100, found)
"""
    spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE))
    read, _ = await run_python(runtime, spec, program)
    assert read["stdout"] == b"True []\n"


async def test_blocked_programs_are_found_in_the_real_image(runtime: DockerRuntime, tmp_path: Path) -> None:
    image = await find_image(runtime)
    index = await index_image(runtime, image, tmp_path, current_owner())
    assert blocked_paths(index, ("rm", "curl", "sudo")) == ("/usr/bin/curl", "/usr/bin/rm")
    assert "/usr/bin/python3.11" in blocked_paths(index, ("python3",))
    cached = next((tmp_path / "images").iterdir())
    assert cached.stat().st_mode & 0o777 == 0o600
    assert await index_image(runtime, image, tmp_path, current_owner()) == index
    mine = [owned for owned in await runtime.owned() if owned.owner == current_owner()]
    assert [owned for owned in mine if owned.session_id == "image-index"] == []


CONTROLLER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from sandbox.container.docker import DockerRuntime
from sandbox.container.reaper import claim_session, current_owner
from tests.containers import IMAGE, make_places, make_spec
async def main():
    runtime = DockerRuntime()
    state = Path(sys.argv[1])
    directory = claim_session(state / "sessions", "killed", current_owner())
    (directory / "ledger.jsonl").write_text("{}")
    (directory / "upper").mkdir()
    spec = make_spec(make_places(state / "places"), await runtime.image_id(IMAGE))
    spec = replace(spec, command=("/bin/sleep", "600"))
    container = await runtime.create(spec)
    await runtime.start(container)
    print(container, spec.workspace.name, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


class OwnRuntime(DockerRuntime):
    """Sees only what the processes of this test own: others may be testing on the same engine."""

    pids: tuple[int, ...] = ()

    async def owned(self) -> list[Owned]:
        return [one for one in await super().owned() if one.owner.split(":")[2] in map(str, self.pids)]


def release(directory: Path) -> None:
    for name in ("mask", "upper", "work"):
        shutil.rmtree(directory / name, ignore_errors=True)


async def test_what_a_killed_controller_left_is_removed_and_what_lives_is_not(
    runtime: DockerRuntime, tmp_path: Path
) -> None:
    live = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE))
    live_container = await runtime.create(live)
    claim_session(tmp_path / "sessions", "live", current_owner())
    (tmp_path / "sessions" / "live" / "upper").mkdir()
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert controller.stdout
        container, volume = controller.stdout.readline().split()
        own = OwnRuntime()
        own.pids = (os.getpid(), controller.pid)
        before = await reap(own, tmp_path, release)
        assert container not in before.containers
        assert (await runtime.state(container)).is_running

        controller.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, controller.pid, os.WEXITED | os.WNOWAIT)  # a corpse, not yet collected
        report = await reap(own, tmp_path, release)
        assert (report.containers, report.volumes) == ([container], [volume])
        assert (report.sessions, report.interrupted, report.problems) == (["killed"], ["killed"], [])
        assert volume not in volume_names()
        with pytest.raises(EngineError):
            await runtime.state(container)

        killed = tmp_path / "sessions" / "killed"
        assert sorted(path.name for path in killed.iterdir()) == ["interrupted", "ledger.jsonl", "owner"]
        assert (tmp_path / "sessions" / "live" / "upper").is_dir()
        assert not (await runtime.state(live_container)).is_running
        assert await reap(own, tmp_path, release) == ReapReport()
        await own.close()
    finally:
        controller.kill()
        controller.communicate()
        await runtime.remove(live_container, live.workspace.name)
