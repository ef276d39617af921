"""``agent-runner doctor``: what is really enforced on this host."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sandbox.container.docker import DockerRuntime
    from sandbox.policy.load import LoadedPolicy
    from sandbox.probe.doctor import Diagnosis, Trial

EXIT_HOST = 3


@click.command("doctor")
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), help="Policy file, as for run.")
@click.option("--profile", default=None, help="Profile of the policy.  [default: production]")
@click.option(
    "--image", default=None, help="Image to open a session in.  [default: agent-runner/base:latest]"
)
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(policy_file: Path | None, profile: str | None, image: str | None, output: str) -> None:
    """State what is really enforced on this host, engine, runtime and image, control by control.

    Opens a session as a run would, on an empty workspace, reads back what is in force, and removes it
    again. Known-bad versions are listed with what they mean here. To attack the session: selftest.

    Exit code 0: every control that the policy asks for is in force. 3: one is not.

    \b
    Examples:
      agent-runner doctor
      agent-runner doctor --policy agent-policy.yaml --profile ci --output json
    """
    from sandbox.policy.load import find_policy, load_policy
    from sandbox.resources import working_directory
    from sandbox.session.plan import DEFAULT_IMAGE

    loaded = load_policy(find_policy(policy_file, profile, working_directory()), profile)
    diagnosis = asyncio.run(_examine(loaded, DEFAULT_IMAGE if image is None else image))
    if output == "json":
        click.echo(json.dumps(_as_data(diagnosis), indent=2))
    else:
        click.echo(_as_text(diagnosis))
    if not diagnosis.is_healthy:
        raise click.exceptions.Exit(EXIT_HOST)


async def _examine(loaded: LoadedPolicy, image: str) -> Diagnosis:
    from sandbox.container.docker import DockerRuntime
    from sandbox.errors import EngineError
    from sandbox.probe.doctor import Trial, diagnose
    from sandbox.probe.host import read_host

    runtime = DockerRuntime()
    try:
        try:
            facts, versions = await runtime.facts(), await runtime.versions()
        except EngineError as exc:
            return diagnose(loaded.policy, image, None, {}, read_host(), Trial(None, 0, 0, str(exc)))
        return diagnose(
            loaded.policy, image, facts, versions, read_host(), await _try(loaded, image, runtime)
        )
    finally:
        await runtime.close()


async def _try(loaded: LoadedPolicy, image: str, runtime: DockerRuntime) -> Trial:
    from sandbox.errors import AgentRunnerError
    from sandbox.probe.doctor import Trial
    from sandbox.resources import state_directory
    from sandbox.session.trial import open_trial

    try:
        async with open_trial(loaded, image, runtime, state_directory(), os.environ, Path.home()) as opened:
            started_ms = round((time.monotonic() - opened.started_clock) * 1000)
            ready = (await opened.guest()).ready
            abi = ready.landlock_abi if ready is not None else 0
            return Trial(opened.spec, abi, started_ms, warnings=tuple(opened.warnings))
    except AgentRunnerError as exc:
        return Trial(None, 0, 0, str(exc))


def _as_data(diagnosis: Diagnosis) -> dict[str, object]:
    return asdict(diagnosis) | {"healthy": diagnosis.is_healthy}


def _as_text(diagnosis: Diagnosis) -> str:
    from sandbox.cli.display import printable, table

    host = diagnosis.host
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items()) or "no engine"
    lines = [
        f"profile  {printable(diagnosis.profile)}, runtime {diagnosis.runtime}, "
        f"image {printable(diagnosis.image)}",
        f"kernel   {host.kernel} {host.machine}, cgroups {host.cgroups}, Landlock ABI {host.landlock_abi}",
        f"engine   {printable(versions)}",
        "",
        table(
            ("control", "state", "how"),
            [(control.name, control.state, printable(control.detail)) for control in diagnosis.controls],
        ),
        "",
    ]
    if diagnosis.flaws:
        rows = [
            (
                f"{flaw.component} {flaw.version}",
                flaw.advisory.id,
                "mended by the distribution"
                if flaw.is_mended
                else f"fixed in {', '.join(flaw.advisory.fixed)}",
                flaw.advisory.bearing,
            )
            for flaw in diagnosis.flaws
        ]
        lines += [table(("known-bad version", "advisory", "state", "for a session"), rows), ""]
    lines += [f"note: {printable(note)}" for note in diagnosis.notes]
    missing = [
        control.name
        for control in diagnosis.controls
        if control.is_required and control.state == "unavailable"
    ]
    lines.append(
        f"NOT everything that the policy asks for is in force: {', '.join(missing)}"
        if missing
        else "everything that the policy asks for is in force; `agent-runner selftest` attacks it"
    )
    return "\n".join(lines)
