"""The tie between a role and its launcher, and the one exec of a role that is started by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ps.lifeline import ENVIRONMENT, Lifeline
from workers.launch.environment import MALLOC_TUNABLES, on_glibc

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(30)]

STUBBORN = """
import threading
from ps.lifeline import watch
import sys
watch(int(sys.argv[1]), lambda: print("gone", flush=True), grace_s=0.3)
print("up", flush=True)
threading.Event().wait()
"""


def test_a_process_that_does_not_end_by_itself_is_ended() -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(reader)], pass_fds=[reader], stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(reader)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert process.poll() is None
        start = time.monotonic()
        os.close(writer)
        assert process.stdout.readline() == "gone\n"
        assert process.wait(timeout=5) == 1
        assert 0.2 < time.monotonic() - start < 5


def test_a_failing_callback_does_not_keep_a_process_alive() -> None:
    reader, writer = os.pipe()
    code = STUBBORN.replace('print("gone", flush=True)', "1 / 0")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(reader)],
        pass_fds=[reader],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        os.close(reader)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.close(writer)
        assert process.wait(timeout=5) == 1


def test_no_lifeline_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert Lifeline.from_environment() is None
    # What is left over of another process's environment names no descriptor here.
    for leftover in ("987654", "x"):
        monkeypatch.setenv(ENVIRONMENT, leftover)
        assert Lifeline.from_environment() is None
        assert ENVIRONMENT not in os.environ


ENTER = """
import os
from ps.types import Role
from workers.launch.environment import enter
print("pass", os.getpid(), flush=True)
enter(Role.SHARD)
print("in", os.getpid(), os.environ.get("GLIBC_TUNABLES"), os.environ["NUMBA_NUM_THREADS"], flush=True)
print([name for name in os.environ if "REEXEC" in name])
"""


def enter(**environment: str) -> list[list[str]]:
    clean = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "NUMBA_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", ENTER],
        env={**clean, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(not on_glibc(), reason="only glibc has tunables")
def test_a_role_started_by_hand_gets_its_malloc_by_one_exec_in_the_same_process() -> None:
    first, second, entered, leftovers = enter()
    assert first == second
    assert entered == ["in", first[1], MALLOC_TUNABLES, "1"]
    assert leftovers == ["[]"]


def test_a_role_whose_malloc_is_chosen_is_left_alone() -> None:
    first, entered, _ = enter(GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert entered == ["in", first[1], "glibc.malloc.arena_max=2", "1"]


POLICY = """
import os, sys
from ps.types import Role
from workers.launch.environment import enter
before, role = sys.argv[1:]
os.sched_setscheduler(0, int(before), os.sched_param(0))
enter(Role(role))
print(os.sched_getscheduler(0))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_roles_that_move_tensors_are_batch_work_unless_the_user_has_said_what_they_are() -> None:
    def policy(before: int, role: str) -> int:
        command = [sys.executable, "-c", POLICY, str(before), role]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert policy(os.SCHED_OTHER, "shard") == policy(os.SCHED_OTHER, "worker") == os.SCHED_BATCH
    assert policy(os.SCHED_OTHER, "coordinator") == os.SCHED_OTHER
    assert policy(os.SCHED_IDLE, "shard") == os.SCHED_IDLE
