"""Standbys in real processes: a shard dies, its standby takes over, and no step is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import endless
from windlass.testing import LocalCluster
from workers.launch.folder import RunFolder

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

#: No checkpoint to go back to but the first.
STANDING_BY = ("cluster.standbys=1", "checkpoint.every_steps=0")

Script = Iterator[Callable[[], bool]]


def run(run_dir: Path, script: Script, *overrides: str) -> int:
    """Train while a script is carried out, which goes on once something holds; returns how many steps there were."""
    holds = [next(script)]

    def until(_cluster: LocalCluster) -> bool:
        while holds and holds[0]():
            holds[:] = [step for step in [next(script, None)] if step is not None]
        return not holds

    return endless.run(run_dir, *STANDING_BY, *overrides, until=until)


def kill(run_dir: Path, role: str, rank: int) -> None:
    """SIGKILL whoever is that now: the two processes of a shard change places."""
    (pid,) = [m["pid"] for m in RunFolder(run_dir).members() if (m["role"], m["rank"]) == (role, rank)]
    os.kill(pid, signal.SIGKILL)


def said(run_dir: Path, text: str, times: int) -> Callable[[], bool]:
    """Whether the coordinator has said something so often."""
    return lambda: log_of(run_dir).count(text) >= times


def log_of(run_dir: Path) -> str:
    return RunFolder(run_dir).log("coordinator-0").read_text()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_standby_takes_over_without_a_step_lost(tmp_path: Path, transport: str) -> None:
    run_dir = tmp_path / "run"

    def script() -> Script:
        in_sync = "standby 0 holds the same as shard 0"
        yield said(run_dir, in_sync, 1)
        kill(run_dir, "shard", 0)
        # Whom it is started again as stands by for the one that took over.
        yield said(run_dir, in_sync, 2)
        kill(run_dir, "shard", 0)
        yield said(run_dir, "standby 0 takes over as shard 0", 2)

    steps = run(run_dir, script(), f"launch.transport={transport}")
    log = log_of(run_dir)
    assert log.count("standby 0 takes over as shard 0") == 2
    assert "going back" not in log
    assert "the cluster is made to serve again" in log
    recorded = map(json.loads, RunFolder(run_dir).metrics.read_text().splitlines())
    assert [line["step"] for line in recorded if line["kind"] == "step"] == list(range(steps))


def test_a_standby_that_dies_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def script() -> Script:
        in_sync = "standby 1 holds the same as shard 1"
        yield said(run_dir, in_sync, 1)
        kill(run_dir, "standby", 1)
        yield said(run_dir, in_sync, 2)

    run(run_dir, script())
    assert "takes over" not in log_of(run_dir)
