"""An engine with a hole cut into it: what a self-test and a doctor have to notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sandbox.container.docker import DockerRuntime
from sandbox.container.spec import ContainerSpec


class Holed(DockerRuntime):
    """An engine that makes something else of what it was asked for, and is not noticed."""

    def __init__(
        self,
        change: Callable[[ContainerSpec], ContainerSpec] = lambda spec: spec,
        options: Callable[[dict[str, Any]], None] = lambda host: None,
    ) -> None:
        super().__init__()
        self._change, self._options = change, options

    async def create(self, spec: ContainerSpec) -> str:
        return await super().create(self._change(spec))

    def _container_options(self, client: Any, spec: ContainerSpec) -> dict[str, Any]:
        options = super()._container_options(client, spec)
        self._options(options["host_config"])
        return options

    def _find_refused(self, spec: ContainerSpec, inspected: dict[str, Any], *, has_swap: bool) -> list[str]:
        return []

    def _find_unenforced(self, spec: ContainerSpec, pid: int, container_id: str) -> list[str]:
        return []


def uncover(spec: ContainerSpec) -> ContainerSpec:
    return replace(spec, binds=tuple(bind for bind in spec.binds if not bind.target.endswith("/curl")))


def unmask(spec: ContainerSpec) -> ContainerSpec:
    return replace(spec, workspace=replace(spec.workspace, lower=spec.workspace.lower[1:]))
