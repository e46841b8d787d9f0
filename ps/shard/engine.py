"""One shard at work: the step protocol, its kernels on a pool of threads, and what waits for them.

Every change of the protocol's state happens under one lock; kernels run outside of it. Streams that
wait for something to send are woken whenever a chunk is published or the fence moves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ps import failpoints
from ps.config import RunConfig
from ps.errors import MismatchError, NotServing, PsError, StaleFence, WaitTimeout
from ps.kernels import reduce as kernels
from ps.kernels.digest import hash_payload
from ps.kernels.update import Update
from ps.machine import available_cores
from ps.shard import metrics
from ps.shard.follower import Follower
from ps.shard.journal import Journal, NoJournal, make_journal
from ps.shard.mirroring import Mirroring
from ps.shard.protocol import Accepted, StepProtocol, StepShape
from ps.shard.records import Base, Decided, Reopened
from ps.shard.reduction import ChunkReduction, FoldJob, ReductionJob
from ps.shard.replicator import Opener
from ps.shard.restoring import Restoration, read_state
from ps.shard.snapshot import SnapshotTarget
from ps.shard.snapshots import MAX_SNAPSHOTS, Snapshots
from ps.shard.store import Store
from ps.shard.threads import kernel_threads
from ps.sharding import Chunk, Plan, make_plan
from ps.storage.layout import checkpoint_folder
from ps.storage.manifest import read_manifest
from ps.storage.shard_file import ShardFile
from ps.telemetry import logs
from ps.telemetry.trace import Recorder
from ps.types import Applied, Decision, Fence, ParameterTable, Prepared
from ps.wire.messages import Initialize, Mirror, Push
from ps.wire.shared_memory import Segment

log = logging.getLogger(__name__)

#: A push of the next step waits so long for the decision of the open one.
OPEN_S = 5.0
#: What the kernels at work may take to end before state is loaded.
QUIESCE_S = 60.0


@dataclass
class Outbox:
    """What the shard tells the coordinator, as callbacks; set by the session."""

    prepared: Callable[[Prepared], None] = field(default=lambda _: None)
    applied: Callable[[Applied], None] = field(default=lambda _: None)
    initialized: Callable[[Fence, int], None] = field(default=lambda _fence, _shard: None)
    snapshot: Callable[[SnapshotTarget, ShardFile | PsError], None] = field(default=lambda _target, _result: None)
    failed: Callable[[BaseException], None] = field(default=lambda _: None)


class ShardEngine:
    """The state and the work of one shard of one run. Thread-safe."""

    def __init__(
        self,
        config: RunConfig,
        run: str,
        table: ParameterTable,
        shard: int,
        contributions: int,
        shards_on_machine: int = 1,
    ) -> None:
        self.config = config
        self.run = run
        self.plan: Plan = make_plan(table, config.cluster.shards)
        self.shard = shard
        self.chunks = self.plan.chunks_of(shard)
        dtype = config.precision.wire
        shape = StepShape(
            run, config.batch.micro_batches_per_step, contributions, dtype, config.determinism == "strict"
        )
        self.protocol = StepProtocol(self.plan, shard, shape)
        self.store = Store(self.chunks, Update(config.optimizer, dtype), dtype, eager=config.is_eager)
        self.journal: Journal = make_journal(config, shard, self.store.num_elements)
        #: The epoch of the run's last rollback, as the coordinator says with every call.
        self.lineage = 0
        self.outbox = Outbox()
        self.trace = Recorder(config.traced_steps)
        #: Guards the protocol.
        self.lock = threading.RLock()
        #: Notified when another step is open.
        self.opened = threading.Condition(self.lock)
        #: Streams that wait, each with a condition over `lock`, and how many chunks the open step must have published
        #: before one has something to send; None: that is not what it waits for.
        self.waiting: dict[threading.Condition, int | None] = {}
        self.has_state = False
        #: A checkpoint is in place, and becomes the state when the coordinator says so.
        self._loaded = False
        asked, cores = config.cluster.threads_per_shard, available_cores()
        self.threads = kernel_threads(asked, cores, shards_on_machine, len(self.chunks))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="kernel")
        self._snapshots = Snapshots(self.store, self.lock, self._holds, lambda *ended: self.outbox.snapshot(*ended))
        self._mirroring = Mirroring(self.protocol, self.store, self.lock, lambda report: self.outbox.prepared(report))
        #: What this process holds as a standby; None: it is the shard.
        self.follower: Follower | None = None
        self._prepared_ns = 0
        self._last_applied: Applied | None = None
        #: Hash of the state at the open version, before any of its chunks was updated.
        self.state_hash = 0
        metrics.ELEMENTS.set(self.store.num_elements)
        metrics.KERNEL_THREADS.set(self.threads)

    def close(self) -> None:
        """Stop the kernel threads; pending work is dropped."""
        with self.lock:
            self._mirroring.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._snapshots.wait(0, self.config.checkpoint.timeout_s)
        self.journal.close()

    def _wake(self) -> None:
        """Any stream may have something to send; called with the lock held."""
        for stream in self.waiting:
            stream.notify()
        self.waiting.clear()

    def _wake_for_weights(self) -> None:
        """Streams may have enough of the open step to send; called with the lock held."""
        there = len(self.store.news)
        for stream, needed in list(self.waiting.items()):
            if needed is not None and needed <= there:
                stream.notify()
                del self.waiting[stream]

    # -- Control --------------------------------------------------------------------------------

    def adopt(self, fence: Fence) -> None:
        with self.lock:
            self._adopt(fence)
            self.opened.notify_all()
            self._wake()

    def load(self, fence: Fence, checkpoint: Path | None, manifest_sha256: str) -> None:
        """Forget everything and take the state of a checkpoint, or await initial values.

        It counts as a state once it is served: until the rollback is journaled, a coordinator that starts
        anew would take it for that of a shard which only has not heard the last decision.

        Raises:
            CheckpointDamaged, StorageError: the checkpoint cannot be used; the shard holds no state.
            MismatchError: it is not the coordinator's, or another model's.
            WaitTimeout: kernels are still at work.
        """
        with self.lock:
            self._adopt(fence)
            if self.follower is not None:
                self.follower = None
                self.journal = make_journal(self.config, self.shard, self.store.num_elements)
            self.protocol.close()
            self.has_state = self._loaded = False
            self._last_applied = None
            self._mirroring.forget_report()
            self.opened.notify_all()
            self._wake()
        self._quiesce()
        # Only now: the snapshots that were waited for have just ended.
        self._snapshots.forget()
        self.store.clear()
        if checkpoint is None:
            with self.lock:
                self.protocol.await_initial_values()
            return
        manifest, digest = read_manifest(checkpoint)
        if digest != manifest_sha256:
            raise MismatchError(f"{checkpoint}/manifest.json is not the one that the coordinator read")
        read_state(self.store, self.plan, checkpoint, manifest)
        with self.lock:
            self.protocol.restored(manifest.version, manifest.applied, manifest.scaler.scale)
            self.state_hash = self.store.state_hash
            self._loaded = True
        log.info("loaded version %d from %s", manifest.version, checkpoint)

    def restore(self, fence: Fence) -> None:
        """Take up what a former life of this shard has written down; without it the shard holds no state.

        Called once, before anything else. What is held of the open step is told when the shard serves.
        """
        with self.lock:
            self.protocol.adopt(fence)
        found = self.journal.open()
        if found is None:
            return
        restoration = Restoration(found, self.run, self.lineage, self.store, self.protocol, self._for_each)
        try:
            restoration.restore(self.config.checkpoint_dir)
        except PsError as error:
            log.warning("the journal %s is of no use: %s", found.folder, error.message)
            self.store.clear()
            with self.lock:
                self.protocol.close()
                self.protocol.restored(0, 0, self.protocol.loss_scale)
            return
        with self.lock:
            self.state_hash = self.store.state_hash
            self.has_state = True
            self.journal.go_on(self.protocol.step - (not self.protocol.chunks_reduced))
        metrics.STEP.set(self.protocol.step)
        logs.bind(step=self.protocol.step)

    def _for_each(self, work: Callable[[Chunk], None], chunks: Iterable[Chunk]) -> None:
        """Do something with each chunk, on all threads; returns when all is done."""
        for _ in self._pool.map(work, chunks):
            pass

    def _quiesce(self) -> None:
        """Wait until no kernel and no snapshot touches the arrays any more.

        Raises:
            WaitTimeout: a kernel does not end; asking again may succeed.
        """
        barrier = threading.Barrier(self.threads + 1)
        for _ in range(self.threads):
            self._pool.submit(barrier.wait, QUIESCE_S)
        try:
            barrier.wait(QUIESCE_S)
        except threading.BrokenBarrierError:
            raise WaitTimeout(
                f"shard {self.shard}: its kernel threads are still busy after {QUIESCE_S:.0f} s"
            ) from None
        self._snapshots.wait(0, self.config.checkpoint.timeout_s)

    def serve(self, fence: Fence, step: int, applied: int, loss_scale: float) -> None:
        """Open for workers under this fence."""
        with self.lock:
            self._adopt(fence)
            before = self.protocol.loss_scale
            takes_over = self.follower is not None
            if takes_over:
                failpoints.hit("promote.before")
            self.protocol.serve(step, applied, loss_scale)
            if takes_over:
                # From now on it is the shard; its journal begins with the next checkpoint.
                self.follower = None
                self.journal = make_journal(self.config, self.shard, self.store.num_elements)
                failpoints.hit("promote.after")
            if self._loaded:
                self.has_state, self._loaded = True, False
                self.journal.begin(self._base(), anew=True)
            elif self.protocol.loss_scale != before:
                self.journal.note(Reopened(step, loss_scale))
            self._mirroring.forget_report()
            self._report_if_prepared()
            self._wake()

    def _adopt(self, fence: Fence) -> None:
        before = self.protocol.fence
        self.protocol.adopt(fence)
        if fence > before:
            # The coordinator says anew who stands by, and for whom.
            self._mirroring.stop()
            if self.follower is not None:
                self.follower.close()

    # -- Standby --------------------------------------------------------------------------------

    def follow(self, fence: Fence, step: int, applied: int, loss_scale: float, keep: bool) -> None:
        """Stand by for the shard of this index.

        Args:
            step: decided steps of the run; what the shard sends is of this version or later ones.
            keep: what is held already counts.

        Raises:
            WaitTimeout: kernels are still at work.
        """
        with self.lock:
            self._adopt(fence)
            if keep and self.follower is not None:
                return
            if self.follower is not None:
                self.follower.forget("its shard does not count on it")
            # The shard writes it.
            self.journal.close()
            self.journal = NoJournal()
            self.protocol.close()
            self.has_state = self._loaded = False
            self._last_applied = None
            self._mirroring.forget_report()
        self._quiesce()
        with self.lock:
            self.protocol.restored(step, applied, loss_scale)
            self.follower = Follower(self)
            self.opened.notify_all()

    def replicate(self, greeting: Mirror, address: str, opener: Opener) -> None:
        """Send to a standby what is reduced, and the state so far; an empty address: to none any more.

        Raises:
            StaleFence: the greeting's fence is not the present one.
        """
        with self.lock:
            if greeting.fence != self.protocol.fence:
                raise StaleFence(f"a standby under {greeting.fence}, where this shard is at {self.protocol.fence}")
            self._mirroring.begin(greeting, address, opener)

    def note_followed(self, applied: Applied) -> None:
        """A decision was carried out on what a standby holds so far."""
        self._last_applied = applied
        self.outbox.applied(applied)

    # -- Frames ---------------------------------------------------------------------------------

    def share(self) -> Segment:
        """Publish in shared memory too; returns where.

        Raises:
            SharedMemoryError: there is none, or not enough.
        """
        with self.lock:
            return self.store.publication.share()

    def push(self, header: Push, payload: memoryview, *, shared: bool = False) -> Accepted:
        """Take one chunk of a contribution.

        Args:
            shared: the payload is in shared memory: there is no way on which it could have been damaged.

        Raises:
            Refusal: by name; nothing has changed.
        """
        payload_hash = header.hash if shared else hash_payload(payload)
        with self.lock:
            if self.protocol.is_early(header):
                # Its worker has every weight of the next version, and was faster than the decision that opens it.
                self.opened.wait_for(lambda: not self.protocol.is_early(header), OPEN_S)
            accepted = self.protocol.push(header, payload, payload_hash)
            if accepted.conflicting:
                metrics.CONFLICTS.inc()
                log.warning(
                    "step %d: contribution %d, chunk %d came again with other bits; the first stands",
                    header.step,
                    header.contribution,
                    header.chunk,
                )
            if accepted.job is not None:
                self._submit(accepted.job)
        metrics.PUSHED_FRAMES.labels("duplicate" if accepted.duplicate else "held").inc()
        return accepted

    def initialize(self, header: Initialize, payload: memoryview) -> bool:
        """Take the initial values of a chunk; returns whether they had come before.

        Raises:
            Refusal: by name; nothing has changed.
        """
        payload_hash = hash_payload(payload)
        with self.lock:
            chunk, new = self.protocol.initialize(header, payload, payload_hash)
            if not new:
                return True
            self.store.weights(chunk)[:] = np.frombuffer(payload, np.float32)
            self.store.publish(chunk, self.store.encode(chunk, 0, 0))
            if self.protocol.initialized(chunk):
                self.has_state = True
                self.state_hash = self.store.state_hash
                # Now, since gradients may come before the first checkpoint is asked for.
                self.journal.begin(self._base(), anew=True)
                self.outbox.initialized(self.protocol.fence, self.shard)
            self._wake()
        return False

    # -- Decisions ------------------------------------------------------------------------------

    def decide(self, decision: Decision) -> None:
        """Carry out a decision; hearing it again only repeats the acknowledgement."""
        with self.lock:
            before = self.protocol.step
            chunks = self.protocol.decide(decision)
            if decision.step < before:
                if self._last_applied is not None and self._last_applied.step == decision.step:
                    self.outbox.applied(self._last_applied)
                return
            if self.protocol.deciding is decision or self.protocol.step > before:
                self.trace.add("wait for the decision", "wait", decision.step, self._prepared_ns, track="decision")
                self.journal.note(Decided(decision, self.state_hash))
            self._submit_updates(decision, chunks)
            if self.protocol.step > before:
                # Nothing is to be updated, or everything is.
                for index, published in self.store.published.items():
                    self.store.published[index] = replace(published, version=decision.version)
                self._close_step(decision)

    def foresee(self, decision: Decision) -> None:
        """Update chunks as they are reduced, by what the decision of their step will be."""
        if not self.config.is_eager:
            # The coordinator was started anew with another job: here nothing is published beside the newest version.
            return
        with self.lock:
            self._submit_updates(decision, self.protocol.foresee(decision))

    def _submit_updates(self, decision: Decision, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            metrics.JOBS_WAITING.inc()
            self._pool.submit(self._guarded, self._apply, decision, chunk)

    def _apply(self, decision: Decision, chunk: Chunk) -> None:
        present = self._begin_update(decision, chunk)
        if present is None:
            return
        with metrics.APPLY_SECONDS.time(), self.trace.span("apply", "apply", decision.step, chunk=chunk.index):
            failpoints.hit("apply.before")
            published = self.store.apply(chunk, present, decision)
            failpoints.hit("apply.after")
        metrics.APPLIED_ELEMENTS.inc(chunk.size)
        mirrored = self._mirroring.copy(chunk, decision)
        with self.lock:
            self._mirroring.send(chunk, mirrored)
            failpoints.hit("publish.before")
            self.store.publish(chunk, published)
            failpoints.hit("publish.after")
            closing = self.protocol.deciding
            if self.protocol.published(chunk) and closing is not None:
                self._close_step(closing)
            else:
                self._wake_for_weights()

    def _begin_update(self, decision: Decision, chunk: Chunk) -> np.ndarray | None:
        """Wait until a chunk may change; returns which of its runs do. None: it must not, by this decision."""
        while True:
            # A disk slower than the steps slows the steps down; it never piles up copies.
            self._snapshots.wait(MAX_SNAPSHOTS, self.config.checkpoint.timeout_s)
            protected = self._snapshots.pending
            for snapshot in protected:
                snapshot.protect(chunk)
            with self.lock:
                if any(snapshot not in protected for snapshot in self._snapshots.pending):
                    # It was asked for meanwhile, of the state before this update.
                    continue
                if not self.protocol.begin_update(chunk, decision):
                    return None
                self.store.retract(chunk)
                return self.protocol.present(chunk)

    def _close_step(self, decision: Decision) -> None:
        """The decision is carried out; called with the lock held."""
        metrics.STEP.set(decision.version)
        logs.bind(step=decision.version)
        self._mirroring.forget_report()
        if self.follower is not None:
            self.follower.advanced()
        self.state_hash = self.store.state_hash
        self.store.close_step()
        self.opened.notify_all()
        if decision.snapshot and self.follower is None:
            self.snapshot(decision.version, decision.fence)
        self._last_applied = Applied(self.protocol.fence, decision.step, self.shard, self.state_hash)
        failpoints.hit("applied.before")
        self.outbox.applied(self._last_applied)
        failpoints.hit("applied.after")
        self._wake()

    def resend(self) -> None:
        """Tell the coordinator again what it may not have heard."""
        with self.lock:
            if self._last_applied is not None and self._last_applied.fence == self.protocol.fence:
                self.outbox.applied(self._last_applied)
            if self._mirroring.told is not None:
                self.outbox.prepared(self._mirroring.told)
            if self.has_state and self.protocol.step == 0 and self.protocol.serving:
                self.outbox.initialized(self.protocol.fence, self.shard)

    def resend_all(self) -> None:
        """After a new connection: everything, snapshots too."""
        self.resend()
        self._snapshots.tell_again()

    # -- Snapshots ------------------------------------------------------------------------------

    def snapshot(self, version: int, fence: Fence | None = None) -> None:
        """Begin to write the present state; the result goes to the outbox. Lock held or not.

        Args:
            fence: under which it was asked for, which the result names: one that was asked for before a new
                coordinator emptied the folder is not there any more. None: the present one.

        Raises:
            StaleFence: the fence is older than the present one.
            NotServing: the present state is not that version.
        """
        with self.lock:
            fence = fence or self.protocol.fence
            if fence < self.protocol.fence:
                raise StaleFence(f"a checkpoint under {fence}, where this shard is at {self.protocol.fence}")
            if not self._holds(version):
                raise NotServing(f"shard {self.shard} is at version {self.protocol.step}, not {version}")
            if self._snapshots.knows(version, fence):
                return
            target = SnapshotTarget(
                checkpoint_folder(self.config.checkpoint_dir, version),
                version,
                self.shard,
                self.plan.num_shards,
                {"format": "windlass", "run": self.run, "version": str(version)},
                fence,
            )
            self.journal.begin(self._base())
            self._snapshots.begin(target)

    def _holds(self, version: int) -> bool:
        """Whether the state is that of a version, and of no other."""
        return self.has_state and self.protocol.step == version and not self.protocol.is_between

    def _base(self) -> Base:
        """The present state, as a beginning."""
        return Base(self.run, self.lineage, self.shard, self.plan.digest, self.protocol.step, self.state_hash)

    # -- Reduction ------------------------------------------------------------------------------

    def _submit(self, job: ReductionJob) -> None:
        metrics.JOBS_WAITING.inc()
        self._pool.submit(self._guarded, self._reduce, job, self.protocol.reduction(job.chunk.index))

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        metrics.JOBS_WAITING.dec()
        try:
            work(*arguments)
        except BaseException as error:
            log.exception("a kernel thread failed")
            self.outbox.failed(error)

    def _reduce(self, job: ReductionJob, reduction: ChunkReduction) -> None:
        with self.lock:
            if not self.protocol.is_current(job, reduction):
                return
            step = self.protocol.step
        gradients = [held.gradient for held in job.held]
        weights = [held.slots for held in job.held]
        dtype = self.config.precision.wire
        name = "fold" if isinstance(job, FoldJob) else "reduce"
        with metrics.REDUCE_SECONDS.time(), self.trace.span(name, "reduce", step, chunk=job.chunk.index):
            if isinstance(job, FoldJob):
                if reduction.accumulator is None:
                    reduction.accumulator = np.zeros(job.chunk.size, np.float64)
                kernels.fold(reduction.accumulator, gradients, weights, dtype)
            else:
                kernels.reduce(
                    gradients,
                    weights,
                    reduction.accumulator,
                    self.config.batch.micro_batches_per_step,
                    dtype,
                    self.store.mean(job.chunk),
                    self.store.square_sums(job.chunk),
                )
                metrics.REDUCED_ELEMENTS.inc(job.chunk.size)
        if self.journal.is_on and not isinstance(job, FoldJob):
            self._write_down(job, reduction)
        with self.lock:
            if not self.protocol.is_current(job, reduction):
                return
            following = reduction.done(job)
            if following is not None:
                self._submit(following)
            if reduction.reduced:
                reduction.finite = bool(np.isfinite(self.store.square_sums(job.chunk)).all())
                self._mirroring.reduced(job.chunk)
            foregone = self.protocol.foregone
            self._report_if_prepared()
        if reduction.reduced and foregone is not None:
            # While what was reduced is still in the cache.
            self._apply(foregone, job.chunk)

    def _write_down(self, job: ReductionJob, reduction: ChunkReduction) -> None:
        """Write what was reduced into the journal, before anybody hears of it and anything is updated by it."""
        square_sums = tuple(map(float, self.store.square_sums(job.chunk)))
        with self.lock:
            if not self.protocol.is_current(job, reduction):
                return
            record = self.protocol.record(job.chunk, square_sums)
        with self.trace.span("write", "journal", record.step, chunk=record.chunk):
            self.journal.note(record, self.store.mean(job.chunk))

    def _report_if_prepared(self) -> None:
        if self._mirroring.has_report:
            return
        if not self.protocol.serving or not self.protocol.all_reduced or self.protocol.deciding is not None:
            return
        self._prepared_ns = time.monotonic_ns()
        report = replace(self.protocol.prepared(self.store.all_square_sums()), journal_full=self.journal.is_full)
        self._mirroring.report(report)
