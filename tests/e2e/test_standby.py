"""Standbys in real processes: a shard dies, its standby takes over, and no step is lost."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.launched import LaunchedRun, launched, tiny_job, train

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

STEPS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("standby")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    return train(folder, "undisturbed", f"training.steps={STEPS}").digest()


def standing_by(folder: Path, name: str, *overrides: str) -> AbstractContextManager[LaunchedRun]:
    """A run with standbys, and no checkpoint to go back to but the first."""
    never = f"checkpoint.every_steps={STEPS}"
    job = tiny_job(folder, name, f"training.steps={STEPS}", "cluster.standbys=1", never, *overrides)
    return launched("train", folder / name, job)


def log_of(run: LaunchedRun) -> str:
    path = run.run_dir / "logs" / "coordinator-0.log"
    return path.read_text() if path.exists() else ""


def await_standby(run: LaunchedRun, shard: int, times: int = 1) -> None:
    text = f"standby {shard} holds the same as shard {shard}"
    eventually(lambda: log_of(run).count(text) >= times, 60.0, f"{times} times: {text}")


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_standby_takes_over_without_a_step_lost(folder: Path, undisturbed: str, transport: str) -> None:
    with standing_by(folder, f"shard-{transport}", f"launch.transport={transport}") as run:
        await_standby(run, 0)
        run.kill("shard", 0)
        # Whom it is started again as stands by for the one that took over.
        await_standby(run, 0, times=2)
        run.kill("shard", 0)
        assert run.finish() == 0, run.output()
        assert run.digest() == undisturbed
        log = log_of(run)
        assert len(re.findall("standby 0 takes over as shard 0", log)) == 2
        assert "going back" not in log
        assert "the cluster is made to serve again" in log
        steps = [line["step"] for line in run.metrics() if line["kind"] == "step"]
        assert steps == list(range(STEPS))


def test_a_standby_that_dies_is_replaced(folder: Path, undisturbed: str) -> None:
    with standing_by(folder, "standby") as run:
        await_standby(run, 1)
        run.kill("standby", 1)
        await_standby(run, 1, times=2)
        assert run.finish() == 0, run.output()
        assert run.digest() == undisturbed
        assert "takes over" not in log_of(run)
