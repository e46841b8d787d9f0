"""The numbers of one process: a cluster against a plain PyTorch loop over the same micro-batches."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.multiprocess.conftest import MakeJob
from tests.support.cluster import Finished, make_job, train
from workers.config import JobConfig
from workers.data.batches import TokenBatches
from workers.data.prepare import prepare
from workers.data.sampling import slot_seed
from workers.engine.compute import Contributor
from workers.models.gpt import GPT

log = logging.getLogger(__name__)

#: Bounds on ||w - w_ref|| / ||w_ref|| of every tensor after 50 steps in FP32.
ADAM_BOUND = 2e-5
SGD_BOUND = 2e-6
LOSS_BOUND = 1e-5

ADAMW = ("optimizer.name=adamw", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1")
FP32 = ("training.steps=50", "precision.wire=fp32", "optimizer.clip_norm=0.9")
# At six times this learning rate the plain loop itself is chaotic: one bit of a gradient becomes 1e-5 in 50 steps.
SGD = (
    "optimizer.name=sgd",
    "optimizer.lr=0.05",
    "optimizer.momentum=0.9",
    "optimizer.weight_decay=0.01",
    "optimizer.clip_norm=0.7",
)

Optimize = Callable[[list[dict[str, Any]], JobConfig], torch.optim.Optimizer]


# -- The plain loop ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What one process computes."""

    weights: dict[str, np.ndarray]
    losses: list[float]
    norms: list[float]


def learning_rate(job: JobConfig, step: int) -> float:
    """Linear warm-up over w steps, then half a cosine that ends at the last step."""
    schedule, last = job.schedule, job.training.steps - 1
    if step < schedule.warmup_steps:
        return job.optimizer.lr * (step + 1) / schedule.warmup_steps
    angle = math.pi * (step - schedule.warmup_steps) / (last - schedule.warmup_steps)
    low = job.optimizer.lr * schedule.min_ratio
    return low + (job.optimizer.lr - low) * (1 + math.cos(angle)) / 2


def adamw(groups: list[dict[str, Any]], job: JobConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=job.optimizer.betas, eps=job.optimizer.eps)


def adam(groups: list[dict[str, Any]], job: JobConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.0, betas=job.optimizer.betas, eps=job.optimizer.eps)


def sgd(groups: list[dict[str, Any]], job: JobConfig) -> torch.optim.Optimizer:
    chosen = job.optimizer
    return torch.optim.SGD(
        groups, lr=0.0, momentum=chosen.momentum, dampening=chosen.dampening, nesterov=chosen.nesterov
    )


def plain_loop(job: JobConfig, optimize: Optimize) -> Reference:
    """Train in one process: all micro-batches of a step accumulate, the norm is clipped, the optimizer steps."""
    torch.set_num_threads(1)
    data, batch = prepare(job.data), job.batch
    slots = batch.micro_batches_per_step
    batches = TokenBatches(data, job.data.sequence_length, batch.micro_batch_size, job.seed, slots)
    model = GPT(job.model, data.vocab_size, job.data.sequence_length)
    model.initialize(job.seed)
    model.train()
    optimizer = optimize(parameter_groups(model, job), job)
    losses, norms = [], []
    for step in range(job.training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job, step)
        optimizer.zero_grad()
        step_losses = []
        for slot in range(slots):
            torch.manual_seed(slot_seed(job.seed, step, slot))
            loss = model.loss(torch.from_numpy(batches.batch(step, slot)))
            (loss / slots).backward()
            step_losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)))
        optimizer.step()
        losses.append(sum(step_losses) / slots)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return Reference(weights, losses, norms)


