"""The kernels that make a chunk's mean gradient of the contributions that have come, and write it down."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ps.kernels import reduce as kernels
from ps.shard import metrics
from ps.shard.journal import Journal
from ps.shard.kernel_pool import KernelPool
from ps.shard.protocol import StepProtocol
from ps.shard.reduction import ChunkReduction, FoldJob, ReductionJob
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.telemetry.trace import Recorder


class Reducing:
    """Carries out the jobs that the protocol hands out. Thread-safe.

    Args:
        lock: the shard's, which guards the protocol.
        journal: the present one.
        reduced: called with the lock held, right after the last job of a chunk. What it returns, if anything, is done
            right after it without the lock, while the chunk is still in the cache.
    """

    def __init__(
        self,
        protocol: StepProtocol,
        store: Store,
        lock: threading.RLock,
        pool: KernelPool,
        trace: Recorder,
        journal: Callable[[], Journal],
        reduced: Callable[[Chunk], Callable[[], None] | None],
    ) -> None:
        self._protocol = protocol
        self._store = store
        self._lock = lock
        self._pool = pool
        self._trace = trace
        self._journal = journal
        self._reduced = reduced

    def submit(self, job: ReductionJob) -> None:
        """Have a job of the open step done; called with the lock held."""
        self._pool.submit(self._reduce, job, self._protocol.reduction(job.chunk.index))

    def _reduce(self, job: ReductionJob, reduction: ChunkReduction) -> None:
        with self._lock:
            if not self._protocol.is_current(job, reduction):
                return
            step = self._protocol.step
        name = "fold" if isinstance(job, FoldJob) else "reduce"
        with metrics.REDUCE_SECONDS.time(), self._trace.span(name, "reduce", step, chunk=job.chunk.index):
            self._run(job, reduction)
        journal = self._journal()
        if journal.is_on and not isinstance(job, FoldJob):
            self._write_down(journal, job, reduction)
        following = None
        with self._lock:
            if not self._protocol.is_current(job, reduction):
                return
            next_job = reduction.done(job)
            if next_job is not None:
                self.submit(next_job)
            if reduction.reduced:
                reduction.finite = bool(np.isfinite(self._store.square_sums(job.chunk)).all())
                following = self._reduced(job.chunk)
        if following is not None:
            following()

    def _run(self, job: ReductionJob, reduction: ChunkReduction) -> None:
        shape = self._protocol.shape
        gradients = [held.gradient for held in job.held]
        weights = [held.slots for held in job.held]
        if isinstance(job, FoldJob):
            if reduction.accumulator is None:
                reduction.accumulator = np.zeros(job.chunk.size, np.float64)
            kernels.fold(reduction.accumulator, gradients, weights, shape.dtype)
            return
        kernels.reduce(
            gradients,
            weights,
            reduction.accumulator,
            shape.slots,
            shape.dtype,
            self._store.mean(job.chunk),
            self._store.square_sums(job.chunk),
        )
        metrics.REDUCED_ELEMENTS.inc(job.chunk.size)

    def _write_down(self, journal: Journal, job: ReductionJob, reduction: ChunkReduction) -> None:
        """Write what was reduced, before anybody hears of it and anything is updated by it."""
        square_sums = tuple(map(float, self._store.square_sums(job.chunk)))
        with self._lock:
            if not self._protocol.is_current(job, reduction):
                return
            record = self._protocol.record(job.chunk, square_sums)
        with self._trace.span("write", "journal", record.step, chunk=record.chunk):
            journal.note(record, self._store.mean(job.chunk))
