"""``agent-runner run`` against the real engine: every way a run can end, and what it leaves behind."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from sandbox.resources import shipped
from tests.e2e.harness import FINISH, Finished, Runner, command, create, engine_leftovers, mounts_beneath

pytestmark = pytest.mark.docker

SCHEMA = json.loads(shipped("policy/schemas/run-result.json").read_text())


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    made = Runner(tmp_path)
    (made.workspace / "src").mkdir(parents=True)
    (made.workspace / "src" / "a.txt").write_text("one\n")
    (made.workspace / ".env").write_text("KEY=value\n")
    return made


def ended(runner: Runner, finished: Finished, status: str, code: int) -> dict[str, object]:
    """Check what must hold however a run ended; return its result."""
    assert finished.stdout, finished.stderr
    result = finished.json
    Draft202012Validator(SCHEMA).validate(result)
    assert (result["status"], finished.code, result["exit_code"]) == (status, code, code), result["reason"]
    assert not engine_leftovers(result["session"])
    directory = runner.state / "sessions" / result["session"]
    left = {path.name for path in directory.iterdir()}
    assert left == {"ledger.jsonl", "statement.json", "result.json", "patch.diff", "owner"}
    assert not mounts_beneath(runner.state)
    verified = runner("verify", result["session"])
    assert verified.code == 0, verified.stdout
    return result


def test_a_run_changes_nothing_but_its_patch_which_then_applies(runner: Runner) -> None:
    turns = [
        {
            "calls": [
                create("./src/b.txt", "two\n"),
                command('python3 -c \'open("src/a.txt", "a").write("x\\n")\''),
            ]
        },
        FINISH,
    ]
    result = ended(runner, runner.run("--model", runner.script(*turns)), "completed", 0)
    assert not (runner.workspace / "src" / "b.txt").exists()
    assert (runner.workspace / "src" / "a.txt").read_text() == "one\n"
    applied = runner("apply", "latest")
    assert applied.code == 0, applied.stderr
    assert (runner.workspace / "src" / "b.txt").read_text() == "two\n"
    assert (runner.workspace / "src" / "a.txt").read_text() == "one\nx\n"
    assert result["patch"]["files"] == 2  # type: ignore[index]


def test_a_hidden_file_does_not_exist_inside_and_is_not_lost(runner: Runner) -> None:
    look = 'python3 -c \'import os; print(sorted(os.listdir(".")), os.path.lexists(".env"))\''
    result = ended(
        runner, runner.run("--model", runner.script({"calls": [command(look)]}, FINISH)), "completed", 0
    )
    assert result["actions"][0]["excerpt"] == "['src'] False"  # type: ignore[index]
    assert (runner.workspace / ".env").read_text() == "KEY=value\n"


def test_a_blocked_program_cannot_be_run_by_anything_in_the_tree(runner: Runner) -> None:
    lines = [
        'python3 -c \'import subprocess as s; print(s.run(["curl", "--version"]).returncode)\'',
        'python3 -c \'import subprocess as s; print(s.run(["/usr/bin/curl", "--version"]).returncode)\'',
        'python3 -c \'import subprocess as s; print(s.run(["git", "--version"]).returncode)\'',  # the control
    ]
    turns = [{"calls": [command(line) for line in lines]}, FINISH]
    result = ended(runner, runner.run("--model", runner.script(*turns)), "completed", 0)
    actions = result["actions"]
    assert [action["verdict"] for action in actions] == ["allow"] * 3  # type: ignore[attr-defined,index]
    assert "is blocked by policy" in actions[0]["excerpt"]  # type: ignore[index]
    assert "is blocked by policy" in actions[1]["excerpt"]  # type: ignore[index]
    assert "git version" in actions[2]["excerpt"]  # type: ignore[index]


def test_the_last_tool_call_is_the_last(runner: Runner) -> None:
    many = {"calls": [{"tool": "list", "input": {"path": "."}}] * 200}
    finished = runner.run("--model", runner.script(many, FINISH), "--max-tool-calls", "5")
    result = ended(runner, finished, "tool_calls_exhausted", 11)
    assert len(result["actions"]) == 5  # type: ignore[arg-type]


def test_a_budget_that_cannot_pay_the_next_call_ends_the_run_before_it(runner: Runner) -> None:
    policy = runner.policy(
        prices={"script:*": {"input_usd_per_million": 1000, "output_usd_per_million": 1000}}
    )
    turns = [{"calls": [{"tool": "list", "input": {"path": "."}}]}] * 5
    finished = runner.run("--model", runner.script(*turns, FINISH), "--budget-limit", "0.5", policy=policy)
    result = ended(runner, finished, "budget_exhausted", 10)
    assert result["cost_usd"] <= 0.5  # type: ignore[operator]


def test_the_fallback_model_takes_over_when_the_first_fails(runner: Runner) -> None:
    broken = runner.script(
        {"fail": {"kind": "authentication", "http_status": 401}}, FINISH, name="broken.yaml"
    )
    good = runner.script({"calls": [create("./src/b.txt", "two\n")]}, FINISH, name="good.yaml")
    result = ended(runner, runner.run("--model", broken, "--fallback-model", good), "completed", 0)
    assert [model["model"] for model in result["models"]] == [broken, good]  # type: ignore[attr-defined]


def test_a_model_that_never_answers_is_model_failed(runner: Runner) -> None:
    broken = runner.script({"fail": {"kind": "authentication", "http_status": 401}})
    ended(runner, runner.run("--model", broken), "model_failed", 15)


def test_nonsense_gets_two_repair_turns(runner: Runner) -> None:
    nonsense = {"calls": [{"tool": "no_such_tool", "input": {}}]}
    ended(runner, runner.run("--model", runner.script(*[nonsense] * 3, FINISH)), "invalid_output", 14)
    ended(runner, runner.run("--model", runner.script(*[nonsense] * 2, FINISH)), "completed", 0)


def test_a_session_over_its_time_ends_with_its_tree_killed(runner: Runner) -> None:
    policy = runner.policy(limits={"wall_seconds": 3, "command_seconds": 60})
    turns = [{"calls": [command("python3 -c 'import time; time.sleep(60)'")]}, FINISH]
    ended(runner, runner.run("--model", runner.script(*turns), policy=policy), "timed_out", 12)


def test_a_command_over_its_time_is_a_result_that_the_agent_sees(runner: Runner) -> None:
    sleeper = command("python3 -c 'import time; time.sleep(60)'", timeout_seconds=1)
    result = ended(runner, runner.run("--model", runner.script({"calls": [sleeper]}, FINISH)), "completed", 0)
    assert result["actions"][0]["timed_out"] is True  # type: ignore[index]


def test_ctrl_c_ends_the_run_cleanly_and_saves_the_patch(runner: Runner) -> None:
    marker = 'python3 -c \'import time; open("src/b.txt", "w").write("two\\n"); time.sleep(60)\''
    model = runner.script({"calls": [command(marker)]}, FINISH)
    process = subprocess.Popen(
        runner.argv(
            "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.policy(),
            "--output", "json", "--model", model,
        ),
        env=runner.env, cwd=runner.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: any((at / "layers/upper/src/b.txt").exists() for at in runner.sessions()))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    result = ended(runner, Finished(process.returncode, stdout.decode(), stderr.decode()), "cancelled", 130)
    assert result["patch"]["files"] == 1  # type: ignore[index]


def test_a_container_that_dies_under_the_run_is_sandbox_failed(runner: Runner) -> None:
    model = runner.script({"calls": [command("python3 -c 'import time; time.sleep(60)'")]}, FINISH)
    process = subprocess.Popen(
        runner.argv(
            "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.policy(),
            "--output", "json", "--model", model,
        ),
        env=runner.env, cwd=runner.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: any("ExecObserved" in text for text in ledgers(runner)))
    session = runner.sessions()[0].name
    (container,) = [name for name in engine_leftovers(session) if "agent-runner" not in name]
    subprocess.run(["docker", "kill", container], check=True, capture_output=True, timeout=30)
    stdout, stderr = process.communicate(timeout=60)
    ended(runner, Finished(process.returncode, stdout.decode(), stderr.decode()), "sandbox_failed", 16)


def test_a_killed_controller_leaves_what_gc_removes_and_a_ledger_that_holds(runner: Runner) -> None:
    model = runner.script({"calls": [command("python3 -c 'import time; time.sleep(60)'")]}, FINISH)
    process = subprocess.Popen(
        runner.argv(
            "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.policy(),
            "--model", model,
        ),
        env=runner.env, cwd=runner.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: any("ExecObserved" in text for text in ledgers(runner)))
    process.kill()
    process.wait()
    session = runner.sessions()[0].name
    assert engine_leftovers(session)  # the control: there is something to remove
    assert runner("gc").code == 0
    assert not engine_leftovers(session)
    assert not mounts_beneath(runner.state)
    assert (runner.workspace / "src" / "a.txt").read_text() == "one\n"
    verified = runner("verify", session)
    assert verified.code == 1
    (ledger,) = ledgers(runner)
    assert f"{len(ledger.splitlines())} entries hold" in verified.stdout
    (row,) = runner("sessions", "--output", "json").json
    assert row["status"] == "interrupted"


def test_a_dry_run_prints_the_container_and_creates_none(runner: Runner) -> None:
    model = runner.script(FINISH)
    shown = runner.run("--model", model, "--dry-run")
    assert shown.code == 0, shown.stderr
    spec = shown.json
    assert (spec["network"], spec["read_only_root"], spec["dropped_capabilities"]) == ("none", True, ["ALL"])
    assert not runner.sessions()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--policy", "no-such.yaml"], 2, "no-such.yaml"),
        (["--profile", "staging"], 2, "production"),
        (["--model", "gpt:4"], 2, "anthropic:"),
        (["--model", "anthropic:claude-sonnet-4-6"], 3, "ANTHROPIC_API_KEY"),
        (["--model", "script:no-such.yaml"], 2, "no-such.yaml"),
        (["--image", "no/such:image"], 3, "no/such:image"),
        (["--workspace", "no-such-dir"], 3, "no-such-dir"),
        (["--workspace", "policy.yaml"], 3, "not a directory"),
        (["--max-tool-calls", "100000"], 2, "ceiling"),
        (["--task", " "], 2, "empty task"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    runner: Runner, arguments: list[str], code: int, message: str
) -> None:
    policy = runner.policy(routing={"max_tool_calls": 50})
    finished = runner.run("--model", runner.script(FINISH), *arguments, policy=policy)
    assert finished.code == code, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.startswith("agent-runner: ")
    assert finished.stderr.count("\n") == 1
    assert message in finished.stderr
    assert not runner.sessions()


def test_a_dead_engine_is_one_line(runner: Runner) -> None:
    finished = runner.run("--model", runner.script(FINISH), DOCKER_HOST="unix:///no/such.sock")
    assert (finished.code, finished.stdout) == (3, "")
    assert finished.stderr.count("\n") == 1


def test_a_workspace_with_a_fifo_is_refused_by_name(runner: Runner) -> None:
    os.mkfifo(runner.workspace / "pipe")
    finished = runner.run("--model", runner.script(FINISH))
    assert (finished.code, finished.stdout) == (3, "")
    assert "pipe" in finished.stderr
    assert not runner.sessions()


def test_names_that_are_no_text_and_links_out_of_the_tree_do_not_stop_a_run(runner: Runner) -> None:
    (runner.workspace / "leaving").symlink_to("/etc/passwd")
    Path(os.fsdecode(bytes(runner.workspace) + b"/src/\xff.txt")).write_text("latin\n")
    look = "python3 -c 'print(open(b\"src/\\xff.txt\").read())'"
    result = ended(
        runner, runner.run("--model", runner.script({"calls": [command(look)]}, FINISH)), "completed", 0
    )
    assert result["actions"][0]["excerpt"] == "latin"  # type: ignore[index]


def test_a_flood_of_output_is_counted_and_cut(runner: Runner) -> None:
    flood = command("python3 -c 'import sys; [sys.stdout.write(\"x\" * 1000000) for _ in range(1000)]'")
    result = ended(runner, runner.run("--model", runner.script({"calls": [flood]}, FINISH)), "completed", 0)
    assert result["actions"][0]["output_bytes"] == 1_000_000_000  # type: ignore[index]


def test_a_fork_bomb_ends_as_a_result(runner: Runner) -> None:
    policy = runner.policy(limits={"pids": 64, "command_seconds": 3})
    bomb = command("python3 -c 'import os\nwhile True:\n try: os.fork()\n except OSError: pass'")
    after = command("git --version")
    turns = [{"calls": [bomb]}, {"calls": [after]}, FINISH]
    result = ended(runner, runner.run("--model", runner.script(*turns), policy=policy), "completed", 0)
    actions = result["actions"]
    assert actions[0]["timed_out"] is True  # type: ignore[index]
    assert actions[1]["exit_code"] == 0  # type: ignore[index]


def ledgers(runner: Runner) -> list[str]:
    return [path.read_text() for session in runner.sessions() for path in session.glob("ledger.jsonl")]


def wait_until(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
