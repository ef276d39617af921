from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sandbox.container.spec import (
    BUNDLE_VARIABLES,
    EGRESS_DIRECTORY,
    GUEST,
    HOME,
    TRUST_BUNDLE,
    TRUST_DIRECTORY,
    TRUST_STORE,
    Bind,
    ContainerSpec,
    Image,
    OverlayVolume,
    SessionPlaces,
    compile_spec,
)
from sandbox.errors import PolicyError, WorkspaceError
from sandbox.policy.model import MIB, HostEntry, Limits, NetworkPolicy, Policy, ShellPolicy

IMAGE = Image("some/image", "sha256:" + "a" * 64, ("/usr/bin/rm", "/usr/bin/curl"), "/shipped/refused")
PLACES = SessionPlaces(
    "20260101-000000-abcdef",
    OverlayVolume("volume", ("/state/mask", "/home/user/project"), "/state/upper", "/state/work"),
    "/shipped/guest",
    "/state/egress",
    1000,
    1000,
    "host:boot:1:2",
)
SECCOMP = '{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}'


def compiled(policy: Policy | None = None, **changes: Any) -> ContainerSpec:
    return compile_spec(
        policy or Policy(name="p"),
        changes.pop("image", IMAGE),
        replace(PLACES, **changes),
        SECCOMP,
        hosts={"b.example": "127.77.0.2", "a.example": "127.77.0.1"},
    )


def test_the_same_arguments_give_the_same_spec() -> None:
    assert compiled() == compiled()
    assert compiled().digest() == compiled().digest()


def test_the_guest_replaces_whatever_the_image_would_run() -> None:
    assert compiled().command == (GUEST,)


@pytest.mark.parametrize("changes", [{"uid": 0}, {"gid": 0}, {"uid": -1}])
def test_root_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="never runs as root"):
        compiled(**changes)


@pytest.mark.parametrize("seccomp", ["unconfined", "", "{}", "[]", '{"defaultAction": ""}', "null"])
def test_a_profile_that_would_switch_seccomp_off_is_refused(seccomp: str) -> None:
    with pytest.raises(PolicyError, match="seccomp profile"):
        compile_spec(Policy(name="p"), IMAGE, PLACES, seccomp)


def test_every_bind_is_read_only_and_blocked_programs_are_covered() -> None:
    assert compiled().binds == (
        Bind("/shipped/guest", GUEST),
        Bind("/state/egress", EGRESS_DIRECTORY),
        Bind("/shipped/refused", "/usr/bin/curl"),
        Bind("/shipped/refused", "/usr/bin/rm"),
    )


def test_a_blocked_path_that_a_mount_of_ours_hides_needs_no_cover() -> None:
    hidden = ("/tmp/curl", "/workspace/bin/rm", f"{HOME}/rm", "/tmpfiles/rm")
    targets = [bind.target for bind in compiled(image=replace(IMAGE, blocked_paths=hidden)).binds]
    assert targets[2:] == ["/tmpfiles/rm"]


@pytest.mark.parametrize("path", ["usr/bin/rm", "/usr/../bin/rm", "/usr//bin/rm", "//usr/bin/rm", "/", ""])
def test_a_blocked_path_that_is_not_in_normal_form_is_refused(path: str) -> None:
    with pytest.raises(PolicyError, match="cannot block"):
        compiled(image=replace(IMAGE, blocked_paths=(path,)))


def test_limits_come_from_the_policy() -> None:
    limits = Limits(memory_bytes=64 * MIB, cpus=0.5, pids=9, nofile=2077, tmpfs_bytes=3 * MIB)
    spec = compiled(Policy(name="p", limits=limits))
    assert (spec.memory_bytes, spec.cpus, spec.pids, spec.nofile) == (64 * MIB, 0.5, 9, 2077)
    sizes = {mount.target: mount.size_bytes for mount in spec.tmpfs}
    assert sizes["/tmp"] == sizes[HOME] == 3 * MIB
    assert set(sizes) == {"/tmp", HOME, "/run", "/var/tmp"}


@pytest.mark.parametrize(
    ("is_allowed", "flags"), [(True, ("nosuid", "nodev")), (False, ("nosuid", "nodev", "noexec"))]
)
def test_the_workspace_is_nosuid_nodev_and_noexec_on_request(
    is_allowed: bool, flags: tuple[str, ...]
) -> None:
    policy = Policy(name="p", shell=ShellPolicy(workspace_exec=is_allowed))
    assert compiled(policy).workspace.flags == flags
    bare = replace(PLACES.workspace, flags=())
    assert compiled(policy, workspace=bare).workspace.flags == flags


