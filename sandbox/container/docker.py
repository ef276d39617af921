"""Run containers on a Docker engine. The only file that imports the Docker SDK; its errors end here. D2

The engine must be on this machine: the workspace is mounted from it, and what the engine claims about a
container is checked against this machine's kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sandbox.container import gvisor, verify
from sandbox.container.attach import AttachedStream
from sandbox.container.runtime import ContainerState, ContainerStream, EngineFacts, Owned
from sandbox.container.spec import LABEL_OWNER, LABEL_SESSION, WORKSPACE, ContainerSpec, OverlayVolume
from sandbox.errors import EngineError, HostError, ImageError

if TYPE_CHECKING:
    from docker import APIClient

T = TypeVar("T")

DEFAULT_SOCKET = "unix:///var/run/docker.sock"
API_SECONDS = 60
"""Longest wait for one answer of the engine."""
END_SECONDS = 5.0
"""How long a container may be reported as running after its stream has ended."""
LOOKS = 3
THREADS = 8
NAME_PREFIX = "agent-runner-"
NOT_FOUND, CONFLICT = 404, 409


class DockerRuntime:
    """The Runtime port on a Docker engine reached by a Unix socket (``DOCKER_HOST``, or the default one)."""

    def __init__(self, base_url: str | None = None) -> None:
        self._base_url = base_url or os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET
        self._connected: APIClient | None = None
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="engine")
        self._specs: dict[str, ContainerSpec] = {}

    async def facts(self) -> EngineFacts:
        """See Runtime."""
        return await self._call("ask the engine what it can enforce", self._facts)

    async def versions(self) -> dict[str, str]:
        """Return the releases of ``engine``, ``containerd`` and ``runc``, those that the engine names."""
        return await self._call("ask the engine for its versions", self._versions)

    async def image_id(self, reference: str) -> str:
        """See Runtime."""
        return await self._call(f"look up image {reference}", self._image_id, reference)

    async def create(self, spec: ContainerSpec) -> str:
        """See Runtime."""
        call = asyncio.ensure_future(self._call(f"create container {spec.name}", self._create, spec))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            # The request in the thread cannot be taken back: let it end, then undo it.
            undo = asyncio.ensure_future(self._undo(call, spec))
            while not undo.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(undo)
            raise

    async def start(self, container_id: str) -> ContainerStream:
        """See Runtime."""
        attempt = f"start container {container_id[:12]}"
        stream = AttachedStream(
            await self._call(attempt, self._attach, container_id),
            functools.partial(self._confirm_end, container_id),
        )
        try:
            await self._call(attempt, self._start, container_id)
        except BaseException:
            await stream.close()
            raise
        return stream

    async def state(self, container_id: str) -> ContainerState:
        """See Runtime."""
        state = (await self._call("ask how the container stands", self._inspect, container_id))["State"]
        running = bool(state["Running"])
        return ContainerState(
            is_running=running,
            # Docker says 0 for a container that runs or was never started.
            exit_code=None if running or state["Status"] == "created" else int(state["ExitCode"]),
            is_oom_killed=bool(state["OOMKilled"]),
            error=str(state["Error"]),
        )

    async def remove(self, container_id: str | None, volume: str | None) -> None:
        """See Runtime."""
        what = f"container {container_id[:12]}" if container_id else f"volume {volume}"
        await self._call(f"remove {what}", self._remove, container_id, volume)

    async def owned(self) -> list[Owned]:
        """See Runtime."""
        return await self._call("list our containers and volumes", self._owned)

    async def read_image(
        self, image_id: str, labels: dict[str, str], consume: Callable[[Iterator[bytes]], T]
    ) -> T:
        """Pass an image's whole file system, as a tar stream, to ``consume``, which runs in a thread.

        Nothing of the image is run: the container that the engine needs for this is never started.
        """
        return await self._call(f"read image {image_id}", self._read_image, image_id, labels, consume)

    async def close(self) -> None:
        """Let go of the engine's connections and threads; containers stay as they are."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._connected is not None:
            self._connected.close()

    async def _undo(self, creation: asyncio.Future[str], spec: ContainerSpec) -> None:
        with contextlib.suppress(EngineError):
            await self.remove(await creation, spec.workspace.name)

    async def _call(self, attempt: str, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking engine call in a thread; Any, because they are passed on as they are."""
        bound = functools.partial(_translate, attempt, self._base_url, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, bound)

    # Everything below runs in a thread.

    def _client(self) -> APIClient:
        if self._connected is None:
            if not self._base_url.startswith("unix://"):
                raise EngineError(
                    f"cannot use the engine at {self._base_url}: the workspace is mounted from this machine; "
                    "set DOCKER_HOST to a Unix socket (unix:///var/run/docker.sock)"
                )
            from docker import APIClient

            self._connected = APIClient(base_url=self._base_url, version="auto", timeout=API_SECONDS)
        return self._connected

    def _facts(self) -> EngineFacts:
        info = self._client().info()
        missing = [
            f"{control}: {obstacle}"
            for field, control, obstacle in (
                ("MemoryLimit", "memory", "cgroup controller 'memory' is off"),
                ("PidsLimit", "pids", "cgroup controller 'pids' is off"),
                ("CpuCfsQuota", "cpus", "cgroup controller 'cpu' has no quota"),
            )
            if not info.get(field)
        ]
        if not info.get("SwapLimit") and _has_swap():
            missing.append(
                "swap: this host swaps and the kernel keeps no swap accounts (boot with swapaccount=1)"
            )
        options = [option.split(",")[0] for option in info.get("SecurityOptions") or []]
        if info.get("OSType") != "linux":
            missing.append(f"containers: the engine runs {info.get('OSType')} containers, not Linux ones")
        return EngineFacts(
            version=str(info["ServerVersion"]),
            runtimes=tuple(sorted(info.get("Runtimes") or {})),
            has_seccomp="name=seccomp" in options,
            missing_controls=tuple(missing),
            runtime_args={
                name: tuple(runtime.get("runtimeArgs") or ())
                for name, runtime in (info.get("Runtimes") or {}).items()
            },
        )

    def _versions(self) -> dict[str, str]:
        parts: list[dict[str, Any]] = self._client().version().get("Components") or []
        names = {"Engine": "engine", "containerd": "containerd", "runc": "runc"}
        return {names[part["Name"]]: str(part["Version"]) for part in parts if part["Name"] in names}

    def _image_id(self, reference: str) -> str:
        from docker.errors import ImageNotFound

        try:
            image: dict[str, Any] = self._client().inspect_image(reference)  # type: ignore[no-untyped-call]
            return str(image["Id"])
        except ImageNotFound as exc:
            raise ImageError(
                f"cannot use image {reference}: it is not on this machine; docker pull it"
            ) from exc

    def _create(self, spec: ContainerSpec) -> str:
        client = self._client()
        created: list[str] = []
        volume = spec.workspace
        labels = {name: value for name, value in spec.labels if name in (LABEL_SESSION, LABEL_OWNER)}
        # Docker gives an existing volume of that name back without a word, with whatever options it has.
        if any(
            known["Name"] == volume.name
            for known in client.volumes(filters={"name": volume.name})["Volumes"] or []
        ):
            raise EngineError(
                f"cannot create container {spec.name}: volume {volume.name} exists already; "
                "remove it (agent-runner gc)"
            )
        try:
            options = _overlay_options(volume)
            made = client.create_volume(volume.name, "local", options, labels)
            answer = client.create_container(**self._container_options(client, spec))
            created.append(answer["Id"])
            has_swap = _has_swap()
            problems = [
                f"the engine warns: {warning.strip()}"
                for warning in answer.get("Warnings") or []
                if has_swap or "swap" not in warning
            ]
            if made.get("Options") != options:
                problems.append(f"the options of volume {volume.name}")
            problems += self._find_refused(spec, client.inspect_container(answer["Id"]), has_swap=has_swap)
            if problems:
                raise EngineError(_dropped(spec, problems))
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one that tells
                self._remove(created[0] if created else None, volume.name)
            raise
        self._specs[created[0]] = spec
        return created[0]

    def _attach(self, container_id: str) -> socket.socket:
        parameters = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        attached = self._client().attach_socket(container_id, parameters)
        # Nothing can be left in the buffers of the HTTP client: the container has not been started yet.
        try:
            return socket.socket(fileno=os.dup(attached.fileno()))
        finally:
            attached.close()

    def _start(self, container_id: str) -> None:
        spec = self._specs.get(container_id)
        if spec is None:
            raise EngineError(
                f"cannot start container {container_id[:12]}: it was not created here, so nothing says what "
                "it shall be; create it again"
            )
        self._client().start(container_id)
        pid = int(self._inspect(container_id)["State"]["Pid"])
        with contextlib.suppress(OSError):  # gone already; looked at below
            _wait_executed(pid)
        problems: list[str] = []
        # A process that ends while it is looked at seems to lack everything; its stream says how it ended.
        # One that is on its way out is neither alive nor over for a moment: what is missing is missing twice.
        for _ in range(LOOKS):
            problems = self._find_unenforced(spec, pid, container_id)
            if not problems or self._has_ended(container_id, pid):
                return
            time.sleep(0.02)
        self._remove(container_id, spec.workspace.name)
        raise EngineError(_dropped(spec, problems))

    # What is asked for and what is checked; the self-test's control, which must be weak, asks for less.

    def _container_options(self, client: APIClient, spec: ContainerSpec) -> dict[str, Any]:
        return _container_options(client, spec)

    def _find_refused(self, spec: ContainerSpec, inspected: dict[str, Any], *, has_swap: bool) -> list[str]:
        return verify.find_refused_settings(spec, inspected, has_swap=has_swap)

    def _find_unenforced(self, spec: ContainerSpec, pid: int, container_id: str) -> list[str]:
        return _find_unenforced(spec, pid, container_id)

    def _has_ended(self, container_id: str, pid: int) -> bool:
        """Tell whether a container is over. The engine hears of it a moment after the kernel."""
        deadline = time.monotonic() + END_SECONDS
        while self._inspect(container_id)["State"]["Running"]:
            if verify.is_process_alive(pid) or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _await_own_end(self, container_id: str) -> None:
        """Let a gVisor sandbox end by itself, as its guest does when its stream is closed.

        One that is killed drops all its threads at once on containerd's shim, which is then waiting for the
        kill it was asked for and takes them a second each: the engine hangs for minutes on that container.
        """
        from docker.errors import NotFound

        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(NotFound):
            while self._inspect(container_id)["State"]["Running"] and time.monotonic() < deadline:
                time.sleep(0.02)

    def _inspect(self, container_id: str) -> dict[str, Any]:
        """The engine's JSON, as it comes."""
        inspected: dict[str, Any] = self._client().inspect_container(container_id)
        return inspected

    def _remove(self, container_id: str | None, volume: str | None) -> None:
        client = self._client()
        if container_id is not None:
            spec = self._specs.get(container_id)
            if spec is not None and spec.runtime == "runsc":
                self._await_own_end(container_id)
            if volume is not None and os.geteuid() != 0:
                _settle_overlay(client, container_id)
            _insist(lambda: client.remove_container(container_id, v=True, force=True))
            self._specs.pop(container_id, None)
        if volume is not None:
            _insist(lambda: client.remove_volume(volume))

    def _owned(self) -> list[Owned]:
        client = self._client()
        filters = {"label": [LABEL_SESSION, LABEL_OWNER]}
        found = []
        for container in client.containers(all=True, filters=filters):
            # Containers inherit the labels of their image: on a stranger's container ours prove nothing.
            if any(name.startswith(f"/{NAME_PREFIX}") for name in container["Names"] or []):
                found.append(_owned("container", container["Id"], container["Labels"]))
        for volume in client.volumes(filters=filters)["Volumes"] or []:
            found.append(_owned("volume", volume["Name"], volume["Labels"]))
        return found

    def _read_image(
        self, image_id: str, labels: dict[str, str], consume: Callable[[Iterator[bytes]], T]
    ) -> T:
        client = self._client()
        name = f"{NAME_PREFIX}index-{os.urandom(6).hex()}"
        # An image may have no command of its own; this one is never run.
        container = client.create_container(
            image_id, ["/none"], name=name, labels=labels, network_disabled=True, use_config_proxy=False
        )["Id"]
        try:
            return consume(client.export(container))
        finally:
            self._remove(container, None)

    async def _confirm_end(self, container_id: str) -> None:
        """Return when the container has stopped: its stream ends a moment before the engine says so."""
        deadline = time.monotonic() + END_SECONDS
        while (await self.state(container_id)).is_running:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"cannot read from container {container_id[:12]}: the engine cut the stream of a running "
                    "container; start a new session"
                )
            await asyncio.sleep(0.02)


