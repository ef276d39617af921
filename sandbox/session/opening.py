"""Open a session: all or nothing. Whatever fails before the first event leaves nothing behind. D1, D2, D11"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from sandbox.budget import Meter
from sandbox.container import gvisor
from sandbox.container.closed_shell import check_seccomp
from sandbox.container.image import prepare_image
from sandbox.container.image_index import ImageSource
from sandbox.container.patch.export import require_git
from sandbox.container.preflight import check_host
from sandbox.container.reaper import discard_session
from sandbox.container.runtime import ContainerState, Runtime
from sandbox.container.seccomp import SeccompProfile, load_seccomp
from sandbox.container.shells import replace_shells
from sandbox.container.spec import (
    EGRESS_SOCKET,
    GUEST,
    PROBE,
    PROXY_PORT,
    SHELL_SOCKET_NAME,
    SHELLS,
    Bind,
    ContainerSpec,
    Image,
    OverlayVolume,
    SessionPlaces,
    compile_spec,
    with_binds,
)
from sandbox.container.workspace.prepare import (
    PreparedWorkspace,
    describe_workspace,
    prepare_workspace,
    release_workspace,
)
from sandbox.container.workspace.quota import DiskQuota
from sandbox.digest import blake3_hex
from sandbox.egress.gateway import Gateway
from sandbox.egress.trust import read_host_roots, read_operator_roots, write_trust
from sandbox.errors import EngineError, GuestError, PolicyError
from sandbox.events import ContainerStarted, EgressConnection, SessionStarted
from sandbox.guest.channel import GuestChannel
from sandbox.guest.codec import RELAYS_MAX
from sandbox.guest.messages import Command, CommandResult, ExecRules, GuestConfig, Relay
from sandbox.policy.hosts import canonical_pattern, loopback_addresses
from sandbox.policy.model import Limits, Policy
from sandbox.policy.paths import DenyPatterns
from sandbox.provenance.keys import SigningKey, signing_key
from sandbox.provenance.ledger import Ledger
from sandbox.provenance.owner import current_owner
from sandbox.provenance.sessions import new_session_id
from sandbox.resources import shipped
from sandbox.session.charges import Charges
from sandbox.session.cleaning import Cleaning
from sandbox.session.egress_bytes import EgressBytes
from sandbox.session.places import SessionDirectory, create_session_directory
from sandbox.session.plan import RunPlan
from sandbox.session.recorder import Listener, Recorder
from sandbox.session.result import ResultFold
from sandbox.session.shells import ShellJudge
from sandbox.session.uninterrupted import run_in_thread

HANDSHAKE_SECONDS = 20.0
REPORT_BYTES = 1024 * 1024
LANDLOCK_ABI_WITH_SCOPES = 6
"""Linux 6.12. The guest asks for scopes from this one on."""


class Engine(Runtime, ImageSource, Protocol):
    """What a session needs of a container engine."""


@dataclass
class OpenSession:
    """Everything that exists while a session runs; ``closing`` takes it apart again."""

    plan: RunPlan
    runtime: Engine
    directory: SessionDirectory
    workspace: PreparedWorkspace
    image: Image
    spec: ContainerSpec
    seccomp_blake3: str
    key: SigningKey
    ledger: Ledger
    recorder: Recorder
    fold: ResultFold
    meter: Meter
    egress_bytes: EgressBytes
    gateway: Gateway
    container_id: str
    shell: str
    """The shell of this image that command lines are run with."""
    shells: ShellJudge | None
    """Answers the shells that ask; None when the policy names no agents."""
    started: asyncio.Task[GuestChannel]
    """The container's start; awaited by the first action, not by the first model call. D11"""
    started_clock: float
    """``time.monotonic()`` when the session opened."""
    policy_in_force: Policy
    """The plan's, or the last one that was taken over while the session ran."""
    cleaning: Cleaning
    """Clears up after dead controllers; goes on beside the session when there is much of it."""
    warnings: list[str]
    """What the reader of the result should know, one line each; the start of the container may add some."""

    async def guest(self) -> GuestChannel:
        """Wait until the container runs. Raises EngineError or GuestError when it does not."""
        return await asyncio.shield(self.started)

    def check_started(self) -> None:
        """Raise what kept the container from starting, once that is known; a run may never have used it."""
        if self.started.done() and not self.started.cancelled():
            self.started.result()

    async def state(self) -> ContainerState | None:
        """Return how the container stands, or None when the engine cannot say."""
        try:
            return await self.runtime.state(self.container_id)
        except EngineError:
            return None


