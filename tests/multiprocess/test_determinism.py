"""The same job gives the same bits, whatever the shards, the workers, the threads and the order of frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.client.pulled import PulledModel
from ps.sharding import Chunk, make_plan
from ps.types import slot_range
from tests.multiprocess.conftest import MakeJob
from tests.support.altered import alter
from tests.support.cluster import Finished, make_job, train
from tests.support.delaying import DelayingTransport
from tests.support.shuffling import ShufflingTransport
from workers.engine.flat_model import FlatModel

STEPS = 16
JOB = (f"training.steps={STEPS}", "batch.contributions_per_step=4", "schedule.warmup_steps=4")


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The digest of one shard, one thread, one worker, everything in order."""

    @functools.lru_cache
    def digest_of(*overrides: str) -> str:
        one = ("cluster.shards=1", "cluster.workers=1")
        return train(make_job(tmp_path_factory.mktemp("plain") / "run", text, (*JOB, *overrides, *one))).digest()

    return digest_of


def shuffled(make_job: MakeJob, *overrides: str) -> Finished:
    """Run a job whose workers push out of order, late and twice."""
    transports: list[ShufflingTransport] = []

    def transport() -> ShufflingTransport:
        transports.append(ShufflingTransport(seed=len(transports)))
        return transports[-1]

    run = train(make_job("run", *JOB, *overrides), transport)
    assert sum(t.overtaken for t in transports) > STEPS
    assert sum(t.repeated for t in transports) > STEPS
    assert run.manifest().version == STEPS
    assert run.manifest().applied >= STEPS - 4
    return run


def cluster(shards: int, workers: int, threads: int) -> tuple[str, ...]:
    return (f"cluster.shards={shards}", f"cluster.workers={workers}", f"cluster.threads_per_shard={threads}")


def test_the_same_job_twice_has_one_digest(make_job: MakeJob, plain: Callable[..., str]) -> None:
    again = train(make_job("again", *JOB, *cluster(1, 1, 1)))
    other_seed = train(make_job("seed", *JOB, *cluster(1, 1, 1), "seed=2"))
    assert again.digest() == plain()
    assert other_seed.digest() != plain()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize(
    ("shards", "workers", "threads"), [(1, 2, 1), (1, 4, 2), (2, 1, 2), (2, 3, 1), (3, 2, 2), (3, 3, 1)]
)
def test_fp16_wire(
    make_job: MakeJob, plain: Callable[..., str], shards: int, workers: int, threads: int, transport: str
) -> None:
    run = shuffled(make_job, *cluster(shards, workers, threads), f"launch.transport={transport}")
    assert run.digest() == plain()


