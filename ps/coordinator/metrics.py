"""The metrics of the coordinator; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from ps.telemetry.buckets import PHASE_S
from ps.telemetry.metrics import STEP

APPLIED = Gauge("windlass_applied_steps", "Committed steps")
SKIPPED = Counter("windlass_skipped_steps", "Steps that were skipped for overflow")
LOSS = Gauge("windlass_loss", "Mean training loss of the last step, nats")
EVALUATION_LOSS = Gauge("windlass_evaluation_loss", "Held-out loss of the last evaluation, nats per token")
LOSS_SCALE = Gauge("windlass_loss_scale", "Loss scale of the open step")
LEARNING_RATE = Gauge("windlass_learning_rate", "Learning rate of the last step")
GRADIENT_NORM = Gauge("windlass_gradient_norm", "Gradient norm before clipping of the last step")
TOKENS = Counter("windlass_tokens", "Tokens trained on")
STEP_SECONDS = Histogram("windlass_step_seconds", "From one closed step to the next", buckets=PHASE_S)
WORKERS_LIVE = Gauge("windlass_workers_live", "Live workers")
SHARDS_LIVE = Gauge("windlass_shards_live", "Live shards")
EPOCH = Gauge("windlass_epoch", "Epoch of the fence")
TERM = Gauge("windlass_term", "Term of the fence")
CHECKPOINT_VERSION = Gauge("windlass_checkpoint_version", "Version of the newest complete checkpoint")
CHECKPOINT_TIME = Gauge("windlass_checkpoint_time_seconds", "When the newest checkpoint was completed, Unix time")
CHECKPOINT_FAILURES = Counter("windlass_checkpoint_failures", "Checkpoints that could not be completed")

__all__ = [
    "APPLIED",
    "CHECKPOINT_FAILURES",
    "CHECKPOINT_TIME",
    "CHECKPOINT_VERSION",
    "EPOCH",
    "EVALUATION_LOSS",
    "GRADIENT_NORM",
    "LEARNING_RATE",
    "LOSS",
    "LOSS_SCALE",
    "SHARDS_LIVE",
    "SKIPPED",
    "STEP",
    "STEP_SECONDS",
    "TERM",
    "TOKENS",
    "WORKERS_LIVE",
]
