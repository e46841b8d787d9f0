"""Slow workers, late contributions, and how many workers there may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ps.coordinator.actions import TellDeal
from ps.coordinator.dealing import LATE_S, Dealing
from ps.coordinator.pace import Pace
from ps.errors import ConfigError
from ps.types import Role
from tests.support.fake_run import FakeRun, make_config

CONTRIBUTIONS = 8


def straggling(
    tmp_path: Path, workers: int = 4, steps: int = 60, contributions: int = CONTRIBUTIONS, **membership: Any
) -> FakeRun:
    run = FakeRun(
        make_config(
            tmp_path,
            workers=workers,
            batch={"micro_batches_per_step": contributions, "contributions_per_step": contributions},
            training={"steps": steps},
            checkpoint={"every_steps": 0},
            membership={"duplicate_late": True, **membership},
        )
    )
    run.everybody()
    # In the steps before nothing took any time, which says nothing: the open one is dealt anew.
    run.run_to(1)
    run.machine.steps.dealing = Dealing(contributions)
    run.machine.steps.pace, run.machine.steps.duplicated = Pace(), 0
    run.log.clear()
    run.step()
    return run


def told(run: FakeRun, step: int) -> list[TellDeal]:
    return [tell for tell in run.of(TellDeal) if tell.state.version == step]


def heard(run: FakeRun, rank: int, step: int, finished: Sequence[int] = ()) -> list[int]:
    """What a worker has to do, as it was told."""
    held: list[int] = []
    for tell in told(run, step):
        if tell.worker == rank:
            held.extend(unit for unit in tell.contributions if unit not in held)
            held = [unit for unit in held if unit not in tell.done]
    return [unit for unit in held if unit not in finished]


def make_step(run: FakeRun, seconds: dict[int, float], tick: float = 0.02) -> float:
    """Workers take their time for each contribution; returns the seconds of the step."""
    machine, step, began = run.machine, run.machine.state.version, run.now
    #: What each worker is at, and when it will be through with it.
    at: dict[int, tuple[int, float]] = {}
    finished: dict[int, list[int]] = {rank: [] for rank in run.workers}
    while machine.state.version == step:
        assert run.now - began < 100.0, machine.waiting_for(run.now)
        for rank, worker in run.workers.items():
            held = heard(run, rank, step, finished[rank])
            unit, due = at.get(rank, (-1, 0.0))
            if unit in held and run.now >= due:
                finished[rank].append(unit)
                run.contribute(worker, step, unit)
                held = heard(run, rank, step, finished[rank])
            if held and unit != held[0]:
                at[rank] = (held[0], run.now + seconds[rank])
        for shard in run.shards.values():
            run.report(shard)
        run.step(tick)
    return run.now - began


SLOW = {0: 1.0, 1: 1.0, 2: 1.0, 3: 4.0}


@pytest.mark.parametrize("balance", ["even", "speed"])
def test_one_slow_worker_costs_little(tmp_path: Path, balance: str) -> None:
    """Three fast workers need three rounds for eight contributions, whatever the slow one does."""
    run = straggling(tmp_path, balance=balance)
    assert make_step(run, SLOW) < 3.7, "nobody knows anything yet"
    seconds = [make_step(run, SLOW) for _ in range(30)]
    assert sorted(seconds)[len(seconds) // 2] < 3.1
    # Now and then the slow one is given a chance.
    assert max(seconds) < 3.7


def test_without_duplicates_the_slow_one_is_waited_for(tmp_path: Path) -> None:
    run = straggling(tmp_path, duplicate_late=False)
    assert make_step(run, SLOW) == pytest.approx(8.0, abs=0.2)
    assert make_step(run, SLOW) == pytest.approx(8.0, abs=0.2)
    assert run.machine.steps.duplicated == 0


def test_by_speed_the_slow_one_is_dealt_what_it_can_do(tmp_path: Path) -> None:
    run = straggling(tmp_path, balance="speed", duplicate_late=False)
    make_step(run, {**SLOW, 3: 2.0})
    step = run.machine.state.version
    make_step(run, {**SLOW, 3: 2.0})
    assert {tell.worker: len(tell.contributions) for tell in told(run, step)} == {0: 3, 1: 2, 2: 2, 3: 1}


def test_a_slow_worker_that_is_fast_again_is_dealt_its_share_again(tmp_path: Path) -> None:
    run = straggling(tmp_path, balance="speed")
    for _ in range(3):
        make_step(run, SLOW)
    fast = dict.fromkeys(range(4), 1.0)
    seconds = [make_step(run, fast) for _ in range(40)]
    assert seconds[-1] == pytest.approx(2.0, abs=0.2)


def test_workers_that_are_alike_compute_nothing_twice(tmp_path: Path) -> None:
    run = straggling(tmp_path, balance="speed")
    for number in range(20):
        make_step(run, {rank: 1.0 + 0.1 * ((rank + number) % 4) for rank in range(4)})
    assert run.machine.steps.duplicated == 0


def test_who_is_still_at_it_hears_that_it_is_done_and_it_counts_once(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=2)
    step, machine = run.machine.state.version, run.machine
    run.step(1.0)
    for unit in machine.steps.dealing.outstanding(0):
        run.contribute(run.workers[0], step, unit)
        run.step(0.01)
    run.step(2.0 + LATE_S)
    # The last unit of worker 1, which has done nothing.
    given = [(tell.worker, tell.contributions) for tell in told(run, step)]
    assert given[-2:] == [(0, (7,)), (0, (6,))], "and then the one that it will come to next"
    assert "worker 0 (contributions 6, 7)" in machine.waiting_for(run.now)
    assert "worker 1 (contributions 4, 5, 6, 7)" in machine.waiting_for(run.now)
    run.contribute(run.workers[0], step, 7)
    run.step(0.01)
    (left,) = [tell for tell in told(run, step) if tell.done]
    assert (left.worker, left.done, left.contributions) == (1, (7,), ())
    before = dict(machine.steps._timings._by_rank)
    run.contribute(run.workers[1], step, 7)
    assert machine.steps._timings._by_rank == before, "counted once"
    # It comes back to what it has not done, and to that only.
    assert machine.steps.outstanding(1)[0] == (4, 5, 6)


def test_what_is_late_before_the_step_begins_is_told_beside_what_a_worker_owns(tmp_path: Path) -> None:
    """One contribution each, and one worker so slow that the other one is given both at once."""
    run = straggling(tmp_path, workers=2, contributions=2)
    slow = {0: 9.0, 1: 1.0}
    make_step(run, slow)
    make_step(run, slow)
    assert heard(run, 1, run.machine.state.version) == run.machine.steps.dealing.outstanding(1) == [1, 0]
    assert make_step(run, slow) == pytest.approx(2.0, abs=0.2)


def test_who_joins_in_the_middle_of_a_step_helps_at_once(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=1)
    make_step(run, {0: 1.0})
    step = run.machine.state.version
    run.step(0.5)
    newcomer = run.join_worker()
    run.step(0.5)
    assert newcomer.rank == 1
    assert [tell.contributions for tell in told(run, step) if tell.worker == 1][-1] == (7,)
    assert make_step(run, {0: 1.0, 1: 1.0}) < 5.0
    assert make_step(run, {0: 1.0, 1: 1.0}) == pytest.approx(4.0, abs=0.2)


def test_a_stalled_owner_dies_after_somebody_else_was_given_its_work(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=2)
    make_step(run, {0: 1.0, 1: 1.0})
    step = run.machine.state.version
    for unit in run.machine.steps.dealing.outstanding(0):
        run.step(1.0)
        run.contribute(run.workers[0], step, unit)
    run.workers[1].idle = True
    run.step(4.0)
    assert run.machine.steps.dealing.outstanding(0) == [7, 6]
    run.kill_worker(1)
    run.step(0.5)
    # What it has keeps its place; the rest comes behind.
    assert run.machine.steps.dealing.outstanding(0) == [7, 6, 4, 5]
    assert make_step(run, {0: 1.0, 1: 1.0}) < 4.3


# -- How many workers there may be ------------------------------------------------------------------


def test_a_worker_beyond_the_contributions_of_a_step_is_said_to_be_a_spare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = straggling(tmp_path, workers=2, contributions=2)
    with caplog.at_level("INFO"):
        run.join_worker()
        run.step()
    assert "worker 2 is there, a spare: a step has 2 contributions" in caplog.messages


def test_with_too_few_workers_nothing_is_dealt(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=2, min_workers=2)
    make_step(run, {0: 0.1, 1: 0.1})
    step = run.machine.state.version
    run.kill_worker(1)
    run.step(0.5)
    lost = [4, 5, 6, 7]
    for unit in run.machine.steps.dealing.outstanding(0):
        run.contribute(run.workers[0], step, unit)
    run.step(5.0)
    assert not run.machine.steps.dealing.outstanding(0)
    waiting = run.machine.waiting_for(run.now)
    assert "any worker (to come: membership.min_workers=2, and 1 is there)" in waiting
    run.join_worker(1)
    run.step(0.01)
    assert sorted(u for rank in (0, 1) for u in run.machine.steps.dealing.outstanding(rank)) == lost
    make_step(run, {0: 0.1, 1: 0.1})


def test_at_the_start_too_few_workers_are_waited_for(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, workers=1, membership={"min_workers": 2}))
    run.everybody()
    run.settle()
    assert run.machine.state.version == 0
    assert run.machine.snapshots.has_first()
    run.join_worker()
    run.run()
    assert run.end.ok


def test_with_too_few_workers_a_stop_is_not_waited_for(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=2, min_workers=2)
    make_step(run, {0: 0.1, 1: 0.1})
    run.kill_worker(1)
    run.step(0.5)
    run.machine.stop("asked to stop")
    run.run()
    assert run.end.ok


def test_more_workers_than_may_be_are_spares_that_take_over(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=3, max_workers=2)
    make_step(run, {0: 0.1, 1: 0.1, 2: 0.1})
    step = run.machine.state.version
    dealing = run.machine.steps.dealing
    assert [len(dealing.outstanding(rank)) for rank in range(3)] == [4, 4, 0]
    run.kill_worker(0)
    run.step(0.5)
    assert [len(dealing.outstanding(rank)) for rank in range(3)] == [0, 4, 4]
    assert run.machine.state.version == step
    # Every worker hears of a step, so that nobody stays behind in the one before.
    make_step(run, {0: 0.1, 1: 0.1, 2: 0.1})
    assert {tell.worker for tell in told(run, step + 1)} >= {1, 2}


def test_a_spare_takes_over_from_who_is_alive_and_computes_nothing(tmp_path: Path) -> None:
    run = straggling(tmp_path, workers=2, max_workers=1)
    run.run_to(2)
    run.workers[0].idle = True

    def heard_of() -> bool:
        run.machine.seen(run.member(Role.WORKER, 0), run.now)
        return run.machine.state.version >= 3

    run.run(heard_of, seconds=1000.0, tick=0.5)


def test_a_least_number_above_the_greatest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_workers=2 is less than min_workers=3"):
        make_config(tmp_path, membership={"min_workers": 3, "max_workers": 2})