def test_nothing_of_the_hosts_environment_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled().env
    for name in ("PATH", "HOME", "HTTP_PROXY", "https_proxy", "ANTHROPIC_API_KEY", "LANG"):
        monkeypatch.setenv(name, "from-the-host")
    assert compiled().env == before
    assert "from-the-host" not in str(compiled())


def test_every_proxy_variable_leads_to_the_relay() -> None:
    env = dict(compiled().env)
    names = [name for name in env if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    assert len(names) == 6
    assert {env[name] for name in names} == {"http://127.0.0.1:3128"}
    assert env["NO_PROXY"] == env["no_proxy"] == "localhost,127.0.0.1,::1"


def test_java_is_told_of_the_proxy_only_where_something_can_be_reached() -> None:
    allowing = Policy(name="p", network=NetworkPolicy(allowlist=(HostEntry(host="a.example"),)))
    indexes = Policy(name="p", network=NetworkPolicy(package_indexes=("pip",)))
    assert "JAVA_TOOL_OPTIONS" not in dict(compiled().env)
    assert "proxyPort=3128" in dict(compiled(allowing).env)["JAVA_TOOL_OPTIONS"]
    assert "JAVA_TOOL_OPTIONS" in dict(compiled(indexes).env)


def test_allowed_names_have_their_addresses() -> None:
    assert compiled().extra_hosts == (("a.example", "127.77.0.1"), ("b.example", "127.77.0.2"))


def test_labels_name_session_owner_and_the_spec_itself() -> None:
    spec = compiled()
    assert spec.label("agent-runner.session") == PLACES.session_id
    assert spec.label("agent-runner.owner") == PLACES.owner
    assert spec.label("agent-runner.spec") == f"blake3:{spec.digest().blake3}"
    assert spec.label("other") == ""


def test_any_change_of_a_control_changes_the_digest() -> None:
    spec = compiled()
    changed = [
        replace(spec, pids=spec.pids + 1),
        replace(spec, seccomp='{"defaultAction": "SCMP_ACT_ALLOW"}'),
        replace(spec, binds=spec.binds[:-1]),
        replace(spec, workspace=replace(spec.workspace, flags=())),
    ]
    assert len({one.digest().blake3 for one in (spec, *changed)}) == 5


def test_a_path_that_is_not_utf8_is_one_clear_error() -> None:
    with pytest.raises(WorkspaceError, match="not UTF-8"):
        compiled(egress_directory="/state/\udcff")


def test_the_printed_spec_names_the_profile_by_digest() -> None:
    shown = json.loads(compiled().as_json())
    assert shown["seccomp"].startswith("blake3:")
    assert (shown["network"], shown["read_only_root"], shown["dropped_capabilities"]) == (
        "none",
        True,
        ["ALL"],
    )


def test_nothing_of_trust_is_set_while_nothing_needs_it() -> None:
    spec = compiled(Policy(name="p", network=NetworkPolicy(allowlist=(HostEntry(host="a.example"),))))
    assert not set(dict(spec.env)) & set(BUNDLE_VARIABLES)
    assert "trustStore" not in dict(spec.env)["JAVA_TOOL_OPTIONS"]
    assert not [bind for bind in spec.binds if "trust" in bind.target]


def test_trust_replaces_the_images_own_roots_read_only() -> None:
    image = replace(IMAGE, bundles=("/etc/ssl/certs/x.crt",), truststores=("/opt/jdk/lib/security/cacerts",))
    hidden = replace(image, truststores=("/tmp/jdk/lib/security/cacerts",))
    assert not [bind for bind in compiled(image=hidden, trust_directory="/t").binds if "jdk" in bind.target]
    binds = compiled(image=image, trust_directory="/state/trust").binds
    for bind in (
        Bind("/state/trust", TRUST_DIRECTORY),
        Bind("/state/trust/ca-bundle.pem", "/etc/ssl/certs/x.crt"),
        Bind("/state/trust/truststore.p12", "/opt/jdk/lib/security/cacerts"),
    ):
        assert bind in binds and bind.is_read_only


def test_every_program_is_told_of_the_bundle_and_java_of_its_store() -> None:
    policy = Policy(name="p", network=NetworkPolicy(allowlist=(HostEntry(host="a.example"),)))
    env = dict(compiled(policy, trust_directory="/state/trust").env)
    assert {env[name] for name in BUNDLE_VARIABLES} == {TRUST_BUNDLE}
    assert f"-Djavax.net.ssl.trustStore={TRUST_STORE}" in env["JAVA_TOOL_OPTIONS"]


def test_the_resolver_file_is_bound_where_one_is_given() -> None:
    bound = Bind("/shipped/resolv.conf", "/etc/resolv.conf")
    assert bound in compiled(resolv_conf="/shipped/resolv.conf").binds
    assert not [bind for bind in compiled().binds if bind.target == "/etc/resolv.conf"]
