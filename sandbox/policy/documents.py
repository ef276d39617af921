"""The two shapes a policy file can have, and how each becomes a ``Policy``. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sandbox.policy.model import (
    FilesystemPolicy,
    Limits,
    NetworkPolicy,
    OutputPolicy,
    Policy,
    PolicyTest,
    PriceEntry,
    RoutingPolicy,
    Section,
    SessionPolicy,
    ShellPolicy,
    Text,
    Version,
)


class CommonSections(Section):
    """What both shapes can say in the same place."""

    routing: RoutingPolicy = RoutingPolicy()
    output: OutputPolicy = OutputPolicy()
    session: SessionPolicy = SessionPolicy()
    limits: Limits = Limits()
    runtime: Literal["runc", "runsc"] = "runc"
    seccomp: Text = "agent"
    prices: dict[Text, PriceEntry] = Field(default_factory=dict)
    tests: tuple[PolicyTest, ...] = ()


class Profile(CommonSections):
    """One entry of a profile map."""

    network: NetworkPolicy = NetworkPolicy()
    filesystem: FilesystemPolicy = FilesystemPolicy()
    shell: ShellPolicy = ShellPolicy()

    def as_policy(self, name: str, version: str, metadata: dict[str, Any]) -> Policy:
        """Return the effective policy of this profile."""
        return Policy(name=name, version=version, metadata=metadata, **dict(self))


class ProfileMap(Section):
    """``profiles: {NAME: {network, filesystem, shell, ...}}``."""

    version: Version = "2.1"
    metadata: dict[str, Any] = Field(default_factory=dict)  # free text of the author
    profiles: Annotated[dict[Text, Profile], Field(min_length=1)]


class ToolSurface(Section):
    """What the agent's tools can reach."""

    network: NetworkPolicy = NetworkPolicy()
    filesystem: FilesystemPolicy = FilesystemPolicy()
    shell: ShellPolicy = ShellPolicy()


class Document(CommonSections):
    """A full document: one policy in one file."""

    version: Version = "2.1"
    metadata: dict[str, Any] = Field(default_factory=dict)  # free text of the author
    tool_surface: ToolSurface

    def as_policy(self, name: str) -> Policy:
        """Return the effective policy of this document."""
        sections = dict(self)
        surface: ToolSurface = sections.pop("tool_surface")
        return Policy(name=name, **sections, **dict(surface))


def policy_file_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a policy file, either shape, for editors and CI."""
    from pydantic.json_schema import models_json_schema

    references, schema = models_json_schema(
        [(ProfileMap, "validation"), (Document, "validation")],
        title="agent-runner policy file",
        description="Either a map of profiles, or one full document. Unknown keys are errors.",
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "oneOf": [references[(ProfileMap, "validation")], references[(Document, "validation")]],
    }


def as_profile_map(policy: Policy) -> dict[str, Any]:
    """Write a policy as a file of one profile, every default included: loading it gives an equal policy."""
    data = policy.model_dump(mode="json", exclude_none=True)
    name = data.pop("name")
    shared = {key: data.pop(key) for key in ("version", "metadata")}
    return {**shared, "profiles": {name: data}}
