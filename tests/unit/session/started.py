"""The first event of a ledger, for tests that need one."""

from sandbox.events import SessionStarted

STARTED = SessionStarted(
    session_id="20260101-000000-abcdef",
    task="do it",
    task_blake3="0" * 64,
    profile="test",
    policy_blake3="1" * 64,
    spec_blake3="2" * 64,
    image="image:latest",
    image_id="sha256:" + "3" * 64,
    seccomp_blake3="4" * 64,
    base_tree_blake3="5" * 64,
    workspace="/project",
    model="script:x",
    fallback_model=None,
    limits={"tool_calls": 3},
)
