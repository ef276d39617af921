"""``agent-runner run`` with everything wrong that a user, a host, a model or a guest can get wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.bad_worlds import (
    RECORD,
    REPOSITORY,
    Running,
    assert_nothing_is_left,
    ended,
    installation_with_guest,
    mounted,
    refused,
    small_disk,
)
from tests.e2e.engine_gate import EngineGate
from tests.e2e.harness import FINISH, Finished, Runner, command, create, kept_changes
from tests.unit.models import wire_anthropic, wire_ollama
from tests.unit.models.wire import Answer, WireServer

pytestmark = pytest.mark.docker

SLEEPER = command("python3 -c 'import time; time.sleep(60)'")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts filesystems of its own: needs root")


@pytest.fixture(scope="module")
def image_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the image, made once: every state directory would read the whole image otherwise."""
    runner = Runner(tmp_path_factory.mktemp("index"))
    runner.workspace.mkdir()
    assert runner.run("--model", runner.script(FINISH)).code == 0
    return runner.state / "images"


@pytest.fixture
def runner(tmp_path: Path, image_index: Path) -> Runner:
    made = Runner(tmp_path)
    (made.workspace / "src").mkdir(parents=True)
    (made.workspace / "src" / "a.txt").write_text("one\n")
    (made.workspace / ".env").write_text("KEY=value\n")
    shutil.copytree(image_index, made.state / "images")
    return made


# --- what the user says ---


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "\udcff"], 2, "UTF-8"),
        (["--model", "script:\udcff.yaml"], 2, "UTF-8"),
        (["--image", "\udcff"], 2, "UTF-8"),
        (["--image", ""], 2, "empty --image"),
        (["--image", "UPPER CASE"], 3, "UPPER CASE"),
        (["--budget-limit", "nan"], 2, "--budget-limit"),
        (["--budget-limit", "1e300"], 2, "budget limit"),
        (["--max-tool-calls", "9" * 20], 2, "tool calls"),
        (["--context-window", "0"], 2, "--context-window"),
        (["--no-such-option"], 2, "--help"),
        (["--model", "script:/dev/zero"], 2, "not a file"),
        (["--model", "anthropic:"], 2, "names nothing"),
        (["--fallback-model", "anthropic:claude-sonnet-4-6"], 3, "ANTHROPIC_API_KEY"),
        (["--policy", "."], 2, "production.yaml"),
        (["--policy", "/dev/zero"], 2, "not a regular file"),
        (["--policy", "broken.yaml"], 2, "broken.yaml:"),
        (["--policy", "unknown.yaml"], 2, "netwrok"),
        (["--workspace", "/proc"], 3, "/proc"),
        (["--workspace", "state"], 3, "state directory"),
        (["--workspace", "."], 3, "state directory"),
    ],
)
def test_a_mistake_is_one_line_and_no_session(
    runner: Runner, arguments: list[Any], code: int, message: str
) -> None:
    (runner.directory / "broken.yaml").write_text("profiles: [\n")
    (runner.directory / "unknown.yaml").write_text("profiles: {production: {netwrok: {}}}\n")
    (runner.state / "sessions").mkdir(parents=True)
    refused(runner, runner.run("--model", runner.script(FINISH), *arguments), code, message)


@pytest.mark.parametrize(
    ("model", "env", "message"),
    [
        ("anthropic:no-such-model", {"ANTHROPIC_API_KEY": "k"}, "price"),
        ("anthropic:claude-sonnet-4-6", {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "x"}, "BASE_URL"),
        ("ollama:q", {"OLLAMA_HOST": "http://[broken"}, "OLLAMA_HOST"),
    ],
)
def test_a_model_that_cannot_be_called_is_one_line(
    runner: Runner, model: str, env: dict[str, str], message: str
) -> None:
    refused(runner, runner.run("--model", model, **env), 3, message)


