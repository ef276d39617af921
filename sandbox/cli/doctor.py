"""``agent-runner doctor``: what is really enforced on this host."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sandbox.policy.load import LoadedPolicy
    from sandbox.probe.doctor import Diagnosis

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

    Opens a session as a run would, on a scratch workspace with decoys for the deny patterns, reads back what
    is in force, looks for the decoys, starts what is blocked, and removes it all again; no host is contacted
    and no session recorded. Known-bad versions are listed with what they mean here. To attack the session:
    selftest.

    \b
    States:
      enforced     in force, as read back or as tried
      watched      measured while a session runs, and the session ended then
      unused       there, and this policy does not ask for it
      unavailable  not in force: why, and how to get it

    \b
    Exit codes:
      0  every control that the policy asks for is in force
      2  wrong policy or options
      3  a control that the policy asks for is not in force

    \b
    Examples:
      agent-runner doctor
      agent-runner doctor --policy agent-policy.yaml --profile ci --output json
    """
    from sandbox.policy.load import find_policy, load_policy
    from sandbox.resources import working_directory

    loaded = load_policy(find_policy(policy_file, profile, working_directory()), profile)
    diagnosis = asyncio.run(_examine(loaded, image))
    if output == "json":
        click.echo(json.dumps(_as_data(diagnosis), indent=2))
    else:
        click.echo(_as_text(diagnosis))
    if not diagnosis.is_healthy:
        raise click.exceptions.Exit(EXIT_HOST)


async def _examine(loaded: LoadedPolicy, image: str | None) -> Diagnosis:
    from sandbox.container.docker import DockerRuntime
    from sandbox.probe.examination import examine
    from sandbox.resources import state_directory

    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/nonexistent")  # a user without a home has no client configuration there
    runtime = DockerRuntime()
    try:
        return await examine(loaded, image, runtime, state_directory(), os.environ, home)
    finally:
        await runtime.close()


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
