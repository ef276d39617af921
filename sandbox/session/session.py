"""One session from nothing to a sealed record. The only module that knows every part.

Opening is all or nothing: whatever fails before the first event leaves nothing behind. From then on
the session always ends in a result, whatever happens: the container goes, the patch is saved, the
ledger is closed, the statement is sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sandbox.budget import Meter
from sandbox.container.image import prepare_image
from sandbox.container.preflight import check_host
from sandbox.container.reaper import current_owner, reap
from sandbox.container.runtime import Runtime
from sandbox.container.seccomp import SeccompProfile, load_seccomp
from sandbox.container.spec import EGRESS_SOCKET, PROXY_PORT, ContainerSpec, Image, SessionPlaces, compile_spec
from sandbox.container.workspace import PreparedWorkspace, prepare_workspace, release_workspace
from sandbox.digest import blake3_hex
from sandbox.egress.gateway import Gateway
from sandbox.errors import AgentRunnerError, Cancelled, GuestError, RunStopped, SandboxFailed, TimedOut
from sandbox.events import ContainerStarted, PatchExported, SessionEnded, SessionStarted
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import GuestConfig, Relay
from sandbox.policy.hosts import loopback_addresses
from sandbox.policy.paths import DenyPatterns
from sandbox.provenance.ledger import Ledger
from sandbox.resources import shipped
from sandbox.session.broker import Broker
from sandbox.session.confirm import Confirmer
from sandbox.session.effects import Shell
from sandbox.session.places import SessionDirectory, create_session_directory
from sandbox.session.plan import RunPlan
from sandbox.session.recorder import Listener, Recorder
from sandbox.session.result import ResultFold, RunResult

Work = Callable[["Session"], Awaitable[str]]
"""What a session is opened for; returns the agent's closing words or raises RunStopped."""


@dataclass
class Session:
    """What the work may use."""

    id: str
    plan: RunPlan
    broker: Broker
    recorder: Recorder
    meter: Meter