async def open_session(
    plan: RunPlan,
    runtime: Engine,
    state: Path,
    listeners: tuple[Listener, ...] = (),
    *,
    extra_binds: tuple[Bind, ...] = (),
    make_gateway: Callable[..., Gateway] | None = None,
) -> OpenSession:
    """Make everything a run needs and record that it begins.

    ``extra_binds`` and ``make_gateway`` are the self-test's: its program in the container, and origins of its
    own behind the gateway. ``run_session``, by which every other command gets here, passes neither.

    The container is created and checked when this returns; it is still starting. Raises PolicyError
    or HostError, with nothing left behind.
    """
    policy, clock, meter = plan.policy, time.monotonic(), Meter(plan.limits)
    async with AsyncExitStack() as undo:
        cleaning = Cleaning(runtime, state)
        undo.push_async_callback(cleaning.stop)
        facts, _ = await asyncio.gather(runtime.facts(), cleaning.wait())
        check_host(policy, facts)
        _relays(plan)  # more names than the guest has room for are refused before anything is made
        seccomp = _seccomp(plan)
        owner = current_owner()
        image = await _find_image(plan, runtime, state, owner)
        # What the end needs is looked for before the beginning.
        require_git()
        key = signing_key(state)
        session_id = new_session_id(_now, secrets.randbelow)
        directory = create_session_directory(state, session_id, owner)
        undo.callback(discard_session, directory.path, release_workspace)
        patterns = DenyPatterns(policy.filesystem.deny_patterns)
        workspace = await run_in_thread(
            asyncio.to_thread(
                prepare_workspace, plan.workspace, patterns, directory.path, quota=_disk_quota(policy.limits)
            )
        )
        ledger = Ledger.create(directory.ledger, clock=_now)
        undo.callback(ledger.close)
        fold = ResultFold()
        recorder = Recorder(ledger, (fold, Charges(meter), *listeners))
        egress_bytes = EgressBytes(meter, recorder.record)
        gateway, extra_roots = _gateway(plan, directory, recorder.record, egress_bytes, make_gateway)
        # The authority that the container trusts is the gateway's own: it is made before the container is.
        trust = _trust_directory(directory, gateway, extra_roots)
        if trust is not None:
            write_trust(trust, gateway.authority_pem, read_host_roots() + extra_roots)
        spec = compile_spec(
            policy,
            image,
            _places(directory, workspace.volume, workspace.uid, workspace.gid, owner, trust),
            seccomp.text,
            hosts=_hosts(plan),
            env=plan.index_env,
        )
        if extra_binds:
            spec = with_binds(spec, extra_binds)
        await gateway.start()
        undo.push_async_callback(gateway.stop)
        shells = await _start_shells(policy, directory, recorder)
        if shells is not None:
            undo.push_async_callback(shells.stop)
        container_id = await runtime.create(spec)
        undo.push_async_callback(runtime.remove, container_id, spec.workspace.name)
        # The survey of the tree went on beside the engine's work; nothing may run before it is done.
        await run_in_thread(asyncio.to_thread(workspace.wait_base_tree))
        recorder.record(_started(plan, directory, workspace, image, spec, seccomp.digest.blake3))
        undo.pop_all()
    warnings = [*workspace.warnings, *(image.closed.warnings if image.closed else ())]
    return OpenSession(
        plan=plan,
        runtime=runtime,
        directory=directory,
        workspace=workspace,
        image=image,
        spec=spec,
        seccomp_blake3=seccomp.digest.blake3,
        key=key,
        ledger=ledger,
        recorder=recorder,
        fold=fold,
        meter=meter,
        egress_bytes=egress_bytes,
        gateway=gateway,
        container_id=container_id,
        shell=image.shell,
        shells=shells,
        started=asyncio.create_task(
            _start(plan, runtime, image, spec, container_id, recorder, clock, warnings)
        ),
        started_clock=clock,
        policy_in_force=policy,
        cleaning=cleaning,
        warnings=warnings,
    )


