"""The decision of a step: a pure function of the shards' reports and of the state before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ps.config import RunConfig
from ps.coordinator.loss_scaler import LossScaler, is_dynamic
from ps.coordinator.schedule import learning_rate_factor
from ps.types import Decision, Fence, GroupScalars, Prepared

#: torch.nn.utils.clip_grad_norm_ and DeepSpeed add this to the norm before dividing.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class TrainingState:
    """What one step hands to the next, besides weights and moments."""

    #: Decided steps: the open step.
    version: int
    applied: int
    skipped: int
    scaler: LossScaler

    @classmethod
    def start(cls, config: RunConfig) -> TrainingState:
        return cls(0, 0, 0, LossScaler.start(config.precision))


def decide(config: RunConfig, state: TrainingState, reports: Sequence[Prepared], fence: Fence) -> Decision:
    """Decide the open step for all shards.

    Args:
        reports: one of every shard, of the open step.
    """
    step = state.version
    scale = state.scaler.scale
    # fsum is exact, so neither the order of the shards nor the chunking can change the norm.
    square_sum = _exact_sum([value for report in reports for value in report.square_sums])
    skip = not math.isfinite(square_sum)
    norm = math.sqrt(square_sum) / scale if not skip else square_sum
    clip_norm = config.optimizer.clip_norm
    clip = min(1.0, clip_norm / (norm + CLIP_EPSILON)) if clip_norm and not skip else 1.0
    applied = state.applied + (not skip)
    contributions = sorted(min(reports, key=lambda report: report.shard).contributions, key=lambda c: c.contribution)
    loss = _exact_sum([c.loss_sum for c in contributions]) / config.batch.micro_batches_per_step
    scaler = state.scaler.after(step, skip, config.precision.loss_scale, is_dynamic(config.precision))
    factor = learning_rate_factor(config.schedule, state.applied, config.training.steps)
    corrections = _bias_corrections(config, applied)
    return Decision(
        fence=fence,
        step=step,
        skip=skip,
        applied=applied,
        skipped=state.skipped + skip,
        loss=loss,
        tokens=sum(c.tokens for c in contributions),
        gradient_norm=norm,
        loss_scale=scale,
        gradient_multiplier=0.0 if skip else clip / scale,
        groups=group_scalars(config, factor),
        bias_correction1=corrections[0],
        bias_correction2=corrections[1],
        next_loss_scale=scaler.scale,
        next_hysteresis=scaler.hysteresis,
        next_last_overflow=scaler.last_overflow,
        snapshot=is_snapshot_due(config, step + 1) or any(report.journal_full for report in reports),
    )


def foregone(config: RunConfig, state: TrainingState, fence: Fence) -> Decision | None:
    """What the decision of the open step does, known before any report; None: it depends on them.

    It is the decision but for what describes the step (loss, norm). An overflow makes it wrong: such a
    step is made again, and decided.
    """
    if not config.is_eager:
        return None
    return decide(config, state, [Prepared(fence, state.version, 0, (), ())], fence)


def after(state: TrainingState, decision: Decision) -> TrainingState:
    """The state after a decision, made now or read from the journal."""
    scaler = LossScaler(decision.next_loss_scale, decision.next_hysteresis, decision.next_last_overflow)
    return replace(state, version=decision.version, applied=decision.applied, skipped=decision.skipped, scaler=scaler)


def group_scalars(config: RunConfig, factor: float) -> tuple[GroupScalars, ...]:
    """Group 0 is decayed, group 1 (norms, biases, embeddings) is not."""
    lr = config.optimizer.lr * factor
    return (GroupScalars(lr, config.optimizer.weight_decay), GroupScalars(lr, 0.0))


def is_snapshot_due(config: RunConfig, version: int) -> bool:
    every = config.checkpoint.every_steps
    return version == config.training.end or bool(every and version % every == 0)


def same_content(one: Decision, other: Decision) -> bool:
    """Whether two decisions of a step agree in everything but their fence and the snapshot."""
    return _content(one) == _content(other)


def _content(decision: Decision) -> str:
    # repr, so that NaN equals NaN.
    return repr(replace(decision, fence=Fence(0, 0), snapshot=False))


def _exact_sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        # Finite values that overflow together, or inf - inf.
        return math.inf if not any(math.isnan(v) for v in values) else math.nan


def _bias_corrections(config: RunConfig, applied: int) -> tuple[float, float]:
    if config.optimizer.name == "sgd" or applied == 0:
        return 1.0, 1.0
    beta1, beta2 = config.optimizer.betas
    return 1.0 - beta1**applied, 1.0 - beta2**applied