def test_a_working_directory_that_is_gone_is_one_line(runner: Runner) -> None:
    gone = runner.directory / "gone"
    gone.mkdir()
    line = f"cd {gone} && rmdir {gone} && exec " + " ".join(runner.argv("run", "--task", "t"))
    ended_at_once = subprocess.run(["sh", "-c", line], env=runner.env, capture_output=True, timeout=60)
    assert ended_at_once.returncode == 3
    assert ended_at_once.stderr.decode().startswith("agent-runner: cannot tell the working directory")


# --- the workspace ---


def _unix_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_unix_socket, "socket"),
        (os.mkfifo, "FIFO"),
        pytest.param(
            lambda path: os.mknod(path, 0o20666, os.makedev(1, 3)), "character device", marks=root_only
        ),
        (lambda path: (path.write_text("x"), path.chmod(0)), "not readable"),
    ],
)
def test_what_cannot_be_shown_inside_is_refused_by_name_and_fine_when_hidden(
    runner: Runner, make: Callable[[Path], object], word: str
) -> None:
    make(runner.workspace / "thing")
    refused(runner, runner.run("--model", runner.script(FINISH)), 3, "thing", word)
    hiding = runner.policy(filesystem={"deny_patterns": ["thing"]})
    ended(runner, runner.run("--model", runner.script(FINISH), policy=hiding), "completed", 0)


def test_links_that_leave_the_tree_lead_nowhere_inside(runner: Runner) -> None:
    secret = runner.directory / "secret.txt"
    secret.write_text("outside\n")
    (runner.workspace / "absolute").symlink_to(secret)
    (runner.workspace / "relative").symlink_to("../secret.txt")
    (runner.workspace / "loop").symlink_to("loop")
    names = ("absolute", "relative", "loop")
    turns = [{"calls": [{"tool": "read", "input": {"path": name}} for name in names]}, FINISH]
    result = ended(runner, runner.run("--model", runner.script(*turns)), "completed", 0)
    assert [action["ok"] for action in result["actions"]] == [False] * 3
    assert "outside" not in str(result["actions"])
    assert "symlinks lead out" in str(result["warnings"])
    assert secret.read_text() == "outside\n"


# --- the state directory ---


@root_only
@pytest.mark.parametrize("filesystem", ["overlay", "ramfs"])
def test_a_state_directory_that_cannot_hold_an_upper_layer_is_refused(
    runner: Runner, filesystem: str
) -> None:
    options = ["none"]
    if filesystem == "overlay":
        for name in ("low", "up", "work"):
            (runner.directory / name).mkdir()
        layers = ",".join(
            f"{key}={runner.directory / name}"
            for key, name in (("lowerdir", "low"), ("upperdir", "up"), ("workdir", "work"))
        )
        options = ["-o", layers, "overlay"]
    with mounted(filesystem, runner.directory / "odd", *options) as odd:
        finished = runner.run("--model", runner.script(FINISH), AGENT_RUNNER_STATE=str(odd / "state"))
        refused(runner, finished, 3, filesystem, "AGENT_RUNNER_STATE")
        assert not list(odd.rglob("sessions/*"))


def test_a_state_directory_that_is_no_directory_or_has_a_blank_is_refused(runner: Runner) -> None:
    file = runner.directory / "file"
    file.write_text("")
    model = runner.script(FINISH)
    refused(runner, runner.run("--model", model, AGENT_RUNNER_STATE=str(file)), 3, str(file))
    blank = runner.directory / "with blank"
    refused(runner, runner.run("--model", model, AGENT_RUNNER_STATE=str(blank)), 3, "with blank")


def test_a_damaged_signing_key_is_found_before_the_session(runner: Runner) -> None:
    keys = runner.state / "keys"
    keys.mkdir(mode=0o700, parents=True)
    key = keys / "signing.pem"
    key.touch(0o600)
    key.write_text("nonsense")
    refused(runner, runner.run("--model", runner.script(FINISH)), 3, "signing.pem", "damaged")