async def describe_container(plan: RunPlan, runtime: Engine, state: Path) -> str:
    """Return the container spec that a run would ask for, as JSON; nothing is created but the image's index.

    Session id and places are shown as ``SESSION``.
    """
    check_host(plan.policy, await runtime.facts())
    _relays(plan)
    seccomp = _seccomp(plan)
    image = await _find_image(plan, runtime, state, current_owner())
    directory = SessionDirectory(state / "sessions" / "SESSION")
    gateway, extra_roots = _gateway(plan, directory, lambda event: None)
    trust = _trust_directory(directory, gateway, extra_roots)
    workspace = describe_workspace(plan.workspace, directory.path, _disk_quota(plan.policy.limits))
    places = _places(directory, *workspace, "OWNER", trust)
    return compile_spec(
        plan.policy, image, places, seccomp.text, hosts=_hosts(plan), env=plan.index_env
    ).as_json()


async def _look_inside(spec: ContainerSpec, channel: GuestChannel) -> list[str]:
    """Check what is in force inside gVisor, by its first command; return warnings for the result.

    Raises EngineError when a control is not in force, before anything else has run.
    """
    report = await channel.run(
        Command(gvisor.REPORT_COMMAND, timeout_seconds=HANDSHAKE_SECONDS, max_output_bytes=REPORT_BYTES)
    )
    if not isinstance(report, CommandResult) or report.exit_code != 0:
        problems = [f"what is in force cannot be told: {report}"]
    else:
        problems = gvisor.find_unenforced_inside(spec, report.stdout)
    if problems:
        raise EngineError(
            f"cannot use container {spec.name}: not in force inside gVisor: {'; '.join(problems)}; "
            "update runsc, or use runtime: runc"
        )
    return gvisor.warnings(report.stdout) if isinstance(report, CommandResult) else []


def _seccomp(plan: RunPlan) -> SeccompProfile:
    """The profile as the engine is given it: what is recorded is what is in force."""
    profile = load_seccomp(plan.policy.seccomp, plan.policy_source)
    if plan.policy.shell.mode == "closed":
        check_seccomp(profile.name, profile.text)
    return gvisor.seccomp_for_gvisor(profile) if plan.policy.runtime == "runsc" else profile


def _now() -> datetime:
    return datetime.now(UTC)


async def _find_image(plan: RunPlan, runtime: Engine, state: Path, owner: str) -> Image:
    shell = plan.policy.shell
    image = await prepare_image(
        runtime,
        runtime,
        plan.image,
        plan.policy.shell,
        refusal_binary=str(shipped("images/guest/build/refused")),
        state=state,
        owner=owner,
    )
    if not shell.agents:
        return image
    return await replace_shells(runtime, image, str(shipped("images/guest/build/wrapper")), state, owner)


async def _start_shells(policy: Policy, directory: SessionDirectory, recorder: Recorder) -> ShellJudge | None:
    if not policy.shell.agents:
        return None
    shells = ShellJudge(policy.shell, directory.egress / SHELL_SOCKET_NAME, recorder.record)
    await shells.start()
    return shells


def _disk_quota(limits: Limits) -> DiskQuota:
    return DiskQuota(limits.workspace_bytes, limits.workspace_files, limits.workspace_quota)


def _places(
    directory: SessionDirectory,
    workspace: OverlayVolume,
    uid: int,
    gid: int,
    owner: str,
    trust: Path | None,
) -> SessionPlaces:
    return SessionPlaces(
        session_id=directory.session_id,
        workspace=workspace,
        guest_binary=str(shipped("images/guest/build/guest")),
        egress_directory=str(directory.egress),
        uid=uid,
        gid=gid,
        owner=owner,
        trust_directory=None if trust is None else str(trust),
        resolv_conf=str(shipped("images/resolv.conf")),
    )


def _gateway(
    plan: RunPlan,
    directory: SessionDirectory,
    record: Callable[[EgressConnection], None],
    budget: EgressBytes | None = None,
    make: Callable[..., Gateway] | None = None,
) -> tuple[Gateway, bytes]:
    """Return the session's gateway, not started yet, and the operator's roots, which it trusts as well."""
    extra_roots = b"" if plan.extra_roots is None else read_operator_roots(plan.extra_roots)
    gateway = (make or Gateway)(
        plan.policy.network,
        directory.egress_socket,
        record,
        budget=budget,
        credentials=plan.credentials,
        upstream_roots=extra_roots or None,
        session_seconds=plan.policy.limits.wall_seconds,
    )
    return gateway, extra_roots


def _trust_directory(directory: SessionDirectory, gateway: Gateway, extra_roots: bytes) -> Path | None:
    """Return where the session's roots are kept; None when the image's own are all that is needed."""
    return directory.trust if gateway.authority_pem is not None or extra_roots else None


def _hosts(plan: RunPlan) -> dict[str, str]:
    return loopback_addresses(plan.policy.network)


