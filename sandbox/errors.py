"""Every error this project raises, branched by who can act on it.

::

    AgentRunnerError
    ├── PolicyError            the author of the policy, the action schema or the command line
    ├── HostError              the operator of this machine
    │   ├── EngineError        the container engine is absent, refused, or died
    │   ├── ImageError         the image is absent or cannot be used under this policy
    │   ├── WorkspaceError     the user's directory cannot be mounted as asked
    │   ├── StateError         the state directory cannot hold what a session needs
    │   ├── RecordError        the ledger cannot be written, read or trusted
    │   └── ModelUnavailable   a model cannot be called at all: no key, no server, no price
    ├── RunStopped             nobody: the run ended as it should, with a status
    │   ├── BudgetExhausted, ToolCallsExhausted, TimedOut, Refused,
    │   └── InvalidOutput, ModelFailed, SandboxFailed, DiskFull, Cancelled
    └── GuestError             untrusted: what came out of the container broke the protocol

A refusal inside a run is a value (``sandbox.policy.decide.Decision``), never an exception.
A message names the attempt, the obstacle and the remedy, in one line.
"""

from __future__ import annotations

from typing import ClassVar


class AgentRunnerError(Exception):
    """Root of the tree. ``str(error)`` is one line a person can act on."""


class PolicyError(AgentRunnerError):
    """The policy, the action schema or a command-line value is wrong; its author must act."""


class HostError(AgentRunnerError):
    """This machine cannot do what was asked; its operator must act."""


class EngineError(HostError):
    """The container engine is absent, refused the request, or died."""


class ImageError(HostError):
    """The image is absent, or cannot be used under this policy."""


class WorkspaceError(HostError):
    """The user's directory cannot be mounted, read or patched as asked."""


class StateError(HostError):
    """The state directory cannot hold what a session needs."""


class RecordError(HostError):
    """The ledger cannot be written, read or trusted. A run without a record does not go on."""


class ModelUnavailable(HostError):
    """A model cannot be called at all: unknown prefix, missing key, no server, no price."""


class RunStopped(AgentRunnerError):
    """The run ended before the agent said it was finished; ``status`` is the result's status."""

    status: ClassVar[str] = "sandbox_failed"


class BudgetExhausted(RunStopped):
    """The next call does not fit what is left of a limit."""

    status = "budget_exhausted"


class ToolCallsExhausted(RunStopped):
    """The agent used up its tool calls."""

    status = "tool_calls_exhausted"


class TimedOut(RunStopped):
    """The session's wall-clock limit passed."""

    status = "timed_out"


class Refused(RunStopped):
    """The model declined the task."""

    status = "refused"


class InvalidOutput(RunStopped):
    """The model's actions stayed invalid after the repair turns."""

    status = "invalid_output"


class ModelFailed(RunStopped):
    """No model gave an answer: retries and fallback are used up."""

    status = "model_failed"


class DiskFull(RunStopped):
    """The workspace quota, or the disk beneath it, is used up."""

    status = "disk_full"


class SandboxFailed(RunStopped):
    """The container, its guest, the engine or the gateway died under the run."""

    status = "sandbox_failed"


class Cancelled(RunStopped):
    """The user stopped the run."""

    status = "cancelled"


class GuestError(AgentRunnerError):
    """What came out of the container broke the protocol, or the guest is gone."""
