"""Run a self-test: open a session's container and a permissive one, try everything in both, judge. D2"""

from __future__ import annotations

import asyncio
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox.container.control import ControlRuntime, control_spec
from sandbox.container.image import find_image
from sandbox.container.image_index import index_image
from sandbox.container.preflight import check_host
from sandbox.container.reaper import current_owner
from sandbox.container.spec import EGRESS_DIRECTORY, Bind, ContainerSpec, Image, SessionPlaces, compile_spec
from sandbox.egress.gateway import Gateway
from sandbox.errors import AgentRunnerError, EngineError, GuestError
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.probe.conversation import Switchboard
from sandbox.probe.derive import SelftestPlan, derive
from sandbox.probe.inspection import stand_in_credentials
from sandbox.probe.judge import judge
from sandbox.probe.limits import ENDED
from sandbox.probe.model import Act, Probe, Report, Seen, Talk, Timed
from sandbox.probe.origin import Origin
from sandbox.probe.sandboxes import (
    CONTROL_SCRATCH,
    ControlSandbox,
    SessionSandbox,
    probe_bind,
    probe_command,
)
from sandbox.probe.scratch import Scratch, opened_scratch
from sandbox.session.opening import Engine, OpenSession
from sandbox.session.plan import RunPlan
from sandbox.session.trial import FOLDER, open_trial
from sandbox.session.uninterrupted import see_through

NOTES = (
    "the container is a session's own but for the probe program, mounted read-only, and a socket of the "
    "self-test beside the gateway's",
    "allowed names lead to an origin inside the self-test: verdicts are real, no host is contacted, and no "
    "other command can have that",
    "the workspace is a scratch directory with decoys for the deny patterns; yours is not touched",
)
BUNDLE = "bundle"
TALKS_AT_A_TIME = 48
FEW_PIDS = 64

Say = Callable[[str], None]


@dataclass
class _Clock:
    phases: dict[str, float]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = round(time.monotonic() - begun, 2)


async def run_selftest(
    plan: RunPlan,
    runtime: Engine,
    state: Path,
    say: Say = lambda text: None,
    *,
    gateway: Callable[..., Gateway] = Gateway,
    controls: dict[str, Seen] | None = None,
) -> Report:
    """Probe the sandbox that a plan's policy asks for and return what was found.

    ``plan.workspace`` is not used. ``gateway`` and ``controls`` are for the self-test's own tests: another
    gateway, and answers of the permissive container that are known already (or, when empty, to be filled in).
    Raises PolicyError or HostError when it cannot be run here; nothing is left behind then either.
    """
    begun, clock = time.monotonic(), _Clock({})
    own = state / FOLDER
    # Whatever the plan holds: no credential of anybody's is put to the test.
    plan = replace(plan, credentials=stand_in_credentials(plan.policy.network))
    check_host(plan.policy, await runtime.facts())
    image_id = await find_image(runtime, plan.image)
    with clock.phase("index the image"):
        index = await index_image(runtime, image_id, own, current_owner())
    selftest = derive(plan.policy, index)
    say(f"{len(selftest.probes)} probes derived from profile {plan.policy.name}")
    untried = _untried(selftest, own)
    probes = [probe for probe in selftest.probes if not probe.skip and probe.id not in untried]
    with opened_scratch(own, selftest.decoys) as scratch:
        bench = _Bench(replace(plan, workspace=scratch.workspace), runtime, own, scratch, say, clock, gateway)
        known = controls or None
        seen, control_seen = await bench.run(probes, image_id, known)
    if controls is not None and not controls:
        controls.update(control_seen)
    findings = []
    for probe in selftest.probes:
        both = seen.get(probe.id), control_seen.get(probe.id)
        findings.append(
            judge(
                probe,
                *both,
                selftest.accepted | bench.accepted,
                untried.get(probe.id, ""),
                selftest.differences.get(probe.id),
            )
        )
    return Report(
        policy=plan.policy.name,
        policy_source=str(plan.policy_source),
        policy_blake3=plan.policy.digest().blake3,
        image=plan.image,
        image_id=image_id,
        findings=tuple(findings),
        seconds=round(time.monotonic() - begun, 1),
        phases=clock.phases,
        notes=(*NOTES, *bench.notes),
    )