@root_only
def test_a_full_host_ends_the_session_and_costs_neither_record_nor_patch(runner: Runner) -> None:
    fill = command('python3 -c \'while True: open("junk", "ab").write(bytes(1 << 20))\'')
    turns = [{"calls": [create("./src/b.txt", "two\n")]}, {"calls": [fill]}, FINISH]
    with small_disk(runner.directory, 64) as disk:
        runner.state = disk / "state"
        runner.env["AGENT_RUNNER_STATE"] = str(runner.state)
        result = ended(runner, runner.run("--model", runner.script(*turns)), "disk_full", 17)
        assert "disk" in result["reason"]
        assert any("are granted and" in warning for warning in result["warnings"])
        assert "src/b.txt" in Path(result["patch"]["path"]).read_text()


@root_only
def test_changes_that_fit_no_patch_are_kept_and_the_result_says_where(runner: Runner) -> None:
    script = "import os\nfor n in range(12): open(str(n), 'wb').write(os.urandom(8 << 20))"
    fill = command(f'python3 -c "{script}"')
    turns = [{"calls": [create("./src/b.txt", "two\n")]}, {"calls": [fill]}, FINISH]
    with small_disk(runner.directory, 80) as disk:
        runner.state = disk / "state"
        runner.env["AGENT_RUNNER_STATE"] = str(runner.state)
        finished = runner.run("--model", runner.script(*turns))
        result = finished.json
        assert (result["status"], finished.code, result["patch"]) == ("disk_full", 17, None)
        assert "cannot export the patch" in str(result["warnings"])
        (session,) = runner.sessions()
        assert str(session / "changes.img") in str(result["warnings"])
        with kept_changes(session) as changes:
            assert (changes / "src" / "b.txt").read_text() == "two\n"
        verified = runner("verify", "latest")
        assert verified.code == 0, verified.stdout
        assert {path.name for path in session.iterdir()} == RECORD - {"patch.diff"} | {"changes.img"}


@root_only
def test_a_disk_without_room_for_a_session_is_refused(runner: Runner) -> None:
    with small_disk(runner.directory, 16) as disk:
        runner.state = disk / "state"
        runner.env["AGENT_RUNNER_STATE"] = str(runner.state)
        refused(runner, runner.run("--model", runner.script(FINISH)), 3, "no space left", "48.0 MiB needed")


# --- the engine ---


@pytest.mark.parametrize("host", ["unix:///no/such.sock", "tcp://127.0.0.1:1", "nonsense"])
def test_an_engine_that_is_not_there_is_one_line(runner: Runner, host: str) -> None:
    refused(runner, runner.run("--model", runner.script(FINISH), DOCKER_HOST=host), 3, host, "DOCKER_HOST")


def test_something_else_on_the_engines_socket_is_one_line(runner: Runner) -> None:
    path = runner.directory / "other.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def babble() -> None:
        while True:
            client, _ = listener.accept()
            client.recv(65536)
            client.sendall(b"220 mail ready\r\n")
            client.close()

    threading.Thread(target=babble, daemon=True).start()
    refused(runner, runner.run("--model", runner.script(FINISH), DOCKER_HOST=f"unix://{path}"), 3, str(path))


def test_an_engine_that_dies_under_a_command_is_sandbox_failed_and_gc_removes_the_rest(
    runner: Runner,
) -> None:
    turns = [{"calls": [create("./src/b.txt", "two\n")]}, {"calls": [SLEEPER]}, FINISH]
    with EngineGate(runner.directory / "engine.sock") as gate:
        run = Running(runner, "--model", runner.script(*turns), DOCKER_HOST=gate.url)
        wait_for_event(runner, "ExecObserved")
        gate.die()
        finished = run.finish()
    assert "Traceback" not in finished.stderr
    result = finished.json
    assert (result["status"], finished.code) == ("sandbox_failed", 16)
    assert result["patch"]["files"] == 1
    assert any("cannot remove the container" in warning for warning in result["warnings"])
    assert runner("verify", "latest").code == 0
    # The container runs on until somebody asks the engine again; another controller may have, by now.
    assert runner("gc").code == 0
    assert_nothing_is_left(runner)


