"""Compile a policy into everything the container will be. Pure and printable; nothing is created here. D2"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from sandbox.digest import Digest, digest_json
from sandbox.errors import PolicyError, WorkspaceError
from sandbox.policy.model import MIB, Policy

WORKSPACE = "/workspace"
GUEST = "/.agent-runner/guest"
EGRESS_DIRECTORY = "/.agent-runner/egress"
EGRESS_SOCKET = f"{EGRESS_DIRECTORY}/proxy.sock"
PROXY_PORT = 3128
HOME = "/home/agent"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LABEL_SESSION = "agent-runner.session"
LABEL_OWNER = "agent-runner.owner"
LABEL_SPEC = "agent-runner.spec"

SMALL_TMPFS_BYTES = 16 * MIB
SHM_BYTES = 64 * MIB
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Bind:
    """A host path that appears in the container."""

    source: str
    target: str
    is_read_only: bool = True


@dataclass(frozen=True)
class OverlayVolume:
    """The workspace: mask layer over the user's directory, with this session's upper layer. D4"""

    name: str
    """Docker volume name; unique to the session."""
    lower: tuple[str, ...]
    """Topmost first: the mask, then the user's directory (or its id-mapped view). Plain paths: the
    runtime's adapter escapes what overlayfs needs escaped."""
    upper: str
    work: str
    target: str = WORKSPACE
    flags: tuple[str, ...] = ("nosuid", "nodev")
    """Mount flags; ``noexec`` is added when the policy says ``workspace_exec: false``."""


@dataclass(frozen=True)
class Tmpfs:
    """Writable memory, always noexec, nosuid and nodev."""

    target: str
    size_bytes: int
    is_private: bool = False
    """True: owned by the sandbox's user, mode 0700. False: anybody's, mode 1777."""


@dataclass(frozen=True)
class ContainerSpec:
    """All that the engine is asked for. Two equal specs give the same container."""

    name: str
    image_id: str
    runtime: str
    uid: int
    gid: int
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    working_dir: str
    workspace: OverlayVolume
    binds: tuple[Bind, ...]
    tmpfs: tuple[Tmpfs, ...]
    extra_hosts: tuple[tuple[str, str], ...]
    """Name to loopback address, for exact allowlisted names. D5"""
    memory_bytes: int
    cpus: float
    pids: int
    nofile: int
    seccomp: str
    """The profile's JSON text, as given to the engine."""
    labels: tuple[tuple[str, str], ...]
    hostname: str = "sandbox"
    shm_bytes: int = SHM_BYTES
    # What no policy can change is spelt out all the same: it is printed, digested and verified with the rest.
    network: Literal["none"] = "none"
    read_only_root: Literal[True] = True
    dropped_capabilities: tuple[Literal["ALL"]] = ("ALL",)
    no_new_privileges: Literal[True] = True

    def digest(self) -> Digest:
        """Digest the spec without its own digest label; names and host paths of the session are included.

        Raises WorkspaceError when a path in it is not UTF-8.
        """
        labels = tuple(label for label in self.labels if label[0] != LABEL_SPEC)
        try:
            return digest_json(asdict(replace(self, labels=labels)))
        except ValueError as exc:
            raise WorkspaceError(
                f"cannot describe container {self.name}: a host path is not UTF-8 ({exc}); rename it"
            ) from exc

    def label(self, name: str) -> str:
        """Return a label's value; empty when it is missing."""
        return dict(self.labels).get(name, "")

    def as_json(self) -> str:
        """Print the spec for ``--dry-run``; the seccomp profile by digest, not in full."""
        shown = asdict(self) | {"seccomp": "blake3:" + digest_json(json.loads(self.seccomp)).blake3}
        return json.dumps(shown, indent=2, sort_keys=True)


@dataclass(frozen=True)
class SessionPlaces:
    """Where one session lives on the host, and as whom it runs. Made by ``workspace`` and ``session``."""

    session_id: str
    workspace: OverlayVolume
    guest_binary: str
    egress_directory: str
    uid: int
    gid: int
    owner: str
    """``hostname:boot-id:pid:start-time`` of the controller, for the reaper."""


@dataclass(frozen=True)
class ClosedShell:
    """``shell.mode: closed`` for one image: absolute paths, links resolved, sorted."""

    executable: tuple[str, ...]
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    warnings: tuple[str, ...]
    """One line each, for the result."""
    links: Mapping[str, str] = field(repr=False)
    """The image's symbolic links, so that a path can be judged as it was called."""


@dataclass(frozen=True)
class Image:
    """An image that is present, and where it keeps the programs that the policy blocks."""

    reference: str
    image_id: str
    blocked_paths: tuple[str, ...]
    """Absolute, symlinks resolved: each is covered by the refusal program."""
    refusal_binary: str
    """Host path of the program that says why and exits 126."""
    shell: str = "/bin/sh"
    """What runs command lines: bash where the image has it, since the policy reads them as bash does."""
    closed: ClosedShell | None = None
    """None: ``shell.mode: open``."""


