"""Try ways past the gateway out of a network namespace, and say what met each. Runs inside containers.

usage: way_out.py [--world] ATTEMPTS   (JSON: a list of [kind, destination])

With ``--world``, as root in a namespace of its own, every destination is made first: the address on the
loopback device, and somebody who answers there. What succeeds then shows that the attempt is a real one.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time

SECONDS = 8
PAYLOAD = b"c2VjcmV0"
SIOCSIFADDR, SIOCSIFFLAGS = 0x8916, 0x8914
PORTS = {"tcp": socket.SOCK_STREAM, "tcp6": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def main():
    is_world = sys.argv[1] == "--world"
    attempts = [tuple(attempt) for attempt in json.loads(sys.argv[-1])]
    if is_world:
        make_world(attempts)
    for kind, destination in attempts:
        begun = time.monotonic()
        outcome = attempt_one(kind, destination)
        print(
            json.dumps([kind, destination, outcome, round((time.monotonic() - begun) * 1000, 1)]), flush=True
        )


def attempt_one(kind, destination):
    """Return ``reached``, ``silent`` (nothing came in time), or the name of the error."""
    try:
        return WAYS[kind](destination)
    except socket.gaierror as exc:
        names = {v: k for k, v in vars(socket).items() if k.startswith("EAI_")}
        return names.get(exc.errno, str(exc))
    except TimeoutError as exc:
        return "silent" if exc.errno is None else "ETIMEDOUT"
    except OSError as exc:
        return errno.errorcode.get(exc.errno, str(exc))


def over_port(kind):
    def attempt(destination):
        host, port = split(destination)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, PORTS[kind]) as one:
            one.settimeout(SECONDS)
            one.connect((host, port))
            one.send(PAYLOAD)
            return "reached" if one.recv(64) else "closed"

    return attempt


def ping(destination):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as one:
        return echo(one, destination)


def ping_without_raw(destination):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as one:
        return echo(one, destination)


def echo(one, destination):
    one.settimeout(SECONDS)
    head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
    total = sum(struct.unpack("!4H", head))
    total = (total >> 16) + (total & 0xFFFF)
    one.sendto(head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:], (destination, 1))
    return "reached" if one.recv(1024) else "closed"


def abstract(destination):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(SECONDS)
        one.connect("\0" + destination[1:])
        return "reached" if one.recv(64) else "closed"


def resolve(name):
    return "reached" if socket.getaddrinfo(name, 443) else "closed"


WAYS = {
    **{kind: over_port(kind) for kind in PORTS},
    "icmp": ping,
    "icmp-dgram": ping_without_raw,
    "unix-abstract": abstract,
    "resolve": resolve,
}


def make_world(attempts):
    with socket.socket() as one:
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", 0x41))  # up and running
    if any(kind == "resolve" for kind, _ in attempts):
        serve(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53))
    for kind, destination in dict.fromkeys(attempts):
        if kind == "unix-abstract":
            serve(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + destination[1:])
        elif kind != "resolve":
            host, port = split(destination) if kind in PORTS else (destination, None)
            give_address(host)
            if port is not None:
                serve(socket.AF_INET6 if ":" in host else socket.AF_INET, PORTS[kind], (host, port))


def give_address(host, given=[]):  # noqa: B006
    if host in given or host.startswith("127."):
        return
    given.append(host)
    if ":" in host:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
            address = socket.inet_pton(socket.AF_INET6, host)
            fcntl.ioctl(one, SIOCSIFADDR, struct.pack("16sIi", address, 128, socket.if_nametoindex("lo")))
        wait_for_address(host)
    else:
        with socket.socket() as one:
            name, address = f"lo:{len(given)}".encode(), socket.inet_aton(host)
            fcntl.ioctl(one, SIOCSIFADDR, struct.pack("16sHH4s8x", name, socket.AF_INET, 0, address))


def wait_for_address(host):
    """An IPv6 address can be used once the kernel has found nobody else who has it."""
    for _ in range(100):
        try:
            with socket.socket(socket.AF_INET6) as one:
                one.bind((host, 0))
                return
        except OSError:
            time.sleep(0.02)


def serve(family, kind, address, served=[]):  # noqa: B006
    if (family, kind, address) in served:
        return
    served.append((family, kind, address))
    one = socket.socket(family, kind)
    one.bind(address)
    if kind == socket.SOCK_STREAM:
        one.listen()

    def accept():
        while True:
            connection, _ = one.accept()
            connection.sendall(b"here")
            served.append(connection)  # kept open

    def receive():
        while True:
            data, sender = one.recvfrom(2048)
            one.sendto(b"here" if data.startswith(PAYLOAD) else name_server(data), sender)

    threading.Thread(target=accept if kind == socket.SOCK_STREAM else receive, daemon=True).start()


def name_server(query):
    """Answer a question for an IPv4 address with one, and any other with none."""
    end = query.index(b"\0", 12) + 5
    is_a = query[end - 4 : end - 2] == b"\0\1"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1" if is_a else b""
    return query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0" + query[12:end] + answer


def split(destination):
    host, _, port = destination.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    main()
