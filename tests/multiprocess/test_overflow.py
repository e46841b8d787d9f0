"""A gradient that is not finite, in one chunk of one contribution: all shards skip the step, nobody waits."""

from __future__ import annotations

import pytest
from torch import Tensor

from ps.sharding import Chunk
from tests.multiprocess.conftest import MakeJob
from tests.support.altered import alter
from tests.support.cluster import Finished, train

#: DeepSpeed's own scaler over XX.....XX with a window of 4 and a hysteresis of 2: (scale, hysteresis) after each step.
PATTERN = "XX.....XX"
GOLDEN = [(65536, 1), (32768, 1), *[(32768, 1)] * 4, (65536, 2), (65536, 1), (32768, 1)]
#: Far below every time-out: whoever waited for one would be seen.
PROMPT_S = 20.0
JOB = (
    "cluster.shards=3",
    "cluster.workers=2",
    "training.steps=11",
    "batch.micro_batches_per_step=4",
    "checkpoint.every_steps=1",
    "checkpoint.keep=100",
)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float, shard: int = 1) -> set[int]:
    """Put a value into the gradient of contribution 1, in the first chunk of a shard, at some steps.

    Returns:
        The steps at which it happened, filled as it happens.
    """
    poisoned: set[int] = set()

    def poisoning(step: int, contribution: int, chunk: Chunk, gradient: Tensor) -> None:
        # The first chunks go to one shard each.
        if step in steps and contribution == 1 and chunk.index == chunk.shard == shard:
            gradient[chunk.runs[0].start + 3] = value
            poisoned.add(step)

    alter(monkeypatch, poisoning)
    return poisoned


def assert_skipped(run: Finished, skipped: set[int]) -> None:
    """Exactly these steps changed nothing, on any shard, and took no longer than others."""
    steps = run.job.training.steps
    assert [step for step, was in enumerate(run.column("skipped")) if was] == sorted(skipped)
    applied = 0
    for step in range(steps):
        applied += step not in skipped
        manifest = run.manifest(step + 1)
        assert (manifest.version, manifest.applied, manifest.skipped) == (step + 1, applied, step + 1 - applied)
        assert (run.digest(step + 1) == run.digest(step)) == (step in skipped)
    norms = run.column("gradient_norm")
    assert all((norms[step] is None) == (step in skipped) for step in range(steps))
    rates = run.column("learning_rate")
    assert all(rates[step + 1] == rates[step] for step in skipped), "a skipped step moved the schedule"
    assert all(loss is not None for loss in run.column("loss")), "the loss is that of the forward, which was finite"
    assert max(seconds for seconds in run.column("step_seconds") if seconds is not None) < PROMPT_S


# A value that FP16 cannot hold becomes infinite when it is rounded.
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6], ids=["inf", "nan", "too large"])
def test_all_shards_skip_and_the_scale_follows_the_golden_trace(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    bad = {step for step, mark in enumerate(PATTERN) if mark == "X"}
    poisoned = poison(monkeypatch, bad, value)
    run = train(make_job("run", *JOB, "precision.loss_scale.window=4", "precision.loss_scale.hysteresis=2"))
    assert poisoned == bad
    assert_skipped(run, bad)
    scalers = [run.manifest(version).scaler for version in range(1, len(GOLDEN) + 1)]
    assert [(scaler.scale, scaler.hysteresis) for scaler in scalers] == GOLDEN
    # A step's gradients carry the scale that the step before has left.
    used = [65536, *(scale for scale, _ in GOLDEN)]
    assert run.column("loss_scale")[: len(used)] == used


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_without_a_loss_scale_a_step_is_skipped_as_well(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    poison(monkeypatch, {2}, float("nan"), shard=2)
    run = train(make_job("run", *JOB, "training.steps=5", f"precision.wire={wire}"))
    assert_skipped(run, {2})
    assert run.column("loss_scale") == [1.0] * 5
