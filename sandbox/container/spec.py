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
SHELL_SOCKET_NAME = "shell.sock"
"""Beside the gateway's; images/guest/wrapper.c knows it too."""
PROBE = "/.agent-runner/probe"
"""The self-test's program; no run has it."""
SHELLS = "/.agent-runner/shell"
"""The image's own shells, where others that ask stand in their place."""
PROXY_PORT = 3128
TRUST_DIRECTORY = "/.agent-runner/trust"
TRUST_BUNDLE = f"{TRUST_DIRECTORY}/ca-bundle.pem"
TRUST_STORE = f"{TRUST_DIRECTORY}/truststore.p12"
RESOLV_CONF = "/etc/resolv.conf"
HOME = "/home/agent"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LABEL_SESSION = "agent-runner.session"
LABEL_OWNER = "agent-runner.owner"
LABEL_SPEC = "agent-runner.spec"

SEPARATING_CAPABILITIES = ("CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID")
"""What the guest needs of gVisor's kernel to become a user of its own and give commands another; sorted."""
SENTRY_TASKS = 256
TASKS_PER_PROCESS = 16
"""Threads of the host that gVisor needs, idle and for each process inside (11 to 13 measured): all of them
count against the cgroup's pids limit, and the sandbox ends when it is reached."""

PAGE_BYTES = 4096
SMALL_TMPFS_BYTES = 16 * MIB
SHM_BYTES = 64 * MIB
NOTHING: Mapping[str, str] = MappingProxyType({})

BUNDLE_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL and so Python and Ruby; Go; rustls where it asks the platform
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",  # Debian's git reads neither of the two above
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "npm_config_cafile",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
    "AWS_CA_BUNDLE",
    "BUNDLE_SSL_CA_CERT",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)
"""Each program's own variable for a PEM file of roots. Most replace the program's roots by the file's, so it
holds all that are trusted."""


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
    most_bytes: int = 0
    """Size of the filesystem that ``upper`` lies on, when it is there to bound it; 0: it is not."""


@dataclass(frozen=True)
class Tmpfs:
    """Writable memory, always noexec, nosuid and nodev."""

    target: str
    size_bytes: int
    files: int
    """Files and directories it holds: an empty one costs memory too."""
    is_private: bool = False
    """Mode 0700, else 1777; where the image has that directory, runc gives it the mode it has there. The
    owner is the sandbox's user in any case."""


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
    added_capabilities: tuple[str, ...] = ()
    """Under gVisor only, of its own kernel: for the guest, never for commands."""
    is_root_at_start: bool = False
    """Under gVisor only: PID 1 starts as the root of that kernel and gives it up at once; commands run as
    ``uid``. Without Landlock nothing but a user of its own keeps them from PID 1 there."""
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
    trust_directory: str | None = None
    """Holds ``ca-bundle.pem`` and ``truststore.p12``, which replace the image's roots; None: they stay."""
    resolv_conf: str | None = None
    """The resolver configuration; None: the engine's, which is this host's and names its servers."""


@dataclass(frozen=True)
class AskingShells:
    """A program that asks before it becomes a shell, and the shells whose place it takes."""

    binary: str
    """Host path of the program."""
    paths: tuple[str, ...]
    """In the image, links resolved."""
    originals: str
    """Host directory with the shells themselves, each at its path in the image."""
    original_shell: str
    """In the container: the shell that would have run command lines."""


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
    asking_shells: AskingShells | None = None
    """Given when the policy names agents."""
    bundles: tuple[str, ...] = ()
    """Files with the image's own roots, as PEM; absolute, symlinks resolved."""
    truststores: tuple[str, ...] = ()
    """The same for Java's."""
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
        _tmpfs("/tmp", policy.limits.tmpfs_bytes),  # noqa: S108  # inside the container
        _tmpfs(HOME, policy.limits.tmpfs_bytes, is_private=True),
        _tmpfs("/run", SMALL_TMPFS_BYTES),
        _tmpfs("/var/tmp", SMALL_TMPFS_BYTES),  # noqa: S108
    )
    is_gvisor = policy.runtime == "runsc"
    pids = policy.limits.pids
    separating = ("commands-as", str(places.uid), str(places.gid), str(pids)) if is_gvisor else ()
    spec = ContainerSpec(
        name=f"agent-runner-{places.session_id}",
        image_id=image.image_id,
        runtime=policy.runtime,
        uid=places.uid,
        gid=places.gid,
        command=(GUEST, *separating),
        env=tuple(sorted({**env, **_environment(policy, trusts=places.trust_directory is not None)}.items())),
        working_dir=WORKSPACE,
        workspace=replace(places.workspace, flags=flags),
        binds=_binds(image, places, tmpfs),
        tmpfs=tmpfs,
        extra_hosts=tuple(sorted(hosts.items())),
        memory_bytes=policy.limits.memory_bytes,
        cpus=policy.limits.cpus,
        pids=SENTRY_TASKS + TASKS_PER_PROCESS * pids if is_gvisor else pids,
        nofile=policy.limits.nofile,
        seccomp=seccomp,
        added_capabilities=SEPARATING_CAPABILITIES if is_gvisor else (),
        is_root_at_start=is_gvisor,
        labels=((LABEL_SESSION, places.session_id), (LABEL_OWNER, places.owner)),
    )
    return _labelled(spec)


