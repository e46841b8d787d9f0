"""What the coordinator shows to Prometheus of its machine, of contributions and of the lines of metrics.jsonl."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from ps.coordinator.effects import _export
from ps.coordinator.history import History
from ps.coordinator.monitoring import Monitor, count_contribution
from ps.coordinator.recorder import METRICS_NAME
from ps.coordinator.recovery import Candidate
from ps.coordinator.run import Phase
from ps.coordinator.timings import Spent
from ps.storage.manifest import MANIFEST_NAME
from ps.telemetry.metrics import MAX_PEERS
from ps.types import Role
from tests.support.fake_run import FakeRun, make_config


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(make_config(tmp_path))


def shown(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"windlass_{name}", labels)
    return 0.0 if value is None else value


def monitor(run: FakeRun, candidates: list[Candidate] | None = None) -> Monitor:
    return Monitor(run.config, run.machine.history, candidates or [])


def test_a_worker_is_lost_until_its_rank_is_taken_and_not_when_it_leaves(run: FakeRun) -> None:
    look = monitor(run).look
    run.everybody()
    run.run_to(1)
    look(run.machine)
    assert (shown("workers_live"), shown("workers_expected"), shown("workers_lost")) == (2, 2, 0)
    run.kill_worker(1)
    run.step(run.config.membership.reconnect_grace_s + 0.1)
    look(run.machine)
    assert (shown("workers_live"), shown("workers_lost")) == (1, 1)
    assert run.join_worker().rank == 1
    look(run.machine)
    assert (shown("workers_live"), shown("workers_lost")) == (2, 0)
    run.machine.leave(run.member(Role.WORKER, 1), run.now)
    look(run.machine)
    assert (shown("workers_live"), shown("workers_lost")) == (1, 0)


def test_late_contributions_that_are_dealt_to_a_second_worker_are_counted(run: FakeRun) -> None:
    watched = monitor(run)
    before = shown("duplicated_contributions_total")
    for duplicated in (0, 2, 2, 3):
        run.machine.steps.duplicated = duplicated
        watched.look(run.machine)
        assert shown("duplicated_contributions_total") == before + duplicated


def test_a_shard_that_comes_back_is_a_recovery_and_the_start_is_none(run: FakeRun) -> None:
    watched = monitor(run)
    before = shown("recoveries_total")
    run.everybody()
    run.run_to(2)
    for _ in range(3):
        watched.look(run.machine)
    assert shown("recoveries_total") == before
    assert (shown("shards_live"), shown("shards_expected"), shown("step")) == (2, 2, 2)
    run.join_shard(0)
    run.run(lambda: run.machine.phase is Phase.RUNNING)
    for _ in range(3):
        watched.look(run.machine)
    assert shown("recoveries_total") == before + 1
    assert shown("epoch") == run.machine.fence.epoch == 2


def test_damaged_checkpoints_are_counted(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path))
    run.everybody()
    watched, snapshots = monitor(run), run.machine.snapshots
    run.run_to(4)
    newest = snapshots.candidates[-1]
    # Whoever removes older ones reads the same one each time.
    for _ in range(2):
        snapshots.damaged(newest.name)
    watched.look(run.machine)
    assert shown("checkpoints_damaged") == 1
    # A shard that has to load it will see by itself.
    assert newest in snapshots.candidates
    snapshots.reject(newest)
    watched.look(run.machine)
    assert shown("checkpoints_damaged") == 1
    run.join_shard(0)
    run.run()
    watched.look(run.machine)
    assert snapshots.exists(newest.state.version)
    assert shown("checkpoints_damaged") == 0, "it was written again"


@pytest.mark.parametrize(
    ("precision", "floor"),
    [
        ({"loss_scale": {"minimum": 4.0}}, 4.0),
        ({"loss_scale": {"static": 128.0}}, 0.0),
        ({"wire": "bf16"}, 0.0),
    ],
)
def test_only_a_dynamic_loss_scale_has_a_floor(tmp_path: Path, precision: dict[str, Any], floor: float) -> None:
    monitor(FakeRun(make_config(tmp_path, precision=precision)))
    assert shown("loss_scale_floor") == floor


def test_what_is_not_known_yet_is_no_number_and_what_a_resumed_run_has_is_shown(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, checkpoint={"every_steps": 7}))
    monitor(run)
    for name in ("loss", "evaluation_loss", "learning_rate", "gradient_norm"):
        assert math.isnan(shown(name)), name
    history = History("id-1", 2, [])
    history.evaluations = {3: {"loss": 2.0}, 6: {"loss": 1.5}}
    folders = {version: run.config.checkpoint_dir / f"step-{version}" for version in (3, 6)}
    for version, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).touch()
        os.utime(folder / MANIFEST_NAME, (1000.0 * version, 1000.0 * version))
    state = run.machine.state
    candidates = [Candidate(folders[v].name, "", type(state)(v, v, 0, state.scaler)) for v in (6, 3)]
    Monitor(run.config, history, candidates)
    assert (shown("evaluation_loss"), shown("checkpoint_version"), shown("checkpoint_time_seconds")) == (1.5, 6, 6000)
    assert (shown("checkpoint_every_steps"), shown("target_steps")) == (7, 6)
    assert any(sample.labels.get("id") == "id-1" for metric in REGISTRY.collect() for sample in metric.samples)


def test_contributions_are_counted_by_worker() -> None:
    def counted() -> tuple[float, ...]:
        return (
            shown("contributions_total", worker="worker-9"),
            *(shown("contribution_seconds_total", worker="worker-9", phase=p) for p in ("compute", "push", "pull")),
        )

    before = counted()
    count_contribution(9, Spent(0, 0, 1.0, 2.0, 4.0))
    count_contribution(9, Spent(0, 1, 0.0, 0.0, 4.0))
    assert [round(after - first, 6) for after, first in zip(counted(), before, strict=True)] == [2, 1, 2, 8]
    others = shown("contributions_total", worker="worker-other")
    count_contribution(MAX_PEERS + 5, Spent(0, 0, 0.0, 0.0, 0.0))
    assert shown("contributions_total", worker="worker-other") == others + 1


def line(**fields: Any) -> dict[str, Any]:
    step = {"kind": "step", "step": 0, "loss": 2.0, "learning_rate": 0.1, "gradient_norm": 1.0, "skipped": False}
    seconds = {"tokens": 10, "step_seconds": 1.0, "compute_seconds": 0.5, "push_seconds": 0.1, "pull_seconds": 0.3}
    return {**step, **seconds, **fields}


def test_the_phases_of_a_step_add_up_to_it() -> None:
    phases = ("compute", "push", "pull", "rest")

    def seconds() -> list[float]:
        return [shown("step_phase_seconds_total", phase=phase) for phase in phases]

    before = seconds()
    _export(line())
    # Nobody could tell; and the first step after a start, which has no duration.
    _export(line(compute_seconds=None, push_seconds=None, pull_seconds=None))
    _export(line(step_seconds=None))
    spent = [round(after - first, 6) for after, first in zip(seconds(), before, strict=True)]
    assert spent == [0.5, 0.1, 0.3, 1.1]


def test_a_skipped_step_is_no_commit() -> None:
    _export(line())
    committed, skipped = shown("commit_time_seconds"), shown("skipped_steps_total")
    assert committed > 0
    _export(line(skipped=True, gradient_norm=None))
    assert shown("commit_time_seconds") == committed
    assert shown("skipped_steps_total") == skipped + 1
    assert shown("gradient_norm") == 1.0


def test_a_run_that_has_diverged_does_not_look_as_before() -> None:
    _export(line())
    _export(line(loss=None, gradient_norm=None))
    assert math.isnan(shown("loss"))
    assert math.isnan(shown("gradient_norm"))


def test_a_coordinator_that_restarts_has_committed_nothing_just_now(run: FakeRun) -> None:
    """Otherwise one that dies again and again would always look as if it were at work."""
    now = time.time()
    monitor(run)
    assert shown("commit_time_seconds") >= now
    written = run.config.run_dir / METRICS_NAME
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text("")
    for seconds, told in ((60.0, now - 60.0), (86_400.0, time.time())):
        os.utime(written, (now - seconds, now - seconds))
        monitor(run)
        assert abs(shown("commit_time_seconds") - told) < 5.0
