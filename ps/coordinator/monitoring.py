"""What Prometheus sees of the run besides the lines of metrics.jsonl."""

from __future__ import annotations

import math
import time
from importlib.metadata import version as distribution_version
from pathlib import Path

from ps.config import RunConfig
from ps.coordinator import metrics
from ps.coordinator.history import History
from ps.coordinator.loss_scaler import is_dynamic
from ps.coordinator.machine import Machine
from ps.coordinator.recorder import METRICS_NAME
from ps.coordinator.recovery import Candidate
from ps.coordinator.run import Phase
from ps.coordinator.timings import Spent
from ps.storage.manifest import MANIFEST_NAME
from ps.telemetry.metrics import peer
from ps.types import Role

#: A coordinator that starts within this after the last step was restarted; later, the run was resumed.
RESTART_S = 600.0


class Monitor:
    """Shows the facts of one life of the coordinator. Not thread-safe: the loop's thread calls."""

    def __init__(self, config: RunConfig, history: History, candidates: list[Candidate]) -> None:
        #: The epoch under which the cluster last served; None before it has.
        self._served: int | None = None
        #: What was counted so far.
        self._duplicated = self._diverged = self._takeovers = 0
        precision = config.precision
        metrics.RUN.info({"id": history.run, "version": distribution_version("windlass")})
        metrics.TARGET_STEPS.set(config.training.end)
        metrics.SHARDS_EXPECTED.set(config.cluster.shards)
        metrics.STANDBYS_EXPECTED.set(config.cluster.shards * config.cluster.standbys)
        metrics.WORKERS_EXPECTED.set(config.cluster.workers)
        metrics.LOSS_SCALE_FLOOR.set(precision.loss_scale.minimum if is_dynamic(precision) else 0.0)
        metrics.CHECKPOINT_EVERY.set(config.checkpoint.every_steps)
        # Zero would be a value; what is not known yet is a gap in a graph.
        for gauge in (metrics.LOSS, metrics.EVALUATION_LOSS, metrics.LEARNING_RATE, metrics.GRADIENT_NORM):
            gauge.set(math.nan)
        if history.evaluations:
            metrics.EVALUATION_LOSS.set(history.evaluations[max(history.evaluations)]["loss"])
        metrics.COMMIT_TIME.set(_last_commit(config.run_dir))
        newest = max(candidates, key=lambda candidate: candidate.state.version, default=None)
        if newest is not None:
            metrics.CHECKPOINT_VERSION.set(newest.state.version)
            manifest = config.checkpoint_dir / newest.name / MANIFEST_NAME
            if manifest.exists():
                metrics.CHECKPOINT_TIME.set(manifest.stat().st_mtime)

    def look(self, machine: Machine) -> None:
        """Show where the run stands."""
        members, state = machine.members, machine.state
        metrics.STEP.set(state.version)
        metrics.APPLIED.set(state.applied)
        metrics.LOSS_SCALE.set(state.scaler.scale)
        metrics.EPOCH.set(machine.fence.epoch)
        metrics.TERM.set(machine.fence.term)
        metrics.CHECKPOINTS_DAMAGED.set(len(machine.snapshots.rejected))
        metrics.WORKERS_LIVE.set(len(members.live_workers()))
        metrics.SHARDS_LIVE.set(machine.config.cluster.shards - len(members.missing_shards()))
        # One that has left by its own will is not ready any more.
        metrics.WORKERS_LOST.set(sum(member.ready and not member.live for member in members.of(Role.WORKER)))
        standbys, duplicated = machine.standbys, machine.steps.duplicated
        metrics.STANDBYS_IN_SYNC.set(len(machine.history.standbys))
        metrics.DUPLICATED.inc(duplicated - self._duplicated)
        metrics.STANDBYS_DIVERGED.inc(standbys.diverged - self._diverged)
        metrics.TAKEOVERS.inc(standbys.takeovers - self._takeovers)
        self._duplicated, self._diverged, self._takeovers = duplicated, standbys.diverged, standbys.takeovers
        if machine.phase is Phase.RUNNING and self._served != machine.fence.epoch:
            metrics.RECOVERIES.inc(int(self._served is not None))
            self._served = machine.fence.epoch


def _last_commit(run_dir: Path) -> float:
    """When the last step was committed, as far as it is a matter of this start; else now, Unix time.

    A coordinator that dies again and again must not look as if it had just committed something, and
    a run that goes on after a night not as if it had hung.
    """
    now = time.time()
    try:
        written = (run_dir / METRICS_NAME).stat().st_mtime
    except OSError:
        return now
    return written if now - written < RESTART_S else now


def count_contribution(rank: int, spent: Spent) -> None:
    """Show who has computed a contribution, and how long each part took."""
    worker = peer(Role.WORKER, rank)
    metrics.CONTRIBUTIONS.labels(worker).inc()
    for phase, seconds in (("compute", spent.compute_s), ("push", spent.push_s), ("pull", spent.pull_s)):
        metrics.CONTRIBUTION_SECONDS.labels(worker, phase).inc(seconds)
