"""durability=journal in real processes: whichever shards are killed, the run never goes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import windlass
from ps.storage import Journal, newest
from ps.storage.digest import digest
from windlass.testing import LocalCluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

STEPS = 40
#: Three segments, so two shards.
SIZE = 140_000
JOB = (
    f"training.steps={STEPS}",
    "batch.micro_batches_per_step=4",
    "batch.contributions_per_step=2",
    "schedule.warmup_steps=0",
    "membership.lease_s=60",
    "telemetry.metrics=false",
)
DECIDED = ("precision.wire=fp16",)
#: Updated chunk by chunk, before the decision.
EAGER = ("precision.wire=fp32", "optimizer.clip_norm=0")

ONE = (("shard", 0),)
BOTH = (*ONE, ("shard", 1))
#: The worker is the test.
EVERYBODY = (*BOTH, ("coordinator", 0))

Doing = Callable[[LocalCluster, int], None]


def train(run_dir: Path, overrides: Sequence[str], on_work: Doing = lambda _cluster, _step: None) -> str:
    """Fit a line in numpy, and do something whenever there is work; returns the digest of the end."""
    target = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    with LocalCluster(*JOB, *overrides, shards=2, run_dir=run_dir) as cluster:
        with windlass.Client.connect(cluster.address, {"w": np.zeros(SIZE, np.float32)}) as client:
            for work in client:
                on_work(cluster, work.step)
                error = work.weights["w"] - target
                noise = np.random.default_rng((work.step, work.slots.start)).standard_normal(SIZE, np.float32)
                client.push(work, {"w": len(work.slots) * (error + noise)}, float(np.mean(error**2)))
        cluster.wait(60.0)
    checkpoint = newest(run_dir / "checkpoints")
    assert checkpoint is not None
    return digest(checkpoint)


def kill_at(steps: Sequence[int], roles: Sequence[tuple[str, int]]) -> tuple[Doing, list[int]]:
    """Kill these, all before any is started again, once at each of these steps; returns whom, too."""
    killed: list[int] = []
    left = list(steps)

    def kill(cluster: LocalCluster, step: int) -> None:
        if left and step >= left[0]:
            left.pop(0)
            killed.extend(cluster.kill(*role, restart=False) for role in roles)
            for role in roles:
                cluster.start(*role)

    return kill, killed


def rollbacks(run_dir: Path) -> list[int]:
    """The versions to which a run went back; the first is its beginning."""
    with Journal.open(run_dir / "journal") as journal:
        return [record["version"] for record in journal.records if record["type"] == "rollback"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[Sequence[str], str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {kind: train(folder / f"run-{number}", kind) for number, kind in enumerate((DECIDED, EAGER))}


@pytest.mark.parametrize("roles", [ONE, BOTH, EVERYBODY], ids=["one", "both", "everybody"])
@pytest.mark.parametrize("kind", [DECIDED, EAGER], ids=["decided", "eager"])
def test_killed_shards_lose_no_step(
    tmp_path: Path, undisturbed: dict[Sequence[str], str], kind: Sequence[str], roles: Sequence[tuple[str, int]]
) -> None:
    kill, killed = kill_at([12, 25], roles)
    # The second death is behind a checkpoint that the journal asked for.
    journal = ("durability=journal", "journal.max_bytes=4_000_000")
    assert train(tmp_path / "run", [*kind, *journal], kill) == undisturbed[kind]
    assert len(killed) == 2 * len(roles)
    assert rollbacks(tmp_path / "run") == [0]