# --- the guest ---


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int main(void) { return 7; }", "exit code 7"),
        ('#include <unistd.h>\nint main(void) { write(2, "no luck\\n", 8); return 1; }', "no luck"),
        (
            "#include <string.h>\n#include <unistd.h>\n"
            "int main(void) { char b[4096]; memset(b, 0xa5, sizeof b); for (;;) write(1, b, sizeof b); }",
            "guest",
        ),
    ],
    ids=["ends", "complains", "babbles"],
)
def test_a_guest_that_ends_or_babbles_is_sandbox_failed(runner: Runner, source: str, reason: str) -> None:
    root = installation_with_guest(runner.directory, source)
    model = runner.script({"calls": [command("git --version")]}, FINISH)
    result = ended(runner, runner.run("--model", model, PYTHONPATH=str(root)), "sandbox_failed", 16)
    assert reason in result["reason"]


# --- commands ---


def test_a_command_that_ignores_sigterm_or_leaves_children_dies_on_time(runner: Runner) -> None:
    deaf = (
        "import os, signal, time\n"
        "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n os.setsid()\n os.fork()\n"
        "time.sleep(60)"
    )
    alive = (
        "import os\n"
        "pids = [pid for pid in os.listdir('/proc') if pid.isdigit()]\n"
        "print(sum('python' in open(f'/proc/{pid}/comm').read() for pid in pids))"
    )
    turns = [
        {"calls": [command(f'python3 -c "{deaf}"', timeout_seconds=1)]},
        {"calls": [command(f'python3 -c "{alive}"')]},
        FINISH,
    ]
    result = ended(runner, runner.run("--model", runner.script(*turns)), "completed", 0)
    assert result["actions"][0]["timed_out"] is True, str(result["actions"][0])
    assert result["actions"][1]["excerpt"] == "1"  # itself


# --- models ---

ANTHROPIC = "anthropic:claude-sonnet-4-6"


def _anthropic_calls(count: int) -> Answer:
    blocks = [
        event
        for index in range(count)
        for event in wire_anthropic.tool_block(index, f"toolu_{index}", "list", '{"path": "."}')
    ]
    return wire_anthropic.stream(wire_anthropic.start(), *blocks, *wire_anthropic.end("tool_use"))


def _ollama_calls(count: int) -> Answer:
    calls = [wire_ollama.tool_call("list", {"path": "."}, index) for index in range(count)]
    return wire_ollama.stream(
        wire_ollama.chunk(tool_calls=calls), wire_ollama.done(prompt_eval_count=9, eval_count=9)
    )


MISBEHAVIOUR = [
    pytest.param(ANTHROPIC, [wire_anthropic.reply("blah")] * 3, "invalid_output", 14, id="anthropic-talks"),
    pytest.param("ollama:q", [wire_ollama.reply("blah")] * 3, "invalid_output", 14, id="ollama-talks"),
    pytest.param(
        ANTHROPIC,
        [wire_anthropic.stream(wire_anthropic.start(), *wire_anthropic.end())] * 3,
        "invalid_output",
        14,
        id="anthropic-says-nothing",
    ),
    pytest.param("ollama:q", [wire_ollama.reply("")] * 3, "invalid_output", 14, id="ollama-says-nothing"),
    pytest.param(ANTHROPIC, [_anthropic_calls(200)], "tool_calls_exhausted", 11, id="anthropic-200-calls"),
    pytest.param("ollama:q", [_ollama_calls(200)], "tool_calls_exhausted", 11, id="ollama-200-calls"),
]


