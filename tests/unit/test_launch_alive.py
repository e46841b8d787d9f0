"""Whose processes are those of a run: a number in cluster.json alone says nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from workers.launch.alive import alive
from workers.launch.folder import RunFolder

COORDINATOR, OTHER = "127.0.0.1:7000", "127.0.0.1:7001"
START = Callable[..., int]


@pytest.fixture
def start() -> Iterator[START]:
    """Starts a process with these words in its command line, which does nothing."""
    started = []

    def start(*words: str, cwd: Path | None = None) -> int:
        command = [sys.executable, "-c", "input()", *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=cwd)
        started.append(process)
        # A process has no command line while its program is being loaded.
        eventually(Path(f"/proc/{process.pid}/cmdline").read_bytes, 10.0, "its command line")
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def role(name: str, *words: str) -> list[str]:
    return ["-m", "workers.cli.main", name, *words]


def found(run: Path, role: str, rank: int, pid: int, host: str = "") -> list[str]:
    """Who is alive of a coordinator that is not there, and this member."""
    here = host or socket.gethostname()
    run.mkdir(exist_ok=True)
    members = [
        {"role": "coordinator", "rank": 0, "pid": 0, "host": here, "address": COORDINATOR},
        {"role": role, "rank": rank, "pid": pid, "host": here, "address": "127.0.0.1:1"},
    ]
    (run / "cluster.json").write_text(json.dumps(members))
    return [str(process) for process in alive(RunFolder(run))]


def test_members_are_known_by_their_command_lines(start: START, tmp_path: Path) -> None:
    shard = start(*role("shard", "--coordinator", COORDINATOR, "--index", "1"))
    assert found(tmp_path, "shard", 1, shard) == [f"shard 1 (pid {shard})"]
    # The second process of a shard has the same command line.
    assert found(tmp_path, "standby", 1, shard) == [f"standby 1 (pid {shard})"]
    worker = start(*role("worker", "--coordinator", COORDINATOR, "--rank", "0"))
    assert found(tmp_path, "worker", 0, worker) == [f"worker 0 (pid {worker})"]


def test_a_coordinator_is_known_by_its_job_wherever_it_was_started(start: START, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    pid = start(*role("coordinator", "runs/a/config.json", "--listen", "127.0.0.1:0"), cwd=tmp_path)
    assert found(run, "coordinator", 0, pid) == [f"coordinator 0 (pid {pid})"]
    assert found(tmp_path / "b", "coordinator", 0, pid) == []


def test_nobody_else_is_taken_for_one(start: START, tmp_path: Path) -> None:
    other_run = start(*role("shard", "--coordinator", OTHER, "--index", "1"))
    other_index = start(*role("shard", "--coordinator", COORDINATOR, "--index", "11"))
    other_role = start(*role("worker", "--coordinator", COORDINATOR, "--rank", "1"))
    of_that_name = start("/home/x/windlass-notes.txt")
    bare = start("-m", "workers.cli.main")
    for pid in (other_run, other_index, other_role, of_that_name, bare):
        assert found(tmp_path, "shard", 1, pid) == []
        assert found(tmp_path, "coordinator", 0, pid) == []


def test_the_number_of_a_process_on_another_host_is_not_looked_up(start: START, tmp_path: Path) -> None:
    pid = start(*role("shard", "--coordinator", COORDINATOR, "--index", "1"))
    assert found(tmp_path, "shard", 1, pid, host="elsewhere") == []
