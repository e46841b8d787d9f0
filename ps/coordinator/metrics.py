"""The metrics of the coordinator; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, Info

from ps.telemetry.buckets import PHASE_S
from ps.telemetry.metrics import STEP

RUN = Info("windlass_run", "The run's id, and the version of windlass")
TARGET_STEPS = Gauge("windlass_target_steps", "Where the run, or this part of it, ends")
APPLIED = Gauge("windlass_applied_steps", "Committed steps")
SKIPPED = Counter("windlass_skipped_steps", "Steps that were skipped for overflow")
LOSS = Gauge("windlass_loss", "Mean training loss of the last step, nats")
EVALUATION_LOSS = Gauge("windlass_evaluation_loss", "Held-out loss of the last evaluation, nats per token")
LOSS_SCALE = Gauge("windlass_loss_scale", "Loss scale of the open step")
LOSS_SCALE_FLOOR = Gauge("windlass_loss_scale_floor", "What a dynamic loss scale never falls below; 0: not dynamic")
LEARNING_RATE = Gauge("windlass_learning_rate", "Learning rate of the last step")
GRADIENT_NORM = Gauge("windlass_gradient_norm", "Gradient norm before clipping of the last step")
TOKENS = Counter("windlass_tokens", "Tokens trained on")
STEP_SECONDS = Histogram("windlass_step_seconds", "From one closed step to the next", buckets=PHASE_S)
COMMIT_TIME = Gauge("windlass_commit_time_seconds", "When the last step was committed, Unix time")
PHASE_SECONDS = Counter("windlass_step_phase_seconds", "Seconds of steps, by phase of the slowest worker", ["phase"])
CONTRIBUTIONS = Counter("windlass_contributions", "Contributions that every shard holds, by worker", ["worker"])
CONTRIBUTION_SECONDS = Counter(
    "windlass_contribution_seconds", "Seconds of contributions, by worker and phase", ["worker", "phase"]
)
DUPLICATED = Counter("windlass_duplicated_contributions", "Late contributions that another worker was given as well")
WORKERS_LIVE = Gauge("windlass_workers_live", "Live workers")
WORKERS_LOST = Gauge("windlass_workers_lost", "Workers that went without leaving, and did not come back")
WORKERS_EXPECTED = Gauge("windlass_workers_expected", "Workers that the job starts with")
SHARDS_LIVE = Gauge("windlass_shards_live", "Live shards")
SHARDS_EXPECTED = Gauge("windlass_shards_expected", "Shards that the run needs")
STANDBYS_IN_SYNC = Gauge("windlass_standbys_in_sync", "Standbys that hold the same as their shard, and may take over")
STANDBYS_EXPECTED = Gauge("windlass_standbys_expected", "Standbys that the job asks for")
STANDBYS_DIVERGED = Counter(
    "windlass_standbys_diverged", "Standbys dismissed, as their state differed from the shard's"
)
TAKEOVERS = Counter("windlass_takeovers", "Standbys that took over from their shard")
RECOVERIES = Counter("windlass_recoveries", "Times that the cluster was made to serve again")
EPOCH = Gauge("windlass_epoch", "Epoch of the fence")
TERM = Gauge("windlass_term", "Term of the fence")
CHECKPOINT_VERSION = Gauge("windlass_checkpoint_version", "Version of the newest complete checkpoint")
CHECKPOINT_TIME = Gauge("windlass_checkpoint_time_seconds", "When the newest checkpoint was completed, Unix time")
CHECKPOINT_EVERY = Gauge("windlass_checkpoint_every_steps", "Steps between checkpoints; 0: start and end only")
CHECKPOINT_FAILURES = Counter("windlass_checkpoint_failures", "Checkpoints that could not be completed")
METRICS_BEHIND = Gauge("windlass_metrics_behind", "Changes that metrics.jsonl lacks, as its disk fails; 0: none")
CHECKPOINTS_DAMAGED = Gauge("windlass_checkpoints_damaged", "Checkpoints that this coordinator has found damaged")

__all__ = [
    "APPLIED",
    "CHECKPOINTS_DAMAGED",
    "CHECKPOINT_EVERY",
    "CHECKPOINT_FAILURES",
    "CHECKPOINT_TIME",
    "CHECKPOINT_VERSION",
    "COMMIT_TIME",
    "CONTRIBUTIONS",
    "CONTRIBUTION_SECONDS",
    "DUPLICATED",
    "EPOCH",
    "EVALUATION_LOSS",
    "GRADIENT_NORM",
    "LEARNING_RATE",
    "LOSS",
    "LOSS_SCALE",
    "LOSS_SCALE_FLOOR",
    "PHASE_SECONDS",
    "RECOVERIES",
    "RUN",
    "SHARDS_EXPECTED",
    "SHARDS_LIVE",
    "SKIPPED",
    "STANDBYS_DIVERGED",
    "STANDBYS_EXPECTED",
    "STANDBYS_IN_SYNC",
    "STEP",
    "STEP_SECONDS",
    "TAKEOVERS",
    "TARGET_STEPS",
    "TERM",
    "TOKENS",
    "WORKERS_EXPECTED",
    "WORKERS_LIVE",
    "WORKERS_LOST",
]