def parameter_groups(model: nn.Module, job: JobConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms and the (tied) embedding do not."""
    parameters = dict(model.named_parameters())
    plain = [name for name, parameter in parameters.items() if parameter.ndim < 2 or "embed" in name]
    decayed = [parameter for name, parameter in parameters.items() if name not in plain]
    return [
        {"params": decayed, "weight_decay": job.optimizer.weight_decay},
        {"params": [parameters[name] for name in plain], "weight_decay": 0.0},
    ]


@pytest.fixture(scope="module")
def reference(text: Path) -> Callable[..., Reference]:
    """Run the plain loop once for each optimizer: its micro-batches do not depend on shards and workers."""

    @functools.lru_cache
    def of(optimize: Optimize, *overrides: str) -> Reference:
        return plain_loop(make_job(text.parent / "reference", text, overrides), optimize)

    return of


# -- Comparing --------------------------------------------------------------------------------------


def distances(run: Finished, expected: Reference) -> dict[str, float]:
    """Return ||w - w_ref|| / ||w_ref|| of every tensor, in float64."""
    weights = run.tensors()
    assert weights.keys() == expected.weights.keys()
    pairs = {name: (weights[name], wanted.astype(np.float64)) for name, wanted in expected.weights.items()}
    norm = np.linalg.norm
    return {name: float(norm(found - wanted) / norm(wanted)) for name, (found, wanted) in pairs.items()}


def assert_same_numbers(run: Finished, expected: Reference, bound: float) -> None:
    """Weights, losses and norms of a run are those of the plain loop."""
    found = distances(run, expected)
    worst = max(found, key=lambda name: found[name])
    losses = np.abs(np.subtract(run.column("loss"), expected.losses))
    log.info("%s: weights within %.2e (%s), losses within %.2e", run.job.run_dir, found[worst], worst, losses.max())
    assert found[worst] <= bound, f"{worst}: {found[worst]:.2e} is more than {bound:.0e}"
    assert len(losses) == run.job.training.steps
    assert losses.max() <= LOSS_BOUND, f"the loss of step {losses.argmax()} differs by {losses.max():.2e}"
    np.testing.assert_allclose(run.column("gradient_norm"), expected.norms, rtol=1e-4)
    np.testing.assert_allclose(
        run.column("learning_rate"), [learning_rate(run.job, step) for step in range(len(losses))], rtol=1e-12
    )
    assert not any(run.column("skipped"))
    clipped = sum(norm > run.job.optimizer.clip_norm for norm in expected.norms)
    assert clipped >= run.job.training.steps // 3, f"only {clipped} steps were clipped: this run proves little"


# -- FP32 -------------------------------------------------------------------------------------------


#: Enough to see that neither number matters; the others are the rest of the table.
COVERING = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 3), (3, 4)]
REST = [(shards, workers) for shards in (1, 2, 3) for workers in (1, 2, 3, 4) if (shards, workers) not in COVERING]


@pytest.mark.parametrize(
    ("shards", "workers"), [*COVERING, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_adamw_is_the_same_as_in_one_process(
    make_job: MakeJob,
    reference: Callable[..., Reference],
    shards: int,
    workers: int,
) -> None:
    job = make_job("run", *FP32, *ADAMW, f"cluster.shards={shards}", f"cluster.workers={workers}")
    assert job.contributions == workers
    assert_same_numbers(train(job), reference(adamw, *FP32, *ADAMW), ADAM_BOUND)


@pytest.mark.parametrize(("shards", "workers"), [(1, 4), (2, 3), (3, 2), (3, 1)])
def test_sgd_with_momentum_is_the_same_as_in_one_process(
    make_job: MakeJob,
    reference: Callable[..., Reference],
    shards: int,
    workers: int,
) -> None:
    job = make_job("run", *FP32, *SGD, f"cluster.shards={shards}", f"cluster.workers={workers}")
    assert_same_numbers(train(job), reference(sgd, *FP32, *SGD), SGD_BOUND)


def test_more_contributions_than_a_shard_keeps_are_the_same_as_in_one_process(
    make_job: MakeJob, reference: Callable[..., Reference]
) -> None:
    """Beyond four contributions a shard folds; one slot each here, by three workers."""
    job = make_job("run", *FP32, *ADAMW, "cluster.shards=2", "cluster.workers=3", "batch.contributions_per_step=8")
    assert_same_numbers(train(job), reference(adamw, *FP32, *ADAMW), ADAM_BOUND)


def test_dropout_is_the_same_as_in_one_process(
    make_job: MakeJob,
    reference: Callable[..., Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout's random numbers belong to the slot, whoever computes it."""
    # torch has one generator per process: here the workers are threads, so one computes at a time.
    lock, contribute = threading.Lock(), Contributor.contribute

    def alone(self: Contributor, *arguments: Any) -> Any:
        with lock:
            return contribute(self, *arguments)

    monkeypatch.setattr(Contributor, "contribute", alone)
    dropout = (*FP32, *ADAMW, "model.dropout=0.2")
    job = make_job("run", *dropout, "cluster.shards=2", "cluster.workers=3")
    expected = reference(adamw, *dropout)
    assert_same_numbers(train(job), expected, ADAM_BOUND)
    without = reference(adamw, *FP32, *ADAMW)
    assert abs(expected.losses[0] - without.losses[0]) > 1e-3, "dropout does nothing"


@pytest.mark.parametrize(
    ("optimize", "bound", "overrides"),
    [
        pytest.param(adam, ADAM_BOUND, ("optimizer.name=adam", "optimizer.weight_decay=0.1"), id="adam-l2"),
        pytest.param(sgd, SGD_BOUND, (*SGD, "optimizer.nesterov=true"), id="nesterov"),
        pytest.param(sgd, SGD_BOUND, (*SGD, "optimizer.dampening=0.4"), id="dampening"),
        pytest.param(sgd, SGD_BOUND, (*SGD, "optimizer.momentum=0"), id="plain-sgd"),
    ],
)
def test_other_optimizers_are_the_same_as_in_one_process(
    make_job: MakeJob,
    reference: Callable[..., Reference],
    optimize: Optimize,
    bound: float,
    overrides: tuple[str, ...],
) -> None:
    short = (*FP32, *overrides, "training.steps=12")
    job = make_job("run", *short, "cluster.shards=2", "cluster.workers=2")
    assert_same_numbers(train(job), reference(optimize, *short), bound)


# -- Half precision on the wire ---------------------------------------------------------------------

HALF = ("fp32", "fp16")
LONG = (
    "batch.micro_batches_per_step=2",
    "batch.micro_batch_size=4",
    "optimizer.lr=2e-3",
    "schedule.warmup_steps=10",
    "cluster.shards=2",
    "cluster.workers=2",
)


def test_fp16_on_the_wire_loses_nothing(make_job: MakeJob) -> None:
    """After 200 steps the loss is within 1 % of the FP32 wire's: of the last step, and held out."""
    exact, half = (train(make_job(wire, *LONG, "training.steps=200", f"precision.wire={wire}")) for wire in HALF)
    last, wanted = half.column("loss")[-1], exact.column("loss")[-1]
    held_out = (half.evaluation["loss"], exact.evaluation["loss"])
    log.info("FP16 and FP32 wire: the last loss is %.5f and %.5f, held out %.5f and %.5f", last, wanted, *held_out)
    assert wanted < exact.column("loss")[0] - 1.0, "nothing was learned: the comparison proves little"
    assert last == pytest.approx(wanted, rel=0.01)
    assert held_out[0] == pytest.approx(held_out[1], rel=0.01)
    assert half.digest() != exact.digest()


def test_bf16_on_the_wire_learns(make_job: MakeJob) -> None:
    run = train(make_job("run", *LONG, "training.steps=60", "precision.wire=bf16"))
    losses = run.column("loss")
    assert losses[-1] < losses[0] - 1.0
    assert run.column("loss_scale") == [1.0] * 60
    assert not any(run.column("skipped"))


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_more_contributions_than_a_shard_keeps_change_little(make_job: MakeJob, wire: str) -> None:
    """Other contributions are rounded elsewhere, and no more than that."""
    short = ("training.steps=12", f"precision.wire={wire}", "cluster.shards=2", "cluster.workers=2")
    few, many = (train(make_job(f"c{count}", *short, f"batch.contributions_per_step={count}")) for count in (2, 7))
    np.testing.assert_allclose(many.column("loss"), few.column("loss"), rtol=2e-3 if wire == "fp16" else 1e-2)
    bound = {"fp16": 1e-3, "bf16": 8e-3}[wire]
    np.testing.assert_allclose(many.column("gradient_norm"), few.column("gradient_norm"), rtol=bound)