def model_env(url: str) -> dict[str, str]:
    return {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": url, "OLLAMA_HOST": url}


@pytest.mark.parametrize(("model", "answers", "status", "code"), MISBEHAVIOUR)
async def test_a_model_that_misbehaves_on_the_wire_ends_with_its_status(
    runner: Runner, model: str, answers: list[Answer], status: str, code: int
) -> None:
    async with WireServer() as server:
        server.answers.extend(answers)
        arguments = ("--model", model, "--max-tool-calls", "5")
        finished = await asyncio.to_thread(runner.run, *arguments, **model_env(server.url))
    result = await asyncio.to_thread(ended, runner, finished, status, code)
    assert len(result["actions"]) == (5 if status == "tool_calls_exhausted" else 0)


async def test_servers_that_are_no_model_end_as_model_failed(runner: Runner) -> None:
    sse = {"content-type": "text/event-stream"}
    answers = [
        (ANTHROPIC, Answer(200, sse, [b"\xff\x00<html>"])),
        (ANTHROPIC, Answer(200)),
        ("ollama:q", Answer(200, {}, [b"\xff\x00<html>\n"])),
        ("ollama:q", Answer(is_dropped=True)),
    ]

    async def run(model: str, answer: Answer) -> Finished:
        async with WireServer() as server:
            server.answers.extend([answer] * 4)
            return await asyncio.to_thread(Running(runner, "--model", model, **model_env(server.url)).finish)

    for finished in await asyncio.gather(*(run(*each) for each in answers)):
        result = await asyncio.to_thread(ended, runner, finished, "model_failed", 15)
        assert result["models"][0]["failed_calls"] == 4


# --- interruptions ---


def wait_for_event(runner: Runner, name: str) -> None:
    def has_event() -> bool:
        return any(name in ledger.read_text() for ledger in runner.state.glob("sessions/*/ledger.jsonl"))

    wait_until(has_event)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("request_held", "is_indexed"),
    [
        ((b"GET", b"/info"), False),
        ((b"DELETE", b"/containers/"), False),
        ((b"POST", b"/containers/create"), True),
    ],
    ids=["asking-the-engine", "indexing-the-image", "creating-the-container"],
)
def test_ctrl_c_while_opening_leaves_nothing(
    runner: Runner, request_held: tuple[bytes, bytes], is_indexed: bool
) -> None:
    model = runner.script(FINISH)
    if not is_indexed:
        shutil.rmtree(runner.state / "images")
    with EngineGate(runner.directory / "engine.sock", hold=request_held) as gate:
        run = Running(runner, "--model", model, DOCKER_HOST=gate.url)
        assert gate.held.wait(30)
        run.interrupt()
        time.sleep(0.2)  # the signal is handled while the engine is still silent
        gate.release()
        finished = run.finish()
    assert finished == Finished(130, "", "agent-runner: cancelled\n")
    assert runner.sessions() == []
    assert_nothing_is_left(runner)


def test_ctrl_c_while_the_container_starts_is_cancelled(runner: Runner) -> None:
    with EngineGate(runner.directory / "engine.sock", hold=(b"POST", b"/start")) as gate:
        run = Running(runner, "--model", runner.script({"calls": [SLEEPER]}, FINISH), DOCKER_HOST=gate.url)
        assert gate.held.wait(30)
        run.interrupt()
        time.sleep(0.2)
        gate.release()
        ended(runner, run.finish(), "cancelled", 130)


async def test_ctrl_c_during_a_model_call_hangs_up_and_is_cancelled(runner: Runner) -> None:
    async with WireServer() as server:
        server.answers.append(wire_anthropic.stream(wire_anthropic.start(), is_held=True))
        run = Running(runner, "--model", ANTHROPIC, **model_env(server.url))
        await asyncio.to_thread(wait_until, lambda: server.requests)
        run.interrupt()
        finished = await asyncio.to_thread(run.finish)
        await asyncio.wait_for(server.hung_up.wait(), 10)
    result = await asyncio.to_thread(ended, runner, finished, "cancelled", 130)
    assert result["cost_usd"] > 0  # nobody knows what was billed: the reservation is kept


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_sigterm_is_as_ctrl_c(runner: Runner, number: signal.Signals) -> None:
    run = Running(
        runner, "--model", runner.script({"calls": [create("./src/b.txt", "2\n"), SLEEPER]}, FINISH)
    )
    wait_for_event(runner, "ExecObserved")
    run.interrupt(number)
    result = ended(runner, run.finish(), "cancelled", 130)
    assert result["patch"]["files"] == 1