class Overlapped:
    """Counts how often a layer waited for its weights, and how many chunks were pushed before a backward ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits = 0
        self.early_chunks = 0
        has, finishing = PulledModel.has, FlatModel.finishing

        def counting_has(self_: PulledModel, version: int, chunks: Any, timeout_s: float = 0.0) -> bool:
            found = has(self_, version, chunks, timeout_s)
            self.waits += not found and chunks is not None and timeout_s == 0
            return found

        def counting_finishing(self_: FlatModel, on_chunk: Callable[[Chunk], None]) -> Any:
            def counting(chunk: Chunk) -> None:
                self.early_chunks += 1
                on_chunk(chunk)

            return finishing(self_, counting)

        monkeypatch.setattr(PulledModel, "has", counting_has)
        monkeypatch.setattr(FlatModel, "finishing", counting_finishing)


EAGER = ("precision.wire=fp32", "optimizer.clip_norm=0")


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("overrides", [(), EAGER], ids=["decided", "eager"])
def test_overlap_changes_no_bit(
    make_job: MakeJob,
    plain: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    overrides: tuple[str, ...],
) -> None:
    """Forwards begin before the pull ends, and chunks leave while backward runs, late and in any order."""
    counted = Overlapped(monkeypatch)
    delaying: list[DelayingTransport] = []

    def late() -> DelayingTransport:
        seed = len(delaying)
        delaying.append(DelayingTransport(ShufflingTransport(seed), seed))
        return delaying[-1]

    job = (*JOB, *overrides, *cluster(2, 2, 1), f"launch.transport={transport}", "evaluation.every_steps=5")
    run = train(make_job("run", *job), late)
    assert sum(each.delayed for each in delaying) > STEPS
    assert counted.waits > STEPS / 4
    assert counted.early_chunks > STEPS
    waits, early_chunks = counted.waits, counted.early_chunks
    without = train(make_job("without", *job, "worker.overlap=false"), late)
    assert (counted.waits, counted.early_chunks) == (waits, early_chunks)
    assert run.digest() == without.digest() == plain(*overrides)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("overrides", [(), EAGER], ids=["decided", "eager"])
def test_kernel_threads_change_no_bit(
    make_job: MakeJob, plain: Callable[..., str], overrides: tuple[str, ...], threads: int
) -> None:
    """One shard with more chunks than threads: they are reduced and updated at once, in any order."""
    run = shuffled(make_job, *overrides, *cluster(1, 2, threads))
    assert len(make_plan(run.manifest().table, 1).chunks) > threads
    assert run.digest() == plain(*overrides)


def make_order_matter(monkeypatch: pytest.MonkeyPatch, up: int, down: int) -> None:
    """Add so much to one contribution and take it from another that whatever is added in between is lost.

    Otherwise float64 would hide nearly every other order of FP32 values.
    """
    shifts = {up: 2.0**60, down: -(2.0**60)}
    alter(monkeypatch, lambda _step, contribution, _chunk, gradient: gradient.add_(shifts.get(contribution, 0.0)))


@pytest.mark.parametrize(("shards", "workers", "threads"), [(1, 4, 1), (2, 2, 2), (3, 3, 2)])
def test_fp32_wire(
    make_job: MakeJob,
    plain: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    workers: int,
    threads: int,
) -> None:
    make_order_matter(monkeypatch, 1, 3)
    wire = "precision.wire=fp32"
    assert shuffled(make_job, wire, *cluster(shards, workers, threads)).digest() == plain(wire)


@pytest.mark.parametrize("wire", ["fp16", "bf16", "fp32"])
def test_more_contributions_than_a_shard_keeps(
    make_job: MakeJob, plain: Callable[..., str], monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    """FP16 folds as contributions arrive, which is exact; BF16 and FP32 fold in the contributions' order."""
    if wire != "fp16":
        make_order_matter(monkeypatch, 2, 6)
    many = (f"precision.wire={wire}", "batch.contributions_per_step=8")
    assert shuffled(make_job, *many, *cluster(2, 3, 2)).digest() == plain(*many)


@pytest.mark.parametrize("contributions", [3, 4, 6, 10])
def test_the_mean_of_fp16_gradients_is_exact(make_job: MakeJob, contributions: int) -> None:
    """SGD's momentum after one step is m / loss scale: the sum in integers, divided once, rounded once."""
    slots, scale = 10, 1024.0
    job = make_job(
        "run",
        *cluster(2, 2, 2),
        "training.steps=1",
        f"batch.micro_batches_per_step={slots}",
        f"batch.contributions_per_step={contributions}",
        f"precision.loss_scale.static={scale}",
        "optimizer.name=sgd",
        "optimizer.clip_norm=0",
        "optimizer.weight_decay=0",
        # What is pushed is looked at on its way.
        "launch.transport=grpc",
    )
    transports = [ShufflingTransport(seed) for seed in range(2)]
    waiting = iter(transports)
    run = train(job, lambda: next(waiting))
    pushed = {key: payload for transport in transports for key, payload in transport.pushed.items()}
    plan = make_plan(run.manifest().table, job.cluster.shards)
    assert len(pushed) == contributions * len(plan.chunks)
    found = run.flat("momentum_buffer")
    for chunk in plan.chunks:
        total = np.zeros(chunk.size, np.int64)
        for contribution in range(contributions):
            # FP16 values are multiples of 2^-24.
            gradient = np.frombuffer(pushed[0, contribution, chunk.index], np.float16).astype(np.float64)
            total += len(slot_range(contribution, contributions, slots)) * (gradient * 2.0**24).astype(np.int64)
        mean = (total.astype(np.float64) * 2.0**-24 / slots).astype(np.float32)
        assert np.count_nonzero(mean) > chunk.size // 2
        np.testing.assert_array_equal(found[chunk.start : chunk.stop], mean / np.float32(scale))
