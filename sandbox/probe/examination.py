"""Open a session, look at what is in force in it, and take it away again: what ``doctor`` stands on. D2

What can be tried in milliseconds is tried: decoys for the deny patterns lie in the workspace, programs that
must be refused are started, and the interfaces are listed, all by ordinary commands in the container.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sandbox.container.runtime import EngineFacts
from sandbox.container.spec import TRUST_DIRECTORY
from sandbox.errors import AgentRunnerError, EngineError, GuestError
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command, CommandResult
from sandbox.policy.load import LoadedPolicy
from sandbox.policy.model import FilesystemPolicy
from sandbox.probe.doctor import Canaries, Diagnosis, Trial, diagnose
from sandbox.probe.files import VISIBLE, Decoys, file_probes
from sandbox.probe.host import read_host
from sandbox.probe.scratch import opened_scratch
from sandbox.session.opening import Engine, OpenSession
from sandbox.session.trial import FOLDER, open_trial, plan_trial

SECONDS = 20.0
REFUSED = 126
MOST_PROGRAMS = 16
"""More of the covered programs are not started; the rest is covered in the same way."""
LIST_INTERFACES = 'while read -r line; do echo "$line"; done </proc/net/dev'
LIST_PRESENT = 'for name do if [ -e "$name" ] || [ -L "$name" ]; then echo "$name"; fi; done'


class Examined(Engine, Protocol):
    """An engine that also says which versions it is made of."""

    async def versions(self) -> Mapping[str, str]:
        """Return versions of engine, containerd and runc."""
        ...


async def examine(
    loaded: LoadedPolicy,
    image: str | None,
    runtime: Examined,
    state: Path,
    environ: Mapping[str, str],
    home: Path,
) -> Diagnosis:
    """Return the state of every control for a policy here. Raises nothing that an operator can mend."""
    facts: EngineFacts | None = None
    versions: Mapping[str, str] = {}
    try:
        facts, versions = await runtime.facts(), await runtime.versions()
    except EngineError as exc:
        trial = Trial(None, 0, 0, str(exc))
    else:
        trial = await _try(loaded, image, runtime, state / FOLDER, environ, home)
    shown = trial.image or image or ""
    return diagnose(loaded.policy, shown, facts, versions, read_host(), trial)


async def _try(
    loaded: LoadedPolicy,
    image: str | None,
    runtime: Examined,
    state: Path,
    environ: Mapping[str, str],
    home: Path,
) -> Trial:
    name = image or ""
    try:
        plan = plan_trial(loaded, image, environ, home)
        name = plan.image
        decoys = _decoys(loaded.policy.filesystem)
        with opened_scratch(state, decoys) as scratch:
            async with open_trial(replace(plan, workspace=scratch.workspace), runtime, state) as opened:
                guest = await opened.guest()
                started_ms = round((time.monotonic() - opened.started_clock) * 1000)
                ready = guest.ready
                return Trial(
                    opened.spec,
                    ready.landlock_abi if ready is not None else 0,
                    started_ms,
                    warnings=tuple(opened.warnings),
                    image=name,
                    disk=opened.workspace.disk,
                    canaries=await _look(opened, guest, decoys),
                    has_trust=any(bind.target == TRUST_DIRECTORY for bind in opened.spec.binds),
                )
    except AgentRunnerError as exc:
        return Trial(None, 0, 0, "; ".join(str(exc).splitlines()), image=name)


def _decoys(filesystem: FilesystemPolicy) -> Decoys:
    """One file for each pattern that an example can be made of, and one that none hides."""
    _, decoys = file_probes(filesystem)
    return decoys


async def _look(opened: OpenSession, guest: GuestChannel, decoys: Decoys) -> Canaries:
    env = dict(opened.spec.env)

    async def lines(script: str, *arguments: str) -> list[str]:
        ended = await guest.run(
            Command((opened.shell, "-c", script, "sh", *arguments), env=env, timeout_seconds=SECONDS)
        )
        if not isinstance(ended, CommandResult) or ended.exit_code != 0:
            raise GuestError(f"cannot look into the container: {ended}; check the image's shell")
        return ended.stdout.decode("utf-8", "surrogateescape").splitlines()

    interfaces = [line.partition(":")[0].strip() for line in await lines(LIST_INTERFACES) if ":" in line]
    present = set(await lines(LIST_PRESENT, *decoys.files))
    covered = [bind.target for bind in opened.spec.binds if bind.source == opened.image.refusal_binary]
    running = []
    for path in covered[:MOST_PROGRAMS]:
        ended = await guest.run(Command((path, "--version"), env=env, timeout_seconds=SECONDS))
        if not isinstance(ended, CommandResult) or ended.exit_code != REFUSED:
            running.append(path)
    return Canaries(
        interfaces=tuple(interfaces),
        hidden=len(decoys.hidden),
        seen=tuple(sorted(present & set(decoys.hidden))),
        is_visible_seen=VISIBLE in present,
        programs=len(covered),
        tried=min(len(covered), MOST_PROGRAMS),
        running=tuple(running),
    )