def test_more_ctrl_c_changes_nothing_but_says_so(runner: Runner) -> None:
    turns = [{"calls": [create("./src/b.txt", "2\n"), SLEEPER]}, FINISH]
    with EngineGate(runner.directory / "engine.sock", hold=(b"DELETE", b"/containers/")) as gate:
        run = Running(runner, "--model", runner.script(*turns), DOCKER_HOST=gate.url)
        wait_for_event(runner, "ExecObserved")
        run.interrupt()
        assert gate.held.wait(30)
        run.interrupt()
        run.interrupt(signal.SIGTERM)
        time.sleep(0.2)
        gate.release()
        finished = run.finish()
    result = ended(runner, finished, "cancelled", 130)
    assert set(finished.stderr.splitlines()) == {
        "agent-runner: already stopping; the container is being removed"
    }
    assert result["patch"]["files"] == 1


def test_a_first_ctrl_c_while_closing_does_not_cut_the_closing_short(runner: Runner) -> None:
    model = runner.script({"calls": [create("./src/b.txt", "2\n")]}, FINISH)
    with EngineGate(runner.directory / "engine.sock", hold=(b"DELETE", b"/containers/")) as gate:
        run = Running(runner, "--model", model, DOCKER_HOST=gate.url)
        assert gate.held.wait(30)
        run.interrupt()
        time.sleep(0.2)
        gate.release()
        result = ended(runner, run.finish(), "completed", 0)  # the work was done before
    assert result["patch"]["files"] == 1


def test_ctrl_c_while_the_result_is_printed_does_not_cut_it_in_two(runner: Runner) -> None:
    many = [{"tool": "list", "input": {"path": "."}}] * 190  # more than a pipe holds
    run = Running(runner, "--model", runner.script({"calls": many}, FINISH))
    wait_until(lambda: list(runner.state.glob("sessions/*/statement.json")))
    wait_until(lambda: not list(runner.state.glob("sessions/*/egress")))
    time.sleep(0.5)  # it writes, and nobody reads
    run.interrupt()
    time.sleep(0.1)
    result = ended(runner, run.finish(), "completed", 0)
    assert len(result["actions"]) == 190


