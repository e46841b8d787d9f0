"""One shard at work: the step protocol, its kernels on a pool of threads, and what waits for them.

Every change of the protocol's state happens under one lock; kernels run outside of it. Streams that
wait for something to send are woken whenever a chunk is published or the fence moves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial

import numpy as np

from ps import failpoints
from ps.config import RunConfig
from ps.errors import NotServing, PsError, StaleFence
from ps.kernels.digest import hash_payload
from ps.kernels.update import Update
from ps.machine import available_cores
from ps.shard import metrics
from ps.shard.follower import Follower
from ps.shard.journal import Journal, make_journal
from ps.shard.kernel_pool import KernelPool
from ps.shard.mirroring import Mirroring
from ps.shard.protocol import Accepted, StepProtocol, StepShape
from ps.shard.records import Base, Decided
from ps.shard.reducing import Reducing
from ps.shard.snapshot import SnapshotTarget
from ps.shard.snapshots import MAX_SNAPSHOTS, Snapshots
from ps.shard.store import Store
from ps.shard.threads import kernel_threads
from ps.sharding import Chunk, Plan, make_plan
from ps.storage.layout import checkpoint_folder
from ps.storage.shard_file import ShardFile
from ps.telemetry import logs
from ps.telemetry.trace import Recorder
from ps.types import Applied, Decision, Fence, ParameterTable, Prepared
from ps.wire.messages import Initialize, Push
from ps.wire.shared_memory import Segment

log = logging.getLogger(__name__)

#: A push of the next step waits so long for the decision of the open one.
OPEN_S = 5.0


@dataclass
class Outbox:
    """What the shard tells the coordinator, as callbacks; set by the session."""

    prepared: Callable[[Prepared], None] = field(default=lambda _: None)
    applied: Callable[[Applied], None] = field(default=lambda _: None)
    initialized: Callable[[Fence, int], None] = field(default=lambda _fence, _shard: None)
    snapshot: Callable[[SnapshotTarget, ShardFile | PsError], None] = field(default=lambda _target, _result: None)
    failed: Callable[[BaseException], None] = field(default=lambda _: None)


class Held(Enum):
    """What state a shard holds; what a standby holds, its follower says."""

    NOTHING = auto()
    #: A checkpoint is in place, and becomes the state when the coordinator says so.
    LOADED = auto()
    STATE = auto()


class ShardEngine:
    """The state and the work of one shard of one run, step by step. Thread-safe.

    What the process is to the run, and where its state comes from, is decided by its seat (`ps.shard.seat`).
    """

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
        self.held = Held.NOTHING
        #: What this process holds as a standby; None: it is the shard.
        self.follower: Follower | None = None
        asked, cores = config.cluster.threads_per_shard, available_cores()
        threads = kernel_threads(asked, cores, shards_on_machine, len(self.chunks))
        self.kernels = KernelPool(threads, lambda error: self.outbox.failed(error))
        self.snapshots = Snapshots(self.store, self.lock, self._holds, lambda *ended: self.outbox.snapshot(*ended))
        self.mirroring = Mirroring(self.protocol, self.store, self.lock, lambda report: self.outbox.prepared(report))
        self._reducing = Reducing(
            self.protocol, self.store, self.lock, self.kernels, self.trace, lambda: self.journal, self._reduced
        )
        self._prepared_ns = 0
        #: As the coordinator was told of it.
        self.last_applied: Applied | None = None
        metrics.ELEMENTS.set(self.store.num_elements)

    @property
    def has_state(self) -> bool:
        """The state of a version is held, whole."""
        with self.lock:
            return self.held is Held.STATE if self.follower is None else self.follower.is_whole

    def close(self) -> None:
        """Stop the kernel threads; pending work is dropped."""
        with self.lock:
            self.mirroring.stop()
        self.kernels.close()
        self.snapshots.wait(0, self.config.checkpoint.timeout_s)
        self.journal.close()

    def quiesce(self) -> None:
        """Wait until no kernel and no snapshot touches the arrays any more.

        Raises:
            WaitTimeout: a kernel does not end; asking again may succeed.
        """
        self.kernels.quiesce()
        self.snapshots.wait(0, self.config.checkpoint.timeout_s)

    def wake(self) -> None:
        """Another step or fence may be there, and something for any stream to send; called with the lock held."""
        self.opened.notify_all()
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
                self._reducing.submit(accepted.job)
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
                self.held = Held.STATE
                self.store.close_step()
                # Now, since gradients may come before the first checkpoint is asked for.
                self.journal.begin(self.base(), anew=True)
                self.outbox.initialized(self.protocol.fence, self.shard)
            self.wake()
        return False

    # -- Decisions ------------------------------------------------------------------------------

    def decide(self, decision: Decision) -> None:
        """Carry out a decision; hearing it again only repeats the acknowledgement."""
        with self.lock:
            before = self.protocol.step
            chunks = self.protocol.decide(decision)
            if decision.step < before:
                if self.last_applied is not None and self.last_applied.step == decision.step:
                    self.outbox.applied(self.last_applied)
                return
            if self.protocol.deciding is decision or self.protocol.step > before:
                self.trace.add("wait for the decision", "wait", decision.step, self._prepared_ns, track="decision")
                self.journal.note(Decided(decision, self.store.version_hash))
                self.mirroring.decided(decision)
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
            self.kernels.submit(self._apply, decision, chunk)

    def _apply(self, decision: Decision, chunk: Chunk) -> None:
        present = self._begin_update(decision, chunk)
        if present is None:
            return
        with metrics.APPLY_SECONDS.time(), self.trace.span("apply", "apply", decision.step, chunk=chunk.index):
            failpoints.hit("apply.before")
            published = self.store.apply(chunk, present, decision)
            failpoints.hit("apply.after")
        metrics.APPLIED_ELEMENTS.inc(chunk.size)
        mirrored = self.mirroring.copy(chunk, decision)
        with self.lock:
            self.mirroring.send(chunk, mirrored)
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
            self.snapshots.wait(MAX_SNAPSHOTS, self.config.checkpoint.timeout_s)
            protected = self.snapshots.pending
            for snapshot in protected:
                snapshot.protect(chunk)
            with self.lock:
                if any(snapshot not in protected for snapshot in self.snapshots.pending):
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
        self.mirroring.forget_report()
        if self.follower is not None:
            self.follower.advanced()
        self.store.close_step()
        if decision.snapshot and self.follower is None:
            self._begin_snapshot(decision.version, decision.fence)
        self._tell_applied(decision, self.store.version_hash)

    def went_on(self, decision: Decision) -> None:
        """A decision was carried out on what a standby holds so far."""
        self.store.close_step()
        self._tell_applied(decision, 0)

    def _tell_applied(self, decision: Decision, state_hash: int) -> None:
        self.last_applied = Applied(self.protocol.fence, decision.step, self.shard, state_hash)
        failpoints.hit("applied.before")
        self.outbox.applied(self.last_applied)
        failpoints.hit("applied.after")
        self.wake()

    def resend(self) -> None:
        """Tell the coordinator again what it may not have heard."""
        with self.lock:
            if self.last_applied is not None and self.last_applied.fence == self.protocol.fence:
                self.outbox.applied(self.last_applied)
            if self.mirroring.told is not None:
                self.outbox.prepared(self.mirroring.told)
            if self.has_state and self.protocol.step == 0 and self.protocol.serving:
                self.outbox.initialized(self.protocol.fence, self.shard)

    def resend_all(self) -> None:
        """After a new connection: everything, snapshots too."""
        self.resend()
        self.snapshots.tell_again()

    # -- Snapshots ------------------------------------------------------------------------------

    def snapshot(self, version: int, fence: Fence) -> None:
        """Begin to write the present state; the result goes to the outbox. Lock held or not.

        Args:
            fence: under which it is asked for.

        Raises:
            StaleFence: the fence is older than the present one.
            NotServing: the present state is not that version.
        """
        with self.lock:
            if fence < self.protocol.fence:
                raise StaleFence(f"a checkpoint under {fence}, where this shard is at {self.protocol.fence}")
            if not self._holds(version):
                raise NotServing(f"shard {self.shard} is at version {self.protocol.step}, not {version}")
            self._begin_snapshot(version, fence)

    def _begin_snapshot(self, version: int, fence: Fence) -> None:
        """Write the present state, or say that it is written; called with the lock held.

        Args:
            fence: which the result names: what was asked for before a new coordinator emptied the folder is not there
                any more. That of a decision may be older than the present one, which came while it was carried out.
        """
        if self.snapshots.knows(version, fence):
            return
        target = SnapshotTarget(
            checkpoint_folder(self.config.checkpoint_dir, version),
            version,
            self.shard,
            self.plan.num_shards,
            {"format": "windlass", "run": self.run, "version": str(version)},
            fence,
        )
        self.journal.begin(self.base())
        self.snapshots.begin(target)

    def _holds(self, version: int) -> bool:
        """Whether the state is that of a version, and of no other."""
        return self.has_state and self.protocol.step == version and not self.protocol.is_between

    def base(self) -> Base:
        """The present state, as a beginning."""
        return Base(self.run, self.lineage, self.shard, self.plan.digest, self.protocol.step, self.store.version_hash)

    # -- Reduction ------------------------------------------------------------------------------

    def _reduced(self, chunk: Chunk) -> Callable[[], None] | None:
        self.mirroring.reduced(chunk)
        foregone = self.protocol.foregone
        self.report_if_prepared()
        return partial(self._apply, foregone, chunk) if foregone is not None else None

    def report_if_prepared(self) -> None:
        """Report the open step, if all of it is reduced and that was not done; called with the lock held."""
        if self.mirroring.has_report:
            return
        if not self.protocol.serving or not self.protocol.all_reduced or self.protocol.deciding is not None:
            return
        self._prepared_ns = time.monotonic_ns()
        report = replace(self.protocol.prepared(self.store.all_square_sums()), journal_full=self.journal.is_full)
        self.mirroring.report(report)
