"""The job of `kneading` for as long as a test needs it, with real processes that it may kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.support import kneading
from tests.support.cluster import Finished
from windlass.testing import LocalCluster

JOB = (*kneading.JOB, "training.steps=1_000_000", "launch.restart_limit=100")
#: Whoever has died is back within this, and the run saved.
BACK_S = 60.0


def run(run_dir: Path, *overrides: str, until: Callable[[LocalCluster], bool]) -> int:
    """Run the job until something holds; the digest is that of as many steps that nothing happened to.

    Args:
        until: asked at each step, by the run's only worker.

    Returns:
        How many steps there were.
    """
    with LocalCluster(*JOB, *overrides, shards=2, run_dir=run_dir) as cluster:

        def on_step(_step: int) -> None:
            # Or training would run on for as long as a standby takes to start.
            cluster.wait_until_complete(BACK_S)
            if until(cluster):
                stop(cluster)

        kneading.work(cluster.address, on_step)
        cluster.wait(BACK_S)
    return assert_unchanged(cluster)


def stop(cluster: LocalCluster) -> None:
    """Have the run saved where it is, and end. A coordinator that dies before that has to be asked again."""
    os.kill(cluster.pids["coordinator-0"], signal.SIGTERM)


def assert_unchanged(cluster: LocalCluster) -> int:
    """The digest is that of as many steps in a loop; returns how many that are."""
    ended = Finished(cluster.job)
    version = int(ended.manifest().version)
    assert ended.digest() == kneading.digest(cluster.job, version)
    return version