@pytest.mark.parametrize("output", ["json", "text"])
def test_a_reader_that_hangs_up_leaves_a_whole_record(runner: Runner, output: str) -> None:
    run = Running(
        runner,
        "--model",
        runner.script({"calls": [create("./src/b.txt", "2\n")]}, FINISH),
        "--output",
        output,
    )
    assert run.process.stdout is not None
    run.process.stdout.close()
    run.process.stdout = None
    _, stderr = run.process.communicate(timeout=60)
    assert stderr == b""
    assert runner("verify", "latest").code == 0
    assert_nothing_is_left(runner)


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-"])
def test_a_standard_stream_that_is_closed_is_no_problem(runner: Runner, redirection: str) -> None:
    argv = runner.argv(
        "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.policy(),
        "--model", runner.script(FINISH),
    )  # fmt: skip
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *argv]
    done = subprocess.run(shell, env=runner.env, cwd=runner.directory, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert runner("verify", "latest").code == 0
    assert_nothing_is_left(runner)


def test_a_full_disk_under_stdout_is_one_line_and_the_record_is_whole(runner: Runner) -> None:
    argv = runner.argv(
        "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.policy(),
        "--model", runner.script(FINISH), "--output", "json",
    )  # fmt: skip
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            argv, env=runner.env, cwd=runner.directory, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 3
    assert done.stderr.startswith(b"agent-runner: cannot print the result of session ")
    assert runner("verify", "latest").code == 0
    assert_nothing_is_left(runner)


# --- many at once, and without root ---


def test_six_runs_at_once_in_one_workspace_do_not_meet(runner: Runner) -> None:
    runs = []
    for number in range(6):
        mine = create("./src/mine.txt", f"{number}\n")
        look = command("python3 -c 'print(open(\"src/mine.txt\").read())'")
        model = runner.script({"calls": [mine, look]}, FINISH, name=f"turns{number}.yaml")
        runs.append(Running(runner, "--model", model))
    finished = [run.finish() for run in runs]
    for number, one in enumerate(finished):
        result = ended(runner, one, "completed", 0)
        assert result["actions"][1]["excerpt"] == str(number)
    assert not (runner.workspace / "src" / "mine.txt").exists()


@root_only
def test_an_ordinary_user_of_the_docker_group_has_the_same_ends(runner: Runner) -> None:
    python = Path(f"/usr/bin/python3.{sys.version_info.minor}")
    if not python.exists():
        pytest.skip(f"needs {python}, an interpreter that every user can run")
    group = Path("/var/run/docker.sock").stat().st_gid
    if group == 0:
        pytest.skip("needs an engine whose socket belongs to a group of its own")
    user = OrdinaryUser(runner, python, group)
    turns = [{"calls": [create("./src/b.txt", "2\n"), command("python3 -c 'import os; print(os.getuid())'")]}]
    result = ended(user, user.run("--model", user.script(*turns, FINISH)), "completed", 0)
    assert result["actions"][1]["excerpt"] == "1000"
    assert result["patch"]["files"] == 1
    before = user.sessions()
    denied = user.run("--model", user.script(FINISH), AGENT_RUNNER_STATE="/root/no")
    assert (denied.code, denied.stdout, denied.stderr.count("\n")) == (3, "", 1)
    closed = runner.directory / "closed"
    closed.mkdir(mode=0o700)
    unseen = user.run("--model", user.script(FINISH), "--policy", closed / "policy.yaml")
    assert (unseen.code, unseen.stdout, unseen.stderr.count("\n")) == (2, "", 1)
    private = runner.workspace / "private.txt"
    private.write_text("root's\n")
    private.chmod(0o600)
    unreadable = user.run("--model", user.script(FINISH))
    assert (unreadable.code, unreadable.stdout, unreadable.stderr.count("\n")) == (3, "", 1)
    assert "private.txt" in unreadable.stderr
    assert user.sessions() == before
    assert_nothing_is_left(user)


class OrdinaryUser(Runner):
    """Uid 1000 with the engine's group, and an interpreter it may run."""

    def __init__(self, runner: Runner, python: Path, group: int) -> None:
        super().__init__(runner.directory)
        self._python, self._group = python, group
        packages = sysconfig.get_path("purelib")
        self.env |= {"PYTHONPATH": f"{REPOSITORY}:{packages}", "HOME": "/nonexistent"}
        for path in (self.directory, *self.directory.rglob("*")):
            os.lchown(path, 1000, 1000)
        for parent in self.directory.parents:
            if parent.is_relative_to(tempfile.gettempdir()) and not parent.stat().st_mode & 0o001:
                parent.chmod(0o755)

    def argv(self, *arguments: str | Path) -> list[str]:
        return [str(self._python), *super().argv(*arguments)[1:]]

    def __call__(self, *arguments: str | Path, **env: str) -> Finished:
        done = subprocess.run(
            self.argv(*arguments),
            env=self.env | env,
            cwd=self.directory,
            user=1000,
            group=1000,
            extra_groups=[self._group],
            capture_output=True,
            timeout=60,
        )
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())