def _container_options(client: APIClient, spec: ContainerSpec) -> dict[str, Any]:
    """The arguments of the SDK's ``create_container``, whose values are of many types."""
    from docker.types import LogConfig, Mount, Ulimit

    volume = Mount(spec.workspace.target, spec.workspace.name, type="volume", no_copy=True)
    binds = [Mount(bind.target, bind.source, type="bind", read_only=bind.is_read_only) for bind in spec.binds]
    host_config = client.create_host_config(
        network_mode=spec.network,
        read_only=spec.read_only_root,
        cap_drop=[*spec.dropped_capabilities],
        cap_add=[*spec.added_capabilities],
        security_opt=verify.security_options(spec),
        runtime=spec.runtime,
        mem_limit=spec.memory_bytes,
        memswap_limit=spec.memory_bytes,
        nano_cpus=verify.nano_cpus(spec),
        pids_limit=spec.pids,
        ulimits=[Ulimit(name=name, soft=limit, hard=limit) for name, limit in verify.ulimits(spec).items()],
        tmpfs=verify.tmpfs_options(spec),
        shm_size=spec.shm_bytes,
        mounts=[volume, *binds],
        extra_hosts=dict(spec.extra_hosts),
        # Even without a network Docker copies the host's resolv.conf, which names internal resolvers.
        dns=["127.0.0.1"],
        dns_search=["."],
        ipc_mode="private",
        cgroupns="private",
        log_config=LogConfig(type="none"),
        init=False,
    )
    return {
        "image": spec.image_id,
        "command": [],
        "entrypoint": [*spec.command],
        "name": spec.name,
        "hostname": spec.hostname,
        "user": verify.first_user(spec),
        "environment": dict(spec.env),
        "working_dir": spec.working_dir,
        "labels": dict(spec.labels),
        "stdin_open": True,
        # An image's health check would run programs in the container that nobody asked for.
        "healthcheck": {"test": ["NONE"]},
        # The user's Docker configuration may name proxies, with their passwords.
        "use_config_proxy": False,
        "host_config": host_config,
    }


