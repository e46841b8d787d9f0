"""Which contributions are folded when: bookkeeping, and with real kernels the bits that come out."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from ps.shard.reduction import FAN_IN, ChunkReduction, FoldJob, Held, ReduceJob, ReductionJob
from ps.sharding import make_plan
from ps.types import WireDtype
from tests.support.plans import table_of
from tests.support.shards import Rig, in_threads, make_config, rig, widen

CHUNK = make_plan(table_of([1000]), 1).chunks[0]


def held(contribution: int, slots: int = 1) -> Held:
    return Held(contribution, slots, np.zeros(1))


def run_all(reduction: ChunkReduction, job: ReductionJob | None) -> list[ReductionJob]:
    """Carry out a job and all that follow it."""
    jobs = []
    while job is not None:
        jobs.append(job)
        job = reduction.done(job)
    return jobs


def contributions_of(job: ReductionJob) -> list[int]:
    return [one.contribution for one in job.held]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("contributions", range(1, 13))
def test_every_contribution_is_added_once(contributions: int, exact: bool) -> None:
    for seed in range(20):
        order = list(range(contributions))
        random.Random(seed).shuffle(order)
        reduction = ChunkReduction(CHUNK, contributions, exact)
        jobs: list[ReductionJob] = []
        for count, contribution in enumerate(order, 1):
            assert not reduction.complete
            jobs += run_all(reduction, reduction.add(held(contribution), b"", b""))
            assert reduction.reduced == (count == contributions)
        assert [type(job) for job in jobs] == [FoldJob] * (len(jobs) - 1) + [ReduceJob]
        assert all(len(job.held) <= FAN_IN for job in jobs)
        added = [contribution for job in jobs for contribution in contributions_of(job)]
        assert sorted(added) == list(range(contributions))
        if not exact:
            assert added == list(range(contributions))


def test_up_to_four_stay_as_received() -> None:
    reduction = ChunkReduction(CHUNK, 6, exact=True)
    for contribution in range(4):
        assert reduction.add(held(contribution), b"", b"") is None
    job = reduction.add(held(4), b"", b"")
    assert isinstance(job, FoldJob)
    assert contributions_of(job) == [0, 1, 2, 3]


def test_one_job_at_a_time() -> None:
    reduction = ChunkReduction(CHUNK, 12, exact=True)
    jobs = [reduction.add(held(contribution), b"", b"") for contribution in range(12)]
    assert [job is None for job in jobs] == [True] * 4 + [False] + [True] * 7
    following = run_all(reduction, jobs[4])
    assert [len(job.held) for job in following] == [4, 4, 4]
    assert reduction.reduced


def test_without_exactness_what_came_early_waits_for_its_turn() -> None:
    reduction = ChunkReduction(CHUNK, 7, exact=False)
    for contribution in (6, 5, 4, 3, 2):
        assert reduction.add(held(contribution), b"", b"") is None
    assert reduction.add(held(1), b"", b"") is None
    job = reduction.add(held(0), b"", b"")
    assert isinstance(job, FoldJob)
    assert contributions_of(job) == [0, 1, 2, 3]
    last = reduction.done(job)
    assert isinstance(last, ReduceJob)
    assert contributions_of(last) == [4, 5, 6]


def test_a_run_is_present_when_any_contribution_has_it() -> None:
    reduction = ChunkReduction(CHUNK, 2, exact=True)
    reduction.add(held(0), b"", b"\x01\x80")
    reduction.add(held(1), b"", b"\x02\x80")
    assert reduction.present == 0x8003


# -- With real kernels --------------------------------------------------------------------------

SLOTS = 13


def reduce_in(shard: Rig, orders: list[list[int]]) -> list[tuple[bytes, tuple[float, ...]]]:
    """Push one step in each of these orders of arrival, and return m and the statistics each time.

    The gradients of every step are those of step 0.
    """
    (chunk,) = shard.chunks
    results = []
    for order in orders:
        for contribution in order:
            shard.engine.push(*shard.push(contribution, chunk, shard.gradient(0, contribution, chunk)))
        report = shard.told.next_prepared()
        results.append((shard.engine.store.mean(chunk).tobytes(), report.square_sums))
        shard.skip_step()
    return results


def random_orders(contributions: int, count: int) -> list[list[int]]:
    orders = [list(range(contributions)), list(reversed(range(contributions)))]
    for seed in range(count):
        orders.append(list(range(contributions)))
        random.Random(seed).shuffle(orders[-1])
    return orders


@pytest.mark.parametrize("wire", ["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("contributions", range(1, 13))
def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, contributions: int, wire: str) -> None:
    config = make_config(tmp_path, SLOTS, wire, threads=2)
    with rig(config, contributions, table=table_of([2000])) as shard:
        results = reduce_in(shard, random_orders(contributions, 4))
        assert len(set(results)) == 1
        (chunk,) = shard.chunks
        total = np.zeros(chunk.size, np.float64)
        for contribution in range(contributions):
            gradient = shard.gradient(0, contribution, chunk)
            total += shard.slots(contribution) * widen(gradient, WireDtype(wire))
        assert results[0][0] == (total / SLOTS).astype(np.float32).tobytes()


def test_in_fp32_the_order_of_the_sum_matters(tmp_path: Path) -> None:
    """So that the test above can fail: these gradients have other sums in another order."""
    with rig(make_config(tmp_path, SLOTS, "fp32"), 12, table=table_of([2000])) as shard:
        (chunk,) = shard.chunks
        gradients = [shard.gradient(0, c, chunk).astype(np.float64) * shard.slots(c) for c in range(12)]
        assert (sum(gradients) != sum(reversed(gradients))).any()


@pytest.mark.parametrize("wire", ["fp16", "fp32"])
def test_streams_at_once(tmp_path: Path, wire: str) -> None:
    """Several threads push at once, each frame twice, while kernels run on two threads."""
    contributions = 9
    with rig(make_config(tmp_path, SLOTS, wire, threads=2), contributions) as shard:
        for _ in range(5):
            pushes = shard.pushes() * 2
            random.Random(shard.state.version).shuffle(pushes)

            def stream(part: int, pushes: list = pushes) -> None:
                for push in pushes[part::3]:
                    shard.engine.push(*push)

            in_threads(*(lambda part=part: stream(part) for part in range(3)))
            report = shard.told.next_prepared()
            for chunk in shard.chunks:
                np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))
            shard.tell(shard.decision(report))
            assert shard.told.prepared.empty()