def _relays(plan: RunPlan) -> tuple[Relay, ...]:
    """The proxy port, and for each exact allowed name its own address with its ports. D5"""
    addresses = _hosts(plan)
    # A name may be spelt in several ways, and listed more than once; nobody can listen twice at one place.
    direct = dict.fromkeys(
        (name, port)
        for entry in plan.policy.network.allowlist
        if (name := canonical_pattern(entry.host)) in addresses
        for port in entry.ports
    )
    relays = (
        Relay("127.0.0.1", PROXY_PORT, None),
        *(Relay(addresses[name], port, f"{name}:{port}") for name, port in direct),
    )
    if len(relays) > RELAYS_MAX:
        raise PolicyError(
            f"cannot relay {len(relays)} names and ports of network.allowlist: {RELAYS_MAX} are possible; "
            "allow some of them by a wildcard, which the proxy serves without a port of its own"
        )
    return relays


def _exec_rules(image: Image, spec: ContainerSpec) -> ExecRules | None:
    closed = image.closed
    if closed is None:
        return None
    # A shell that asks becomes the image's own, which lies elsewhere then; the self-test mounts its program.
    asking = image.asking_shells.paths if image.asking_shells is not None else ()
    moved = [SHELLS + path for path in asking if path in closed.executable]
    programs = [bind.target for bind in spec.binds if bind.target == PROBE]
    # What we mount for commands to read is in no image; the rest of our binds lie over paths that are judged.
    ours = [bind.target for bind in spec.binds if bind.target.startswith("/.agent-runner/")]
    # Not the shells that asking ones stand in for: the dynamic loader runs what it can read, listed or not.
    readable = {*closed.readable, *ours} - {GUEST, SHELLS}
    return ExecRules(
        tuple(sorted({*closed.executable, *moved, *programs})), tuple(sorted(readable)), closed.writable
    )


def _started(
    plan: RunPlan,
    directory: SessionDirectory,
    workspace: PreparedWorkspace,
    image: Image,
    spec: ContainerSpec,
    seccomp_blake3: str,
) -> SessionStarted:
    return SessionStarted(
        session_id=directory.session_id,
        task=plan.task,
        task_blake3=blake3_hex(plan.task.encode()),
        profile=plan.policy.name,
        policy_blake3=plan.policy.digest().blake3,
        spec_blake3=spec.digest().blake3,
        image=image.reference,
        image_id=image.image_id,
        seccomp_blake3=seccomp_blake3,
        base_tree_blake3=workspace.base_tree_blake3,
        workspace=os.fsencode(plan.workspace).decode("utf-8", "replace"),
        model=plan.model,
        fallback_model=plan.fallback_model,
        limits=plan.limits,
    )


async def _start(
    plan: RunPlan,
    runtime: Runtime,
    image: Image,
    spec: ContainerSpec,
    container_id: str,
    recorder: Recorder,
    clock: float,
    warnings: list[str],
) -> GuestChannel:
    stream = await runtime.start(container_id)
    channel = GuestChannel(stream)
    # gVisor has no user notification. Where it is asked for, a guest that cannot have it refuses to start.
    observe_execs = plan.policy.runtime == "runc"
    try:
        config = GuestConfig(
            egress_socket=EGRESS_SOCKET,
            relays=_relays(plan),
            exec_rules=_exec_rules(image, spec),
            observe_execs=observe_execs,
        )
        ready = await channel.open(config, HANDSHAKE_SECONDS)
    except GuestError as exc:
        await channel.close()
        raise GuestError(f"the container started but its guest did not answer: {exc}") from exc
    # Said before any command runs: what the guest claims later, hostile code may have a hand in.
    if plan.policy.runtime == "runc" and ready.landlock_abi < LANDLOCK_ABI_WITH_SCOPES:
        warnings.append(
            f"Landlock: ABI {ready.landlock_abi} in the container, {LANDLOCK_ABI_WITH_SCOPES} is needed to "
            "keep a command's signals to itself; one that kills its keeper loses its output, and PID 1 kills "
            "what is left of it"
        )
    if plan.policy.runtime == "runsc":
        try:
            warnings += await _look_inside(spec, channel)
        except BaseException:
            await channel.close()
            raise
    recorder.record(
        ContainerStarted(
            container_id=container_id,
            runtime=plan.policy.runtime,
            guest_version=ready.version,
            started_ms=round((time.monotonic() - clock) * 1000),
        )
    )
    return channel
