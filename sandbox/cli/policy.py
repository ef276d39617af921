"""``agent-runner policy``: validate policy files, and show the effective policy of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sandbox.policy.lint import Finding
    from sandbox.policy.report import PolicyReport

_path = click.argument("path", required=False, type=click.Path(path_type=Path))
_profile = click.option("--profile", help="One profile of the file; validate takes all, show 'production'.")


@click.group("policy")
def command() -> None:
    """Validate a policy, or show the effective one."""


@command.command("validate")
@_path
@_profile
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--against", type=click.Path(path_type=Path), help="Another version: show the change of reach.")
@click.pass_context
def validate(
    context: click.Context, path: Path | None, profile: str | None, output: str, against: Path | None
) -> None:
    """Check PATH (a file or a directory) and say what it grants.

    Without PATH: ./agent-policy, else ./agent-policy.yaml, else the shipped policies. Findings go to stdout.
    Exit code 0 without errors (warnings allowed), 1 with errors, 2 when a file cannot be read.

    \b
    Examples:
      agent-runner policy validate
      agent-runner policy validate agent-policy/production.yaml --against old/production.yaml
    """
    from sandbox.policy.report import policy_files, report_on
    from sandbox.resources import working_directory

    reports = [
        report
        for file in policy_files(path, working_directory())
        for report in report_on(file, profile, against)
    ]
    is_valid = not any(report.has_errors for report in reports)
    if output == "json":
        data = {"valid": is_valid, "policies": [report.as_data() for report in reports]}
        click.echo(json.dumps(data, indent=2))
    else:
        for report in reports:
            _print_report(report)
    context.exit(0 if is_valid else 1)


@command.command("show")
@_path
@_profile
@click.option("--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def show(path: Path | None, profile: str | None, output: str) -> None:
    """Print the effective policy: every default written out, and its digest.

    The YAML can be used as a policy file: loading it gives the same digest.
    """
    from sandbox.policy.documents import as_profile_map
    from sandbox.policy.load import find_policy, load_policy
    from sandbox.resources import working_directory

    loaded = load_policy(find_policy(path, profile, working_directory()), profile)
    digest = loaded.policy.digest()
    document = as_profile_map(loaded.policy)
    if output == "json":
        data: dict[str, Any] = {  # JSON
            "profile": loaded.policy.name,
            "source": str(loaded.source),
            "digest": digest.as_dict(),
            "policy": document,
        }
        click.echo(json.dumps(data, indent=2))
        return
    import yaml

    click.echo(f"# profile {loaded.policy.name} of {loaded.source}")
    click.echo(f"# digest blake3:{digest.blake3}")
    click.echo(f"#        sha256:{digest.sha256}")
    click.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)


def _print_report(report: PolicyReport) -> None:
    from sandbox.policy.reach import reach

    name = f"{report.source}" + (f" (profile {report.profile})" if report.profile else "")
    counts = {
        severity: sum(finding.severity == severity for finding in report.findings)
        for severity in ("error", "warning", "info")
    }
    summary = ", ".join(
        f"{count} {severity}{'s' if count != 1 and severity != 'info' else ''}"
        for severity, count in counts.items()
    )
    click.echo(f"{name}: {'INVALID' if report.has_errors else 'valid'} ({summary})")
    _print_findings(report)
    if report.change is not None:
        _print_lines("Change of reach", [*(f"+ {x}" for x in report.change.added),
                                         *(f"- {x}" for x in report.change.removed)] or ["none"])  # fmt: skip
    elif report.policy is not None:
        _print_lines("Reach", reach(report.policy))
    click.echo()


def _print_findings(report: PolicyReport) -> None:
    if not report.findings:
        return
    rows = [
        (_place(report, finding), finding.severity, finding.rule, finding.message)
        for finding in report.findings
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("where", "severity", "rule", "message")
        colours = {"error": "bold red", "warning": "yellow", "info": "cyan"}
        for place, severity, rule, message in rows:
            # Text, not markup: a policy's own words must not style the terminal.
            table.add_row(Text(place), Text(severity, style=colours[severity]), Text(rule), Text(message))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  " + "  ".join([*cells, row[3]]))


def _place(report: PolicyReport, finding: Finding) -> str:
    return f"{report.source.name}:{finding.line}:{finding.column}" if finding.line else report.source.name


def _print_lines(title: str, lines: list[str]) -> None:
    click.echo(f"{title}:")
    for line in lines:
        click.echo(f"  {line}")
