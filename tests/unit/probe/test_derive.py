"""What a policy is tried for: both sides of each of its lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sandbox.policy.load import load_policy
from sandbox.policy.paths import DenyPatterns
from sandbox.probe.derive import derive
from sandbox.probe.files import file_probes
from sandbox.probe.inspection import STAND_IN, stand_in_credentials
from sandbox.probe.model import AREAS, Act, Probe, Talk
from sandbox.probe.network import covers, network_probes
from sandbox.probe.shell import shell_probes
from sandbox.resources import shipped
from tests.unit.probe.policies import image, policy

PATTERNS = [
    *("**/.env*", "**/secrets/**", "*.pem", "/build/", "conf/[ab]?.key", "a b/c", "**/id_[[:alpha:]]*"),
    *("\\*star", "deep/**/x", "dir/", "**/node_modules/**", "[!a-z]x"),
]


def network(*allowlist: object, **options: object) -> dict[str, Probe]:
    section = policy(network={"allowlist": [*allowlist], **options}).network
    return {probe.id: probe for probe in network_probes(section, stand_in_credentials(section))}


def hosts(probes: dict[str, Probe], side: str) -> set[str]:
    return {p.attempt.host for p in probes.values() if p.side == side and isinstance(p.attempt, Talk)}


def test_the_shipped_policy_is_tried_in_every_area() -> None:
    loaded = load_policy(shipped("policy/production.yaml"), "production")
    plan = derive(loaded.policy, image("rm"))
    assert {probe.area for probe in plan.probes} == set(AREAS)
    assert len({probe.id for probe in plan.probes}) == len(plan.probes)
    assert {probe.id for probe in plan.probes} >= plan.accepted.keys()


def test_equal_policies_give_equal_probes() -> None:
    asked = {"network": {"allowlist": ["a.test"]}, "shell": {"blocked_commands": ["curl"]}}
    assert derive(policy(**asked), image()) == derive(policy(**asked), image())


def test_an_exact_name_has_its_family_as_neighbours() -> None:
    probes = network("docs.internal.net")
    assert hosts(probes, "allow") == {"docs.internal.net"}
    assert {
        "internal.net",
        "selftest-sibling.internal.net",
        "selftest-child.docs.internal.net",
        "docs.internal.netx",
        "selftestdocs.internal.net",
    } <= hosts(probes, "deny")
    direct = probes["net-allow-1-direct"].attempt
    assert isinstance(direct, Talk) and direct.way == "direct"


def test_a_one_label_wildcard_has_two_labels_and_its_apex_as_neighbours() -> None:
    probes = network("*.packages.test")
    assert hosts(probes, "allow") == {"selftest.packages.test"}
    assert {"a.b.packages.test", "packages.test"} <= hosts(probes, "deny")
    assert "net-allow-1-direct" not in probes


def test_a_deep_wildcard_takes_two_labels_and_not_its_apex() -> None:
    probes = network("**.packages.test")
    assert hosts(probes, "allow") == {"selftest.selftest.packages.test"}
    assert "a.b.packages.test" not in hosts(probes, "deny")
    assert "packages.test" in hosts(probes, "deny")


def test_a_neighbour_that_another_entry_allows_is_not_expected_to_fail() -> None:
    assert "internal.net" in hosts(network("docs.internal.net"), "deny")
    probes = network("docs.internal.net", "internal.net")
    assert "net-allow-1-parent" not in probes


def test_another_port_is_one_that_no_entry_lists() -> None:
    ports = network({"host": "a.test", "ports": [443, 8443]}, {"host": "*.test", "ports": [8444]})
    other = ports["net-allow-1-port"].attempt
    assert isinstance(other, Talk) and other.port == 8445


def test_a_denied_name_is_tried_even_where_the_allowlist_has_it() -> None:
    probes = network("*.a.test", denylist=["selftest.a.test"])
    assert probes["net-allow-1"].skip
    denied = probes["net-deny-1"].attempt
    assert isinstance(denied, Talk) and denied.host == "selftest.a.test"


def test_tls_is_tried_only_where_it_is_enforced() -> None:
    assert "net-allow-1-sni" in network("a.test")
    assert "net-allow-1-sni" not in network("a.test", enforce_tls=False)


def test_an_empty_allowlist_is_tried_with_strangers() -> None:
    assert {"selftest.example.org", "169.254.169.254", "203.0.113.10"} <= hosts(network(), "deny")
    assert hosts(network(), "allow") == set()


def test_rules_are_tried_with_another_method_and_another_path() -> None:
    rules = [{"methods": ["GET"], "path": "/api/**"}]
    probes = network({"host": "a.test", "inspect": True, "rules": rules})
    allowed, method, path = (probes[f"net-allow-1{kind}"].attempt for kind in ("", "-method", "-path"))
    assert isinstance(allowed, Talk) and (allowed.method, allowed.path) == ("GET", "/api/selftest")
    assert isinstance(method, Talk) and method.method != "GET"
    assert isinstance(path, Talk) and not path.path.startswith("/api/")


INSPECTED = {"host": "a.test", "inspect": True, "rules": [{"methods": ["HEAD", "GET"], "path": "/v1/*"}]}


def test_an_inspected_host_is_tried_for_what_only_inspection_refuses() -> None:
    probes = network(INSPECTED)
    kinds = {name.removeprefix("net-allow-1-") for name, probe in probes.items() if probe.side == "deny"}
    assert {
        *("host", "absolute", "trace", "h2", "websocket"),
        *("method", "path", "dots", "encoded-dots", "encoded-slash", "climb"),
    } <= kinds
    trusting = probes["net-allow-1-bundle"].attempt
    assert isinstance(trusting, Talk) and trusting.trusts == "bundle"
    assert probes["net-allow-1"].attempt == Talk("a.test", method="GET", path="/v1/selftest")
    hidden = probes["net-allow-1-encoded-slash"].attempt
    assert isinstance(hidden, Talk) and hidden.path == "/v1%2fselftest"


def test_a_host_that_is_passed_through_shows_its_own_certificate() -> None:
    passed, opened = network("a.test"), network(INSPECTED)
    assert "net-allow-1-end-to-end" in passed and "net-allow-1-bundle" not in passed
    assert "net-allow-1-end-to-end" not in opened


def test_a_rule_for_websockets_makes_one_work_where_it_is_refused_otherwise() -> None:
    rules = [{"methods": ["GET"], "path": "/chat", "websocket": True}]
    probes = network({"host": "a.test", "inspect": True, "rules": rules})
    assert probes["net-allow-1-rule-1-websocket"].side == "allow"
    assert "net-allow-1-websocket" not in probes


def test_a_credential_is_tried_with_a_value_that_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "the real one, which nobody needs")
    inject = [{"host": "a.test", "header": "X-Key", "value": "key ${TOKEN} of ${file:/nowhere/at-all}"}]
    probes = network(INSPECTED, inject=inject)
    put, forged = probes["net-inject-1"].attempt, probes["net-inject-1-forged"].attempt
    assert isinstance(put, Talk) and isinstance(forged, Talk)
    assert put.arrives == ("X-Key", f"key {STAND_IN}TOKEN of {STAND_IN}-nowhere-at-all")
    assert forged.arrives is not None and forged.arrives in forged.headers
    assert "the real one" not in repr(probes)
    looked_for = probes["net-inject-files"].attempt
    assert isinstance(looked_for, Act) and looked_for.arguments[0] == STAND_IN


def test_a_placeholder_is_tried_in_its_header_and_elsewhere() -> None:
    injection = {
        "host": "a.test", "header": "X-Key", "value": "${TOKEN}",
        "mode": "replace_placeholder", "placeholder": "stands-for-the-key",
    }  # fmt: skip
    probes = network(INSPECTED, inject=[injection])
    put = probes["net-inject-1"].attempt
    assert isinstance(put, Talk) and ("X-Key", "stands-for-the-key") in put.headers
    assert "net-inject-1-elsewhere" in probes and "net-inject-1-forged" not in probes


def test_a_name_must_not_lead_inward_and_a_pattern_not_to_a_private_address() -> None:
    exact, pattern = network("a.test"), network("*.a.test")
    assert {"net-allow-1-metadata", "net-allow-1-loopback"} <= exact.keys() & pattern.keys()
    assert "net-allow-1-private" in pattern and "net-allow-1-private" not in exact
    assert exact["net-allow-1-metadata"].is_alone  # the resolver answers one question at a time


def test_a_budget_is_overdrawn_last_and_a_small_one_is_not_spent_on_other_probes() -> None:
    roomy = network({"host": "a.test", "max_bytes": 1024 * 1024})
    assert [name for name in roomy if name.startswith("net-allow-1")][-1] == "net-allow-1-bytes"
    small = network({"host": "a.test", "max_bytes": 1024})
    assert "net-allow-1-direct" in roomy and "net-allow-1-direct" not in small
    assert "net-allow-1-bytes" in small
    assert network({"host": "a.test", "max_bytes": 2**40})["net-allow-1-bytes"].skip


@pytest.mark.parametrize(
    ("pattern", "host", "is_covered"),
    [
        ("a.test", "a.test", True),
        ("A.Test.", "a.test", True),
        ("a.test", "b.a.test", False),
        ("*.a.test", "b.a.test", True),
        ("*.a.test", "c.b.a.test", False),
        ("*.a.test", "a.test", False),
        ("**.a.test", "c.b.a.test", True),
        ("**.a.test", "ba.test", False),
        ("10.0.0.1", "10.0.0.1", True),
    ],
)
def test_what_a_pattern_covers(pattern: str, host: str, is_covered: bool) -> None:
    assert covers(policy(network={"allowlist": [pattern]}).network, host, 443) is is_covered


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_decoy_is_what_its_pattern_hides_and_its_near_miss_is_not(pattern: str) -> None:
    section = policy(filesystem={"deny_patterns": [pattern]}).filesystem
    probes, decoys = file_probes(section)
    patterns = DenyPatterns([pattern])
    tried = {probe.id: probe for probe in probes}
    hidden = tried["files-deny-1"]
    assert not hidden.skip, hidden.skip
    (path,) = hidden.attempt.arguments if isinstance(hidden.attempt, Act) else ("",)
    assert patterns.match(path.removeprefix("/workspace/").encode())
    assert path.removeprefix("/workspace/") in decoys.files
    near = tried["files-near-1"].attempt
    assert isinstance(near, Act)
    assert patterns.match(near.arguments[0].removeprefix("/workspace/").encode()) is None


def test_each_hidden_file_is_looked_for_in_every_way() -> None:
    probes, decoys = file_probes(policy(filesystem={"deny_patterns": ["**/.env*"]}).filesystem)
    acts = [p.attempt.name for p in probes if p.id.startswith("files-deny-1") and isinstance(p.attempt, Act)]
    assert sorted(acts) == [
        *("hard-link", "list", "read", "read", "read", "read", "through-link", "through-link")
    ]
    assert decoys.hard_links == (("selftest-other-name-1", "selftest-1/.envdecoy"),)


def test_a_blocked_program_is_tried_under_all_its_names() -> None:
    shell = policy(shell={"blocked_commands": ["curl"], "allowed_binaries": ["python3"]}).shell
    probes = {probe.id: probe for probe in shell_probes(shell, image())}
    kinds = {name.removeprefix("shell-block-curl") for name in probes if "block" in name}
    assert kinds == {
        *("", "-root", "-copy", "-copy-tmp", "-link", "-shebang", "-loader", "-shell", "-interpreter"),
        "-name-1",
    }
    name = probes["shell-block-curl-name-1"].attempt
    assert isinstance(name, Act) and name.arguments[0] == "/usr/local/bin/curl-again"


def test_what_the_image_lacks_is_skipped_by_name() -> None:
    shell = policy(shell={"blocked_commands": ["nc"], "allowed_binaries": ["npm", "git", "./tool"]}).shell
    probes = {probe.id: probe.skip for probe in shell_probes(shell, image())}
    assert probes["shell-block-nc"] == probes["shell-allow-npm"] == "not in the image"
    assert probes["shell-allow-git"] == ""
    assert "workspace" in probes["shell-allow-tool"]


def test_a_closed_shell_is_tried_with_a_program_that_it_does_not_list() -> None:
    shell = policy(shell={"mode": "closed", "allowed_binaries": ["id"], "helpers": {"id": ["env"]}}).shell
    tried = [probe.id for probe in shell_probes(shell, image("env", "uname"))]
    assert "shell-unlisted-uname" in tried and "shell-unlisted-uname-loader" in tried
    assert not [name for name in tried if "unlisted-env" in name or "unlisted-id" in name]


def test_a_helper_of_a_listed_program_must_run_and_stands_for_nothing_unlisted() -> None:
    shell = policy(shell={"mode": "closed", "allowed_binaries": ["git"], "helpers": {"git": ["id"]}}).shell
    probes = {probe.id: probe for probe in shell_probes(shell, image("uname"))}
    assert probes["shell-helper-git"].side == "allow"
    assert [name for name in probes if "unlisted-uname" in name]
    assert not [name for name in probes if "unlisted-id" in name]


def test_an_unlisted_interpreter_is_tried_in_a_closed_shell() -> None:
    shell = policy(shell={"mode": "closed", "allowed_binaries": ["git"]}).shell
    tried = [probe.id for probe in shell_probes(shell, image())]
    assert "shell-unlisted-python3" in tried
    # Python is not there to execute anything with: that would be refused for another reason.
    assert not [name for name in tried if name.endswith("-interpreter")]


def test_under_gvisor_what_is_other_there_is_known_by_reason() -> None:
    differences = derive(policy(runtime="runsc"), image()).differences
    assert differences["res-nice"].verdict == "worked" and "runsc" in differences["res-nice"].reason
    assert derive(policy(), image()).differences == {}


def test_a_workspace_that_may_run_programs_is_expected_to() -> None:
    def side(may: bool) -> str:
        plan = derive(policy(shell={"workspace_exec": may}), image())
        return next(probe.side for probe in plan.probes if probe.id == "exec-work")

    assert (side(True), side(False)) == ("allow", "deny")


def test_each_limit_is_tried_from_both_sides() -> None:
    plan = derive(policy(), image())
    limits = {probe.id: probe.side for probe in plan.probes if probe.is_alone}
    for word in (
        "memory",
        "pids",
        "nofile",
        "tmp",
        "home",
        "command-seconds",
        "output-bytes",
        "workspace-bytes",
    ):
        assert (limits[f"limits-{word}-under"], limits[f"limits-{word}"]) == ("allow", "deny")
    assert {"limits-workspace-files", "limits-cpus"} <= limits.keys()
    assert list(limits)[-1] == "limits-memory"  # under gVisor nothing runs after it


def test_few_files_are_made_and_many_are_asked_for() -> None:
    def act(most: int) -> str:
        probes = derive(policy(limits={"workspace_files": most}), image()).probes
        attempt = next(probe.attempt for probe in probes if probe.id == "limits-workspace-files")
        assert isinstance(attempt, Act)
        return attempt.name

    assert (act(2048), act(1_000_000)) == ("files", "count-files")


def test_every_shared_probe_that_runs_inside_is_tried_here() -> None:
    folder = Path(os.environ.get("AGENT_RUNNER_CASES", Path(__file__).parents[4] / "shared" / "cases"))
    if not (folder / "probes.yaml").is_file():
        pytest.skip(f"no shared cases at {folder}; set AGENT_RUNNER_CASES")
    shared = yaml.safe_load((folder / "probes.yaml").read_text())["probes"]
    inside = {probe["id"] for probe in shared if probe["where"] == "sandbox"}
    # What only a policy can size has a name of its own among the limits.
    derived = {"res-memory", "res-disk-work", "res-disk-tmp", "res-nofile", "exec-ldso"}
    tried = {probe.id for probe in derive(policy(), image()).probes}
    assert inside - derived <= tried