def with_binds(spec: ContainerSpec, binds: tuple[Bind, ...]) -> ContainerSpec:
    """Return a spec with more of the host's paths in it, read-only, and its digest anew."""
    if not all(bind.is_read_only for bind in binds):
        raise PolicyError("cannot mount a path of the host writable: the workspace is the only one")
    return _labelled(replace(spec, binds=(*spec.binds, *binds)))


def _labelled(spec: ContainerSpec) -> ContainerSpec:
    labels = tuple(label for label in spec.labels if label[0] != LABEL_SPEC)
    return replace(spec, labels=(*labels, (LABEL_SPEC, f"blake3:{spec.digest().blake3}")))


def _tmpfs(target: str, size_bytes: int, *, is_private: bool = False) -> Tmpfs:
    # As many files as pages; the kernel's own default is half of the machine's memory in pages.
    return Tmpfs(target, size_bytes, size_bytes // PAGE_BYTES, is_private)


def _check_seccomp(seccomp: str) -> None:
    try:
        profile = json.loads(seccomp)
    except ValueError as exc:
        raise PolicyError(f"cannot use the seccomp profile: not JSON ({exc}); give a Docker profile") from exc
    # Docker takes an empty default action, or the word "unconfined", for "no seccomp at all".
    if not isinstance(profile, dict) or not profile.get("defaultAction"):
        raise PolicyError("cannot use the seccomp profile: no defaultAction; give a Docker profile with one")


def _binds(image: Image, places: SessionPlaces, tmpfs: tuple[Tmpfs, ...]) -> tuple[Bind, ...]:
    # What a mount of ours hides is not there to be run, or read.
    covered = (WORKSPACE, *(mount.target for mount in tmpfs))
    refusals = []
    for path in sorted(image.blocked_paths):
        if not re.match("/[^/]", path) or posixpath.normpath(path) != path:
            raise PolicyError(
                f"cannot block {path!r}: not an absolute path in normal form; index the image again"
            )
        if not _is_beneath(path, covered):
            refusals.append(Bind(image.refusal_binary, path))
    return (
        Bind(places.guest_binary, GUEST),
        # The directory, not the socket: a gateway that makes its socket anew stays reachable.
        Bind(places.egress_directory, EGRESS_DIRECTORY),
        *_shell_binds(image),
        *_name_resolution(places),
        *(bind for bind in _trust(image, places) if not _is_beneath(bind.target, covered)),
        *refusals,
    )


def _shell_binds(image: Image) -> tuple[Bind, ...]:
    shells = image.asking_shells
    if shells is None:
        return ()
    return (Bind(shells.originals, SHELLS), *(Bind(shells.binary, path) for path in shells.paths))


def _is_beneath(path: str, targets: tuple[str, ...]) -> bool:
    return any(path.startswith(f"{target}/") for target in targets)


def _name_resolution(places: SessionPlaces) -> tuple[Bind, ...]:
    return () if places.resolv_conf is None else (Bind(places.resolv_conf, RESOLV_CONF),)


def _trust(image: Image, places: SessionPlaces) -> tuple[Bind, ...]:
    """Place the roots where our variables point, and over the image's own: not every program reads those."""
    if places.trust_directory is None:
        return ()
    bundle = posixpath.join(places.trust_directory, posixpath.basename(TRUST_BUNDLE))
    store = posixpath.join(places.trust_directory, posixpath.basename(TRUST_STORE))
    return (
        Bind(places.trust_directory, TRUST_DIRECTORY),
        *(Bind(bundle, path) for path in sorted(image.bundles)),
        *(Bind(store, path) for path in sorted(image.truststores)),
    )


def _environment(policy: Policy, *, trusts: bool) -> dict[str, str]:
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
        java = [
            f"-D{scheme}.proxyHost=127.0.0.1 -D{scheme}.proxyPort={PROXY_PORT}"
            for scheme in ("http", "https")
        ]
        if trusts:
            java.append(f"-Djavax.net.ssl.trustStore={TRUST_STORE} -Djavax.net.ssl.trustStoreType=PKCS12")
        env["JAVA_TOOL_OPTIONS"] = " ".join(java)
    if trusts:
        env |= dict.fromkeys(BUNDLE_VARIABLES, TRUST_BUNDLE)
    return env
