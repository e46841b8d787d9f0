"""The metrics of a shard; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from ps.errors import Refusal
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
REDUCED_ELEMENTS = Counter("windlass_reduced_elements", "Elements whose contributions were all reduced")
APPLIED_ELEMENTS = Counter("windlass_applied_elements", "Elements that were updated")
KERNEL_THREADS = Gauge("windlass_kernel_threads", "Threads that run kernels")
JOBS_WAITING = Gauge("windlass_kernel_jobs_waiting", "Kernel jobs that wait for a thread")
SNAPSHOT_FAILURES = Counter("windlass_snapshot_failures", "Checkpoint files that could not be written")
JOURNAL_ON = Gauge("windlass_journal_on", "1 while every step is written down, so that none is lost with this process")
JOURNAL_BYTES = Gauge("windlass_journal_bytes", "Bytes of the journal's files")
JOURNAL_LIMIT = Gauge("windlass_journal_limit_bytes", "Bytes of a file of the journal over which a checkpoint is due")
JOURNAL_FAILURES = Counter("windlass_journal_failures", "Times that the journal could not be written")
REPLAYED_STEPS = Counter("windlass_replayed_steps", "Steps that were made again from the journal")

# From the start at zero: the first one is an increase as well.
for _outcome in ("held", "duplicate"):
    PUSHED_FRAMES.labels(_outcome)
for _refusal in Refusal.__subclasses__():
    REFUSED_FRAMES.labels(_refusal.code)

__all__ = [
    "APPLIED_ELEMENTS",
    "APPLY_SECONDS",
    "CONFLICTS",
    "ELEMENTS",
    "JOBS_WAITING",
    "JOURNAL_BYTES",
    "JOURNAL_FAILURES",
    "JOURNAL_LIMIT",
    "JOURNAL_ON",
    "KERNEL_THREADS",
    "PUSHED_FRAMES",
    "RECEIVED_BYTES",
    "REDUCED_ELEMENTS",
    "REDUCE_SECONDS",
    "REFUSED_FRAMES",
    "REPLAYED_STEPS",
    "SENT_BYTES",
    "SHARED_STREAMS",
    "SNAPSHOT_FAILURES",
    "STEP",
    "STREAMS",
]
