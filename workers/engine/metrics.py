"""The metrics of a worker; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Histogram

from ps.telemetry.buckets import PHASE_S

COMPUTE_SECONDS = Histogram("windlass_compute_seconds", "Forward and backward of one contribution", buckets=PHASE_S)
PUSH_SECONDS = Histogram("windlass_push_seconds", "Sending one contribution, beyond computing it", buckets=PHASE_S)
PULL_SECONDS = Histogram("windlass_pull_seconds", "Waiting for one version, while nothing is computed", buckets=PHASE_S)
