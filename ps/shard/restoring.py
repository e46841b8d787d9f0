"""Where a shard's state comes from: a checkpoint, or a checkpoint and what was written down since."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from ps.errors import CheckpointDamaged, JournalDamaged, MismatchError
from ps.shard import metrics
from ps.shard.protocol import StepProtocol
from ps.shard.records import Base, unpack
from ps.shard.replay import ForEach, Replay
from ps.shard.store import Store
from ps.sharding import Plan
from ps.storage.gradient_log import Entry, GradientLog
from ps.storage.layout import checkpoints, version_of
from ps.storage.manifest import Manifest, read_manifest
from ps.storage.reader import CheckpointReader

log = logging.getLogger(__name__)


def read_state(store: Store, plan: Plan, checkpoint: Path, manifest: Manifest) -> None:
    """Verify a checkpoint's files, and take its state.

    Raises:
        CheckpointDamaged, StorageError: it cannot be used; the store holds anything.
        MismatchError: it is another model's, or another optimizer's.
    """
    if manifest.table.digest != plan.table.digest:
        raise MismatchError(f"{checkpoint} holds another parameter table than this run's")
    with CheckpointReader(checkpoint, manifest) as reader:
        reader.verify(reader.files_for([(chunk.start, chunk.stop) for chunk in store.chunks]))
        for chunk in store.chunks:
            for name, array in store.arrays(chunk).items():
                reader.read(name, chunk.start, array)
    for chunk in store.chunks:
        store.publish(chunk, store.encode(chunk, manifest.version, manifest.applied))
    store.close_step()


class Restoration:
    """From a journal to the state that it leads to."""

    def __init__(
        self, journal: GradientLog, run: str, lineage: int, store: Store, protocol: StepProtocol, for_each: ForEach
    ) -> None:
        """
        Args:
            lineage: the epoch of the run's last rollback.
            store, protocol: hold nothing yet; after an error they hold anything.
        """
        self._journal = journal
        self._run = run
        self._lineage = lineage
        self._store = store
        self._protocol = protocol
        self._for_each = for_each

    def restore(self, checkpoint_dir: Path) -> None:
        """Load the newest checkpoint from which the journal leads on, and carry out what follows.

        Raises:
            PsError: there is none, or the journal is damaged, or of another run or of before a rollback.
        """
        for checkpoint in reversed(checkpoints(checkpoint_dir)):
            start = max((v for v in self._journal.versions if v <= (version_of(checkpoint) or 0)), default=None)
            if start is None:
                break
            try:
                if self._restore_from(checkpoint, self._journal.read(start)):
                    return
            except CheckpointDamaged as error:
                log.warning("%s", error.message)
        raise JournalDamaged(f"there is no checkpoint in {checkpoint_dir} from which it leads on")

    def _restore_from(self, checkpoint: Path, entries: Iterator[Entry]) -> bool:
        """False: the journal does not reach the checkpoint, which is one that a rollback has passed."""
        started = time.monotonic()
        # Before anything is loaded: a journal of another life of the run is the usual reason.
        base = self._base(entries)
        manifest, _ = read_manifest(checkpoint)
        if manifest.run_id != self._run:
            raise MismatchError(f"{checkpoint} is of run {manifest.run_id}, not of {self._run}")
        read_state(self._store, self._protocol.plan, checkpoint, manifest)
        self._protocol.close()
        self._protocol.restored(manifest.version, manifest.applied, manifest.scaler.scale)
        replay = Replay(self._store, self._protocol, self._for_each)
        replay.take(base, memoryview(b""))
        for entry in entries:
            record = unpack(entry.head)
            if isinstance(record, Base):
                self._check(record)
            replay.take(record, entry.payload)
        if replay.reached < manifest.version:
            return False
        replay.finish()
        metrics.REPLAYED_STEPS.inc(replay.steps)
        log.info(
            "version %d from %s and %d steps of the journal, in %.1f s",
            self._protocol.step, checkpoint.name, replay.steps, time.monotonic() - started,
        )  # fmt: skip
        return True

    def _base(self, entries: Iterator[Entry]) -> Base:
        first = next(entries, None)
        record = unpack(first.head) if first is not None else None
        if not isinstance(record, Base):
            raise JournalDamaged("it does not begin with a base")
        self._check(record)
        return record

    def _check(self, base: Base) -> None:
        protocol = self._protocol
        if (base.run, base.shard, base.plan) != (self._run, protocol.shard, protocol.plan.digest):
            raise MismatchError(f"it is of shard {base.shard} of run {base.run}, or of another number of shards")
        if base.lineage != self._lineage:
            raise MismatchError(
                f"it is of before a rollback: of epoch {base.lineage} where the run went on in {self._lineage}"
            )