@dataclass
class _Bench:
    """Everything that exists while probes run."""

    plan: RunPlan
    runtime: Engine
    state: Path
    scratch: Scratch
    say: Say
    clock: _Clock
    make_gateway: Callable[..., Gateway]
    accepted: dict[str, str] = field(default_factory=dict)
    """What turned out to be weaker on this host, and why that is accepted, by probe."""
    notes: list[str] = field(default_factory=list)
    """What the session's own result would warn of."""

    @property
    def is_gvisor(self) -> bool:
        return self.plan.policy.runtime == "runsc"

    async def run(
        self, probes: list[Probe], image_id: str, known: Mapping[str, Seen] | None
    ) -> tuple[dict[str, Seen], dict[str, Seen]]:
        """Try all probes in both containers; ``known`` stands for the permissive one."""
        talks = [talk for probe in probes for talk in _talks(probe)]
        origin = Origin(frozenset(talk.host for talk in talks))
        await origin.start()
        is_memory_free = asyncio.Event()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(origin.stop)
            try:
                async with asyncio.TaskGroup() as group:
                    session = group.create_task(self._in_session(probes, origin, is_memory_free))
                    control = group.create_task(
                        self._in_control(probes, origin, image_id, talks, is_memory_free, known)
                    )
            except BaseExceptionGroup as failures:
                raise _first_known(failures) from failures
        return session.result(), control.result()

    async def _in_session(
        self, probes: list[Probe], origin: Origin, is_memory_free: asyncio.Event
    ) -> dict[str, Seen]:
        async with AsyncExitStack() as undo:
            with self.clock.phase("open the session"):
                trial = open_trial(
                    self.plan,
                    self.runtime,
                    self.state,
                    extra_binds=(probe_bind(),),
                    make_gateway=functools.partial(_lead_to, origin, self.make_gateway),
                )
                opened = await undo.enter_async_context(trial)
            switchboard = Switchboard(opened.directory.egress, origin)
            try:
                await switchboard.start()
                with self.clock.phase("start the container"):
                    guest = await opened.guest()
                self.say("the session's container runs")
                self._take_note(opened)
                sandbox = SessionSandbox(guest, dict(opened.spec.env))
                with self.clock.phase("probe side by side"):
                    await _read_bundle(sandbox, switchboard, dict(opened.spec.env))
                    seen = await self._side_by_side(probes, sandbox, switchboard)
                with self.clock.phase("probe limits"):
                    return seen | await _one_by_one(probes, sandbox, switchboard, origin)
            finally:
                is_memory_free.set()
                await switchboard.stop()
                with self.clock.phase("close the session"):
                    await undo.aclose()

    def _take_note(self, opened: OpenSession) -> None:
        self.notes += opened.warnings
        disk = opened.workspace.disk
        if disk is not None and disk.enforced_by == "watched":
            why = f"watched while a session works, not enforced: {disk.obstacle}"
            self.accepted |= dict.fromkeys(("limits-workspace-bytes", "limits-workspace-files"), why)

    async def _side_by_side(
        self, probes: list[Probe], sandbox: SessionSandbox, switchboard: Switchboard
    ) -> dict[str, Seen]:
        together = [probe for probe in probes if not probe.is_alone]
        talks = [(p.id, p.attempt) for p in together if isinstance(p.attempt, Talk)]
        acts = [(name, switchboard.expect(name, talk, is_control=False)) for name, talk in talks]
        pids = self.plan.policy.limits.pids
        batches = [sandbox.attempt(acts, max(1, min(TALKS_AT_A_TIME, pids // 4)))] if acts else []
        by_kind: dict[str, list[tuple[str, Act]]] = {}
        for probe in together:
            if isinstance(probe.attempt, Act):
                kind = "probe" if probe.attempt.name == "probe" else probe.area
                by_kind.setdefault(kind, []).append((probe.id, probe.attempt))
        batches += [sandbox.attempt(some) for some in by_kind.values()]
        # gVisor's guest runs one command at a time.
        if pids < FEW_PIDS or self.is_gvisor:
            results = [await batch for batch in batches]
        else:
            results = await asyncio.gather(*batches)
        seen: dict[str, Seen] = {}
        for result in results:
            seen |= result
        if together and not seen:
            raise EngineError(
                "cannot run the self-test's program in the container: it gave no answer; "
                "check shell.mode and the image"
            )
        return _with_talks(seen, switchboard)

    async def _in_control(
        self,
        probes: list[Probe],
        origin: Origin,
        image_id: str,
        talks: list[Talk],
        is_memory_free: asyncio.Event,
        known: Mapping[str, Seen] | None,
    ) -> dict[str, Seen]:
        if known is not None:
            return dict(known)
        denied = [replace(p, attempt=p.in_control or p.attempt) for p in probes if p.side == "deny"]
        runtime = ControlRuntime()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(runtime.close)
            egress = self.scratch.control_egress
            everything = _allow_everything(talks)
            gateway = Gateway(everything, egress / "proxy.sock", lambda event: None,
                              resolver=origin, dialer=origin, own_addresses=frozenset())  # fmt: skip
            await gateway.start()
            undo.push_async_callback(gateway.stop)
            switchboard = Switchboard(egress, origin)
            await switchboard.start()
            undo.push_async_callback(switchboard.stop)
            spec = self._control_spec(image_id)
            with self.clock.phase("start the control"):
                container = await runtime.create(spec)
                undo.push_async_callback(_remove, runtime, container, spec.workspace.name)
                sandbox = ControlSandbox(await runtime.start(container))
                undo.push_async_callback(sandbox.close)
            self.say("the permissive container runs")
            with self.clock.phase("run the controls"):
                seen = await self._controls(denied, sandbox, switchboard, is_memory_free)
        if denied and not any(one.verdict == "worked" for one in seen.values()):
            raise EngineError(
                "cannot run the self-test's controls: nothing works in the permissive container; "
                "check that the engine may add capabilities and run without seccomp"
            )
        return seen

    async def _controls(
        self,
        denied: list[Probe],
        sandbox: ControlSandbox,
        switchboard: Switchboard,
        is_memory_free: asyncio.Event,
    ) -> dict[str, Seen]:
        talks = [(p.id, p.attempt) for p in denied if isinstance(p.attempt, Talk)]
        acts = [(name, switchboard.expect(name, talk, is_control=True)) for name, talk in talks]
        seen = await sandbox.attempt(acts, TALKS_AT_A_TIME) if acts else {}
        simple = [(p.id, p.attempt, p.is_alone) for p in denied if isinstance(p.attempt, Act)]
        seen |= await sandbox.attempt([(name, act) for name, act, is_alone in simple if not is_alone])
        # The limits are met after the session's: the host may not have the memory for both at once.
        await is_memory_free.wait()
        seen |= await sandbox.attempt([(name, act) for name, act, is_alone in simple if is_alone])
        return _with_talks(seen, switchboard)

    def _control_spec(self, image_id: str) -> ContainerSpec:
        # Under runc whatever the policy's runtime: gVisor's kernel is one of the walls.
        policy, session_id = (
            self.plan.policy.model_copy(update={"runtime": "runc"}),
            self.scratch.path.name,
        )
        egress = str(self.scratch.control_egress)
        volume = self.scratch.control_volume(f"agent-runner-{session_id}-control")
        places = SessionPlaces(session_id, volume, probe_bind().source, egress, 1, 1, current_owner())
        image = Image(self.plan.image, image_id, (), "")
        spec = compile_spec(policy, image, places, '{"defaultAction": "SCMP_ACT_ALLOW"}')
        binds = (probe_bind(), Bind(egress, EGRESS_DIRECTORY, is_read_only=False))
        return control_spec(spec, volume, binds, probe_command(CONTROL_SCRATCH, is_control=True))


def _lead_to(origin: Origin, make: Callable[..., Gateway], *rest: Any, **options: Any) -> Gateway:
    """Make a gateway for which every name leads to the origin, whose certificate it trusts."""
    roots = (options.pop("upstream_roots", None) or b"") + origin.certificate_pem
    ways = {"resolver": origin, "dialer": origin, "own_addresses": frozenset[str]()}
    return make(*rest, **ways, upstream_roots=roots, **options)


async def _read_bundle(sandbox: SessionSandbox, switchboard: Switchboard, env: Mapping[str, str]) -> None:
    """Fetch the roots that clients in the container trust, as one of them would find them."""
    path = env.get("SSL_CERT_FILE")
    if path is not None:
        await sandbox.attempt([(BUNDLE, switchboard.expect_file(BUNDLE, path))])
        switchboard.bundle = await switchboard.wait_file(BUNDLE)


async def _one_by_one(
    probes: list[Probe], sandbox: SessionSandbox, switchboard: Switchboard, origin: Origin
) -> dict[str, Seen]:
    """Try what uses up what others need, each by itself; a guest that dies of one is a fault of that one."""
    seen: dict[str, Seen] = {}
    for probe in (probe for probe in probes if probe.is_alone):
        try:
            match probe.attempt:
                case Timed():
                    seen[probe.id] = await sandbox.attempt_timed(probe.id, probe.attempt)
                case Act():
                    seen |= await sandbox.attempt([(probe.id, probe.attempt)])
                case Talk():
                    seen |= await _talk_alone(probe.id, probe.attempt, sandbox, switchboard, origin)
        except GuestError as exc:
            is_refusal = ENDED in probe.refusals
            why = "_".join(str(exc).split())
            seen[probe.id] = Seen("blocked", ENDED) if is_refusal else Seen("failed", why)
    return seen


async def _talk_alone(
    name: str, talk: Talk, sandbox: SessionSandbox, switchboard: Switchboard, origin: Origin
) -> dict[str, Seen]:
    if talk.resolves_to:
        origin.answers[talk.host] = talk.resolves_to
    try:
        seen = await sandbox.attempt([(name, switchboard.expect(name, talk, is_control=False))])
    finally:
        origin.answers.pop(talk.host, None)
    return _with_talks(seen, switchboard)


async def _remove(runtime: ControlRuntime, container: str, volume: str) -> None:
    await see_through(runtime.remove(container, volume))


def _talks(probe: Probe) -> list[Talk]:
    return [one for one in (probe.attempt, probe.in_control) if isinstance(one, Talk)]


def _with_talks(seen: dict[str, Seen], switchboard: Switchboard) -> dict[str, Seen]:
    """Take the conversations' own account, where one took place: the program only carried bytes."""
    return seen | {name: talked for name, talked in switchboard.seen.items() if name in seen}


def _allow_everything(talks: list[Talk]) -> NetworkPolicy:
    """The control's policy: whatever is asked for, in any way."""
    ports: dict[str, set[int]] = {}
    for talk in talks:
        ports.setdefault(talk.host, set()).add(talk.port)
    entries = tuple(HostEntry(host=host, ports=tuple(sorted(some))) for host, some in ports.items())
    return NetworkPolicy(allowlist=entries, enforce_tls=False)


def _untried(selftest: SelftestPlan, state: Path) -> dict[str, str]:
    """Say which probes this host has no room for."""
    memory, disk = _available_memory(), shutil.disk_usage(state).free
    untried = {}
    for probe in selftest.probes:
        if probe.needs_memory_bytes > memory:
            untried[probe.id] = f"the host has {memory >> 20} MiB of memory available"
        elif probe.needs_disk_bytes > disk:
            untried[probe.id] = f"the state directory has {disk >> 20} MiB of space"
    return untried


def _available_memory() -> int:
    for text in Path("/proc/meminfo").read_text().splitlines():
        if text.startswith("MemAvailable:"):
            return int(text.split()[1]) * 1024
    return 0


def _first_known(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a person can act on; whatever else there was came of it."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [failures]
    while todo:
        one = todo.pop(0)
        todo += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        flat += [] if isinstance(one, BaseExceptionGroup) else [one]
    return next((one for one in flat if isinstance(one, AgentRunnerError)), flat[0])