def _overlay_options(volume: OverlayVolume) -> dict[str, str]:
    """The local driver's options. Docker splits them at commas; kernels differ in where they unescape."""
    for path in (*volume.lower, volume.upper, volume.work):
        if found := [character for character in ",\\\n" if character in path]:
            raise EngineError(
                f"cannot mount {path!r}: mount options cannot carry {found[0]!r}; rename the directory"
            )
    lower = ":".join(path.replace(":", "\\:") for path in volume.lower)
    options = [f"lowerdir={lower}", f"upperdir={volume.upper}", f"workdir={volume.work}", *volume.flags]
    return {"type": "overlay", "device": "overlay", "o": ",".join(options)}


def _translate(attempt: str, base_url: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call; turn whatever the SDK raises into one line of ours. Any: arguments are passed on as they are."""
    try:
        return function(*arguments)
    except HostError:
        raise
    except Exception as exc:
        from docker.errors import APIError, DockerException
        from requests.exceptions import ReadTimeout, RequestException

        if isinstance(exc, APIError):
            message = f"cannot {attempt}: the engine refused: {_one_line(exc.explanation or exc)}"
            raise EngineError(message) from exc
        if isinstance(exc, ReadTimeout):
            message = (
                f"cannot {attempt}: the engine at {base_url} has not answered for {API_SECONDS}s; restart it"
            )
            raise EngineError(message) from exc
        if isinstance(exc, DockerException | RequestException | OSError):
            raise EngineError(
                f"cannot {attempt}: no engine answers at {base_url} ({_root_cause(exc)}); "
                "start Docker, or set DOCKER_HOST"
            ) from exc
        raise


def _insist(removal: Callable[[], object]) -> None:
    """Remove; what is gone is fine, and what is just being removed is waited for."""
    from docker.errors import APIError

    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            removal()
            return
        except APIError as exc:
            if exc.status_code == NOT_FOUND:
                return
            if exc.status_code != CONFLICT or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _settle_overlay(client: APIClient, container_id: str) -> None:
    """Have the workspace mounted once more after its processes are gone.

    An overlay that is cut off in mid-copy leaves a root-owned file in its work directory, which an
    ordinary controller cannot remove; the kernel does, when the overlay is mounted the next time.
    """
    from docker.errors import APIError, NotFound

    with contextlib.suppress(APIError):  # not running any more
        client.kill(container_id)
        client.wait(container_id, timeout=math.ceil(END_SECONDS))
    with contextlib.suppress(NotFound):
        client.get_archive(container_id, f"{WORKSPACE}/.agent-runner-absent")


def _find_unenforced(spec: ContainerSpec, pid: int, container_id: str) -> list[str]:
    # gVisor's process on the host is gVisor itself; what it gives its guests is asked inside, by the guest.
    find = gvisor.find_unenforced_outside if spec.runtime == "runsc" else verify.find_unenforced
    try:
        return find(spec, pid, container_id)
    except OSError as exc:
        return [f"all of them: process {pid} cannot be read ({exc.strerror}), is the engine elsewhere?"]


def _wait_executed(pid: int) -> None:
    """Wait until runc's init has become PID 1's program: the seccomp filter is its last step before that."""
    comm = Path(f"/proc/{pid}/comm")
    deadline = time.monotonic() + END_SECONDS
    while comm.read_text().startswith("runc:[") and time.monotonic() < deadline:
        time.sleep(0.001)


def _has_swap() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _owned(kind: Literal["container", "volume"], identity: str, labels: dict[str, str]) -> Owned:
    return Owned(kind, identity, labels[LABEL_SESSION], labels[LABEL_OWNER])


def _dropped(spec: ContainerSpec, problems: list[str]) -> str:
    return (
        f"cannot use container {spec.name}: the engine did not apply {'; '.join(problems)}; "
        "update the engine, or use an image and a policy it can enforce"
    )


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _root_cause(exc: BaseException) -> str:
    """The innermost reason: the SDK wraps ``connection refused`` three times."""
    while exc.__context__ is not None:
        exc = exc.__context__
    return _one_line(exc.strerror if isinstance(exc, OSError) and exc.strerror else exc)