def compile_spec(
    policy: Policy,
    image: Image,
    places: SessionPlaces,
    seccomp: str,
    *,
    hosts: Mapping[str, str] = NOTHING,
    env: Mapping[str, str] = NOTHING,
) -> ContainerSpec:
    """Turn a policy into the container it asks for. Pure: the same arguments give the same spec.

    ``seccomp`` is the profile's JSON text; ``hosts`` maps each exact allowed name to its loopback address;
    ``env`` is added to the environment, never in place of a variable of ours.
    Raises PolicyError for root as the user and for a profile that would switch seccomp off.
    """
    if places.uid < 1 or places.gid < 1:
        raise PolicyError(
            f"cannot run as uid {places.uid}, gid {places.gid}: the sandbox never runs as root; "
            "give a user and a group above 0"
        )
    _check_seccomp(seccomp)

    flags = places.workspace.flags
    for needed in ("nosuid", "nodev") if policy.shell.workspace_exec else ("nosuid", "nodev", "noexec"):
        if needed not in flags:
            flags = (*flags, needed)

    tmpfs = (
        Tmpfs("/tmp", policy.limits.tmpfs_bytes),  # noqa: S108  # inside the container
        Tmpfs(HOME, policy.limits.tmpfs_bytes, is_private=True),
        Tmpfs("/run", SMALL_TMPFS_BYTES),
        Tmpfs("/var/tmp", SMALL_TMPFS_BYTES),  # noqa: S108
    )
    spec = ContainerSpec(
        name=f"agent-runner-{places.session_id}",
        image_id=image.image_id,
        runtime=policy.runtime,
        uid=places.uid,
        gid=places.gid,
        command=(GUEST,),
        env=tuple(sorted({**env, **_environment(policy)}.items())),
        working_dir=WORKSPACE,
        workspace=replace(places.workspace, flags=flags),
        binds=_binds(image, places, tmpfs),
        tmpfs=tmpfs,
        extra_hosts=tuple(sorted(hosts.items())),
        memory_bytes=policy.limits.memory_bytes,
        cpus=policy.limits.cpus,
        pids=policy.limits.pids,
        nofile=policy.limits.nofile,
        seccomp=seccomp,
        labels=((LABEL_SESSION, places.session_id), (LABEL_OWNER, places.owner)),
    )
    return replace(spec, labels=(*spec.labels, (LABEL_SPEC, f"blake3:{spec.digest().blake3}")))


def _check_seccomp(seccomp: str) -> None:
    try:
        profile = json.loads(seccomp)
    except ValueError as exc:
        raise PolicyError(f"cannot use the seccomp profile: not JSON ({exc}); give a Docker profile") from exc
    # Docker takes an empty default action, or the word "unconfined", for "no seccomp at all".
    if not isinstance(profile, dict) or not profile.get("defaultAction"):
        raise PolicyError("cannot use the seccomp profile: no defaultAction; give a Docker profile with one")


def _binds(image: Image, places: SessionPlaces, tmpfs: tuple[Tmpfs, ...]) -> tuple[Bind, ...]:
    covered = (WORKSPACE, *(mount.target for mount in tmpfs))
    refusals = []
    for path in sorted(image.blocked_paths):
        if not re.match("/[^/]", path) or posixpath.normpath(path) != path:
            raise PolicyError(
                f"cannot block {path!r}: not an absolute path in normal form; index the image again"
            )
        # What a mount of ours hides is not there to be run.
        if not any(path.startswith(f"{target}/") for target in covered):
            refusals.append(Bind(image.refusal_binary, path))
    return (
        Bind(places.guest_binary, GUEST),
        # The directory, not the socket: a gateway that makes its socket anew stays reachable.
        Bind(places.egress_directory, EGRESS_DIRECTORY),
        *refusals,
    )


def _environment(policy: Policy) -> dict[str, str]:
    """Everything a process sees from the start; no value of the host's environment is ever among it."""
    proxy = f"http://127.0.0.1:{PROXY_PORT}"
    local = "localhost,127.0.0.1,::1"
    env = {
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "PATH": PATH,
        "TERM": "dumb",
        "NODE_USE_ENV_PROXY": "1",
        "NO_PROXY": local,
        "no_proxy": local,
    }
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        env[name] = env[name.lower()] = proxy
    if policy.network.allowlist or policy.network.package_indexes:
        # Java announces this variable on stderr, so it is set only where it can be of use.
        env["JAVA_TOOL_OPTIONS"] = " ".join(
            f"-D{scheme}.proxyHost=127.0.0.1 -D{scheme}.proxyPort={PROXY_PORT}"
            for scheme in ("http", "https")
        )
    return env
