"""The metrics of a shard; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from ps.telemetry.buckets import KERNEL_S
from ps.telemetry.metrics import RECEIVED_BYTES, SENT_BYTES, STEP

ELEMENTS = Gauge("windlass_shard_elements", "Elements of the flat space that this shard holds, padding included")
STREAMS = Gauge("windlass_streams", "Open tensor streams")
SHARED_STREAMS = Gauge("windlass_shared_memory_streams", "Tensor streams whose payloads go through shared memory")
PUSHED_FRAMES = Counter("windlass_pushed_frames", "Pushed chunks, by what became of them", ["outcome"])
REFUSED_FRAMES = Counter("windlass_refused_frames", "Frames that were refused, by error code", ["code"])
CONFLICTS = Counter("windlass_conflicting_contributions", "Chunks that came again with other bits")
REDUCE_SECONDS = Histogram("windlass_reduce_seconds", "Reducing or folding one chunk", buckets=KERNEL_S)
APPLY_SECONDS = Histogram("windlass_apply_seconds", "Updating and publishing one chunk", buckets=KERNEL_S)
SNAPSHOT_FAILURES = Counter("windlass_snapshot_failures", "Checkpoint files that could not be written")

__all__ = [
    "APPLY_SECONDS",
    "CONFLICTS",
    "ELEMENTS",
    "PUSHED_FRAMES",
    "RECEIVED_BYTES",
    "REDUCE_SECONDS",
    "REFUSED_FRAMES",
    "SENT_BYTES",
    "SHARED_STREAMS",
    "SNAPSHOT_FAILURES",
    "STEP",
    "STREAMS",
]
