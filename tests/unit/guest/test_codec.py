"""Both codecs against the same vectors, and both against what nobody would send."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import GuestError
from sandbox.guest import codec
from sandbox.guest.messages import Command, ExecRules, GuestConfig, Relay

HERE = Path(__file__).parent
GUEST = HERE.parents[2] / "images" / "guest"
VECTORS = json.loads((HERE / "vectors.json").read_text())


def of(group: str) -> list[object]:
    return [pytest.param(vector, id=vector["name"]) for vector in VECTORS[group]]


@pytest.fixture(scope="session")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C codec, instrumented: any read out of bounds ends it."""
    program = tmp_path_factory.mktemp("wire") / "wire"
    flags = "-std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -g -O1"
    flags += " -fsanitize=address,undefined -fno-sanitize-recover"
    sources = [str(HERE / "wire.c"), str(GUEST / "protocol.c")]
    subprocess.run(["gcc", *flags.split(), f"-I{GUEST}", "-o", str(program), *sources], check=True)
    return program


def run_wire(wire: Path, *arguments: str, lines: list[str]) -> list[str]:
    done = subprocess.run(
        [str(wire), *arguments],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_c_reads_what_the_vectors_say(wire: Path) -> None:
    read = run_wire(wire, "decode", lines=[vector["hex"] for vector in VECTORS["requests"]])
    assert read == [vector["reads"] for vector in VECTORS["requests"]]


def test_c_refuses_what_is_out_of_form(wire: Path) -> None:
    read = run_wire(wire, "decode", lines=[vector["hex"] for vector in VECTORS["garbage"]])
    assert dict(zip((v["name"] for v in VECTORS["garbage"]), read, strict=True)) == {
        vector["name"]: "garbage" for vector in VECTORS["garbage"]
    }


def test_c_writes_what_the_vectors_say(wire: Path) -> None:
    written = run_wire(wire, "encode", lines=[vector["made_from"] for vector in VECTORS["replies"]])
    assert written == [vector["hex"] for vector in VECTORS["replies"]]


def test_a_hundred_thousand_mutated_frames_do_not_make_c_read_out_of_bounds(wire: Path) -> None:
    seeds = [vector["hex"] for vector in VECTORS["requests"]]
    (line,) = run_wire(wire, "fuzz", "100000", lines=seeds)
    accepted = int(line.split()[0])
    assert 1000 < accepted < 99_000  # Some got all the way through, some did not: both ways were tried.


REQUESTS = {
    "config": codec.encode_config(
        GuestConfig(
            "/workspace",
            "/e/p.sock",
            (Relay("127.0.0.1", 3128, None), Relay("127.77.0.2", 443, "a.example:443")),
        )
    ),
    "config with exec rules": codec.encode_config(
        GuestConfig("/w", exec_rules=ExecRules(("/bin/sh", "/lib/ld.so"), ("/etc",), ("/w", "/tmp")))
    ),
    "config without egress": codec.encode_config(GuestConfig("/w", observe_execs=False)),
    "spawn": codec.encode_spawn(
        7, Command(("sh", "", b"\xff"), ".", {"A": "b=c"}, b"abc", timeout_seconds=1.5)
    )[0],
    "data": codec.encode_data(8, b"\0\1"),
    "kill": codec.encode_kill(0xFFFFFFFF),
    "read": codec.encode_read(9, "a/b", 1 << 32, 10),
    "write": codec.encode_write(10, "x", b"hi", must_create=True)[0],
    "list": codec.encode_list(11, ".", is_recursive=True, skip_git=False, max_entries=5),
    "search": codec.encode_search(12, "^a+é", ".", 3),
}


@pytest.mark.parametrize("vector", of("requests"))
def test_python_writes_what_the_vectors_say(vector: dict[str, str]) -> None:
    assert REQUESTS[vector["name"]].hex() == vector["hex"]


@pytest.mark.parametrize("vector", of("replies"))
def test_python_reads_what_the_vectors_say(vector: dict[str, str]) -> None:
    ((kind, request_id, body),) = codec.FrameReader().feed(bytes.fromhex(vector["hex"]))
    assert repr(codec.decode_reply(kind, body)) == vector["reads"]
    assert request_id == (0 if vector["name"] == "ready" else 1)


@pytest.mark.parametrize("vector", of("replies"))
def test_a_reply_that_is_cut_or_continued_is_refused(vector: dict[str, str]) -> None:
    ((kind, _, body),) = codec.FrameReader().feed(bytes.fromhex(vector["hex"]))
    is_free = kind in (codec.Type.STDOUT, codec.Type.STDERR, codec.Type.CONTENT)
    if body:
        with pytest.raises(GuestError):
            codec.decode_reply(kind, body[:-1])
    with pytest.raises(GuestError):
        codec.decode_reply(kind, body + bytes(codec.CHUNK_MAX) if is_free else body + b"\0")


@given(kind=st.integers(0, 255), body=st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_body_is_read_or_refused(kind: int, body: bytes) -> None:
    try:
        codec.decode_reply(kind, body)
    except GuestError as error:
        assert "\n" not in str(error)


@given(
    index=st.integers(0, len(VECTORS["replies"]) - 1),
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    pieces=st.lists(st.integers(1, 20), max_size=10),
)
@settings(max_examples=500, deadline=None)
def test_any_stream_in_any_pieces_is_read_or_refused(
    index: int, edits: list[tuple[int, int]], pieces: list[int]
) -> None:
    stream = bytearray(bytes.fromhex(VECTORS["replies"][index]["hex"] * 2))
    for at, value in edits:
        stream[at % len(stream)] = value
    reader, at = codec.FrameReader(), 0
    try:
        for size in [*pieces, len(stream)]:
            for kind, _, body in reader.feed(bytes(stream[at : at + size])):
                codec.decode_reply(kind, body)
            at += size
    except GuestError:
        return


@given(st.lists(st.integers(1, 9), min_size=1))
def test_frames_come_out_whole_however_they_are_cut(pieces: list[int]) -> None:
    stream = b"".join(bytes.fromhex(vector["hex"]) for vector in VECTORS["replies"])
    reader, frames, at = codec.FrameReader(), [], 0
    while at < len(stream):
        size = pieces[at % len(pieces)]
        frames += [body for _, _, body in reader.feed(stream[at : at + size])]
        at += size
    assert len(frames) == len(VECTORS["replies"])


@pytest.mark.parametrize("length", [0, 4, codec.FRAME_MAX + 1, 0xFFFFFFFF])
def test_an_impossible_length_is_refused_before_anything_is_awaited(length: int) -> None:
    with pytest.raises(GuestError, match="a frame of"):
        list(codec.FrameReader().feed(struct.pack(">I", length)))


@pytest.mark.parametrize("path", [b"", b"/etc/passwd", b"a/../b", b"..", b"a//b", b".", b"a/"])
def test_a_path_that_could_lead_out_is_refused(path: bytes) -> None:
    body = struct.pack(">BQI", 0, 1, len(path) + 1) + path + b"\0"
    with pytest.raises(GuestError, match="not beneath"):
        codec.decode_reply(codec.Type.ENTRIES, body)


def exec_item(
    path: bytes = b"/p", found: bytes = b"", argv: tuple[bytes, ...] = (b"p",), cut: int = 0
) -> bytes:
    def blob(value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + value

    parts = (blob(path), blob(found), struct.pack(">I", len(argv)), *map(blob, argv))
    return struct.pack(">II", 7, 1) + b"".join(parts) + bytes([cut])


def test_execs_of_the_greatest_size_are_read() -> None:
    long = exec_item(
        b"p" * codec.EXEC_PATH_MAX, b"f" * codec.EXEC_PATH_MAX, (b"a" * codec.EXEC_ARG_MAX,) * 32, 1
    )
    reply = codec.decode_reply(codec.Type.EXECS, long + exec_item())
    assert isinstance(reply, codec.Execs)
    assert [len(seen.argv) for seen in reply.execs] == [32, 1]


@pytest.mark.parametrize(
    "body",
    [
        exec_item(b"p" * (codec.EXEC_PATH_MAX + 1)),
        exec_item(found=b"p" * (codec.EXEC_PATH_MAX + 1)),
        exec_item(argv=(b"a",) * (codec.EXEC_ARGS_MAX + 1)),
        exec_item(argv=(b"a" * (codec.EXEC_ARG_MAX + 1),)),
        exec_item(cut=2),
        exec_item()[:-1],
        exec_item() + b"\0",
        b"",
    ],
    ids=["path", "found", "arguments", "argument", "flag", "cut short", "left over", "empty"],
)
def test_execs_over_a_bound_are_refused(body: bytes) -> None:
    with pytest.raises(GuestError):
        codec.decode_reply(codec.Type.EXECS, body)


def test_untrusted_text_is_shown_on_one_line() -> None:
    assert codec.printable(b"a\x1b[31m\n\\\xff") == "a\\x1b[31m\\x0a\\x5c\\xff"
    assert len(codec.printable(b"a" * 10_000)) == 400
