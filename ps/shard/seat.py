"""What a process is to its run: a shard that loads its state and serves, or a standby that follows one.

The coordinator says which, in calls that name a fence; what is done in between, step by step, is the engine's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from ps import failpoints
from ps.errors import MismatchError, PsError, StaleFence
from ps.shard import metrics
from ps.shard.doing import describe
from ps.shard.engine import Held, ShardEngine
from ps.shard.follower import Follower
from ps.shard.journal import NoJournal, make_journal
from ps.shard.records import Reopened
from ps.shard.replicator import Opener
from ps.shard.restoring import Restoration, read_state
from ps.storage.manifest import read_manifest
from ps.telemetry import logs
from ps.types import Decision, Fence, Role
from ps.wire.messages import Mirror

log = logging.getLogger(__name__)


class Closable(Protocol):
    """A stream from the shard that this process stands by for."""

    def close(self) -> None:
        """Take nothing more. Idempotent."""


class Seat:
    """One process's place in a run. Thread-safe; the coordinator's calls come one at a time."""

    def __init__(self, engine: ShardEngine) -> None:
        self.engine = engine
        #: The stream that counts, of a standby: the last one that was opened.
        self.stream: Closable | None = None

    @property
    def follower(self) -> Follower | None:
        """What this process holds as a standby; None: it is the shard."""
        return self.engine.follower

    @property
    def role(self) -> Role:
        return Role.SHARD if self.follower is None else Role.STANDBY

    @property
    def is_ready(self) -> bool:
        """It serves, or could take over."""
        engine = self.engine
        with engine.lock:
            return engine.has_state and (engine.protocol.serving or engine.follower is not None)

    @property
    def doing(self) -> str:
        """What it does, for people."""
        engine = self.engine
        with engine.lock:
            follower = engine.follower
            return follower.doing if follower else describe(engine.protocol, len(engine.chunks))

    def adopt(self, fence: Fence) -> None:
        """Learn a fence: nothing of an older one counts any more."""
        with self.engine.lock:
            self._adopt(fence)
            self.engine.wake()

    def _adopt(self, fence: Fence) -> None:
        engine = self.engine
        before = engine.protocol.fence
        engine.protocol.adopt(fence)
        if fence > before:
            # The coordinator says anew who stands by, and for whom.
            engine.mirroring.stop()
            self.end_stream()

    def decide(self, decision: Decision) -> None:
        """Hear a decision.

        Raises:
            StaleFence, DecisionRejected: it cannot be carried out here.
        """
        with self.engine.lock:
            follower = self.follower
            if follower is not None:
                follower.decide(decision)
            else:
                self.engine.decide(decision)

    # -- A shard --------------------------------------------------------------------------------

    def load(self, fence: Fence, checkpoint: Path | None, manifest_sha256: str) -> None:
        """Forget everything and take the state of a checkpoint, or await initial values.

        It counts as a state once it is served: until the rollback is journaled, a coordinator that starts
        anew would take it for that of a shard which only has not heard the last decision.

        Raises:
            CheckpointDamaged, StorageError: the checkpoint cannot be used; the shard holds no state.
            MismatchError: it is not the coordinator's, or another model's.
            WaitTimeout: kernels are still at work.
        """
        engine = self.engine
        with engine.lock:
            self._adopt(fence)
            self._be_the_shard()
            self._empty()
            engine.wake()
        engine.quiesce()
        # Only now: the snapshots that were waited for have just ended.
        engine.snapshots.forget()
        engine.store.clear()
        if checkpoint is None:
            with engine.lock:
                engine.protocol.await_initial_values()
            return
        manifest, digest = read_manifest(checkpoint)
        if digest != manifest_sha256:
            raise MismatchError(f"{checkpoint}/manifest.json is not the one that the coordinator read")
        read_state(engine.store, engine.plan, checkpoint, manifest)
        with engine.lock:
            engine.protocol.restored(manifest.version, manifest.applied, manifest.scaler.scale)
            engine.held = Held.LOADED
        log.info("loaded version %d from %s", manifest.version, checkpoint)

    def restore(self, fence: Fence) -> None:
        """Take up what a former life of this shard has written down; without it the shard holds no state.

        Called once, before anything else. What is held of the open step is told when the shard serves.
        """
        engine = self.engine
        with engine.lock:
            engine.protocol.adopt(fence)
        found = engine.journal.open()
        if found is None:
            return
        restoration = Restoration(
            found, engine.run, engine.lineage, engine.store, engine.protocol, engine.kernels.for_each
        )
        try:
            restoration.restore(engine.config.checkpoint_dir)
        except PsError as error:
            log.warning("the journal %s is of no use: %s", found.folder, error.message)
            engine.store.clear()
            with engine.lock:
                engine.protocol.close()
                engine.protocol.restored(0, 0, engine.protocol.loss_scale)
            return
        with engine.lock:
            engine.held = Held.STATE
            engine.journal.go_on(engine.protocol.step - (not engine.protocol.chunks_reduced))
        metrics.STEP.set(engine.protocol.step)
        logs.bind(step=engine.protocol.step)

    def serve(self, fence: Fence, step: int, applied: int, loss_scale: float) -> None:
        """Open for workers under this fence; a standby becomes the shard."""
        engine = self.engine
        with engine.lock:
            self._adopt(fence)
            before = engine.protocol.loss_scale
            takes_over = engine.follower is not None
            if takes_over:
                failpoints.hit("promote.before")
            engine.protocol.serve(step, applied, loss_scale)
            if takes_over:
                # Its journal begins with the next checkpoint.
                self._be_the_shard()
                failpoints.hit("promote.after")
            if engine.held is Held.LOADED:
                engine.held = Held.STATE
                engine.journal.begin(engine.base(), anew=True)
            elif engine.protocol.loss_scale != before:
                engine.journal.note(Reopened(step, loss_scale))
            engine.mirroring.forget_report()
            engine.report_if_prepared()
            engine.wake()

    def replicate(self, greeting: Mirror, address: str, opener: Opener) -> None:
        """Send to a standby what is reduced, and the state so far; an empty address: to none any more.

        Raises:
            StaleFence: the greeting's fence is not the present one.
        """
        engine = self.engine
        with engine.lock:
            if greeting.fence != engine.protocol.fence:
                raise StaleFence(f"a standby under {greeting.fence}, where this shard is at {engine.protocol.fence}")
            engine.mirroring.begin(greeting, address, opener)

    # -- A standby ------------------------------------------------------------------------------

    def follow(self, fence: Fence, step: int, applied: int, loss_scale: float, keep: bool) -> None:
        """Stand by for the shard of this index.

        Args:
            step: decided steps of the run; what the shard sends is of this version or later ones.
            keep: what is held already counts.

        Raises:
            WaitTimeout: kernels are still at work.
        """
        engine = self.engine
        with engine.lock:
            self._adopt(fence)
            if engine.follower is not None:
                if keep:
                    if step == engine.protocol.step and loss_scale != engine.protocol.loss_scale:
                        engine.protocol.reopen(loss_scale)
                    return
                engine.follower.forget("its shard does not count on it")
            # The shard writes it.
            engine.journal.close()
            engine.journal = NoJournal()
            self._empty()
        engine.quiesce()
        with engine.lock:
            engine.protocol.restored(step, applied, loss_scale)
            engine.follower = Follower(engine.protocol, engine.store, engine.decide, engine.went_on, self.end_stream)
            engine.opened.notify_all()

    def end_stream(self) -> None:
        """Take nothing more from the shard that this process stands by for; what is held stays."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    # -- Inside ---------------------------------------------------------------------------------

    def _be_the_shard(self) -> None:
        engine = self.engine
        if engine.follower is not None:
            engine.held = Held.STATE if engine.follower.is_whole else Held.NOTHING
            engine.follower = None
            engine.journal = make_journal(engine.config, engine.shard, engine.store.num_elements)

    def _empty(self) -> None:
        """Hold nothing, and answer nothing, before another state comes."""
        engine = self.engine
        engine.protocol.close()
        engine.held = Held.NOTHING
        engine.last_applied = None
        engine.mirroring.forget_report()
