"""A controller's name: it tells a live process from a dead one and from a later one with its pid."""

from __future__ import annotations

import os
import subprocess
import sys

from sandbox.provenance.owner import current_owner, is_owner_alive


def test_this_process_is_alive_under_its_own_name() -> None:
    owner = current_owner()
    assert is_owner_alive(owner)
    assert is_owner_alive(owner + "\n")
    assert owner.split(":")[-2] == str(os.getpid())


def test_a_process_that_ended_is_not_alive_though_it_was() -> None:
    code = "from sandbox.provenance.owner import current_owner; print(current_owner(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        owner = child.stdout.readline()
        assert is_owner_alive(owner)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_owner_alive(owner)  # dead and not reaped yet: a corpse
    assert not is_owner_alive(owner)


def test_another_start_time_or_boot_is_another_process() -> None:
    host, boot, pid, start = current_owner().rsplit(":", 3)
    assert not is_owner_alive(f"{host}:{boot}:{pid}:{int(start) + 1}")
    assert not is_owner_alive(f"{host}:another-boot:{pid}:{start}")
    assert not is_owner_alive(f"{host}:{boot}:{2**22 + 1}:{start}")
    assert not is_owner_alive(f"{host}:{boot}:{2**22 + 1}:")


def test_a_process_of_another_host_counts_as_alive() -> None:
    assert is_owner_alive("elsewhere:boot:1:1")


def test_nonsense_names_nobody() -> None:
    for owner in ("", "x", "a:b:c:d", ":::"):
        assert not is_owner_alive(owner)
