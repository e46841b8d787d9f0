"""What a shard writes down, by the run's durability; a disk that fails never stops training."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Protocol

import numpy as np

from ps.config import RunConfig
from ps.errors import StorageError
from ps.kernels.digest import hash_payload
from ps.shard import metrics
from ps.shard.records import Base, Record, Reduced, kind_of, pack
from ps.storage.gradient_log import GradientLog, usual_limit
from ps.storage.layout import checkpoint_folder
from ps.storage.manifest import read_manifest

log = logging.getLogger(__name__)


class Journal(Protocol):
    """Where a shard writes down what it does."""

    @property
    def is_on(self) -> bool:
        """Whether anything is written at all."""

    @property
    def is_full(self) -> bool:
        """Whether it is time for a checkpoint, with which it begins anew."""

    def open(self) -> GradientLog | None:
        """What a former life of this shard has written; None: there is nothing, or it cannot be read."""

    def go_on(self, reduced: int) -> None:
        """Write behind what was read.

        Args:
            reduced: the last step of which a chunk is reduced.
        """

    def begin(self, base: Base, *, anew: bool = False) -> None:
        """A checkpoint of this state is on its way: from now on write into a new file.

        Args:
            anew: the state was loaded: it follows nothing that is there.
        """

    def note(self, record: Record, mean: np.ndarray | None = None) -> None:
        """Write a record; it is safe from the death of this process when this returns."""

    def trim(self, checkpoint_dir: Path, run: str) -> None:
        """Remove what lies before the newest checkpoint."""

    def close(self) -> None:
        """Write no more. Idempotent."""


class NoJournal:
    """durability=checkpoint: a shard that died comes back from the newest checkpoint, and the run with it."""

    is_on = False
    is_full = False

    def open(self) -> GradientLog | None:
        return None

    def go_on(self, reduced: int) -> None:
        pass

    def begin(self, base: Base, *, anew: bool = False) -> None:
        pass

    def note(self, record: Record, mean: np.ndarray | None = None) -> None:
        pass

    def trim(self, checkpoint_dir: Path, run: str) -> None:
        pass

    def close(self) -> None:
        pass


class StepJournal:
    """durability=journal: every chunk's reduced gradient and every decision, on a disk of this host.

    When the disk fails, nothing more is written until the next checkpoint: what lacks a step is of no use.

    Concurrency: thread-safe.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        metrics.JOURNAL_LIMIT.set(max_bytes)
        #: Guards the change between writing and not writing.
        self._lock = threading.RLock()
        #: None: the disk failed, or nothing was read yet.
        self._log: GradientLog | None = None
        #: What was opened to be read.
        self._found: GradientLog | None = None
        #: The last step of which a chunk was reduced.
        self._step = -1
        #: No state has been offered to begin with: a standby that takes over has none.
        self._lacks_base = True

    @property
    def is_on(self) -> bool:
        return True

    @property
    def is_full(self) -> bool:
        journal = self._log
        return self._lacks_base or (journal is not None and journal.newest_size > self._max_bytes)

    def open(self) -> GradientLog | None:
        with self._lock:
            try:
                self._found = GradientLog.open(self._folder, hash_payload)
            except StorageError as error:
                log.error("there is no journal to come back from: %s", error.message)
                return None
            return self._found if self._found.versions else None

    def go_on(self, reduced: int) -> None:
        with self._lock:
            self._step, self._lacks_base = reduced, False
            self._log, self._found = self._found, None
            metrics.JOURNAL_ON.set(1)

    def begin(self, base: Base, *, anew: bool = False) -> None:
        with self._lock:
            self._lacks_base = False
            if not anew and self._step >= base.version:
                # A part of the open step is in the file that is there, and would be missing in the next one.
                return
            self._step = base.version - 1
            try:
                if self._log is None:
                    anew = True
                    self._log = self._found or GradientLog.open(self._folder, hash_payload)
                    self._found = None
                if anew or base.version not in self._log.versions:
                    self._log.begin(base.version, pack(base), anew=anew)
            except StorageError as error:
                self._give_up(error)
            else:
                metrics.JOURNAL_ON.set(1)

    def note(self, record: Record, mean: np.ndarray | None = None) -> None:
        # One at a time: which file a record is in, and which step it is known to hold a part of, change together.
        with self._lock:
            if isinstance(record, Reduced):
                self._step = max(self._step, record.step)
            if self._log is None:
                return
            try:
                self._log.append(pack(record), mean.data if mean is not None else b"", kind_of(record))
                metrics.JOURNAL_BYTES.set(self._log.size)
            except StorageError as error:
                self._give_up(error)

    def trim(self, checkpoint_dir: Path, run: str) -> None:
        # Without the lock: nobody who writes waits for files to be removed.
        journal = self._log
        if journal is None:
            return
        complete = (
            v for v in reversed(journal.versions[1:]) if _is_checkpoint(checkpoint_folder(checkpoint_dir, v), run)
        )
        newest = next(complete, None)
        if newest is None:
            return
        try:
            journal.trim(newest)
            metrics.JOURNAL_BYTES.set(journal.size)
        except StorageError as error:
            log.warning("old parts of the journal stay: %s", error.message)

    def close(self) -> None:
        with self._lock:
            for journal in (self._log, self._found):
                if journal is not None:
                    journal.close()
            self._log = self._found = None

    def _give_up(self, error: StorageError) -> None:
        log.error(
            "no journal until the next checkpoint: %s; if this shard dies before it, the run goes back to the last one",
            error.message,
        )
        metrics.JOURNAL_FAILURES.inc()
        metrics.JOURNAL_ON.set(0)
        journal, self._log = self._log, None
        if journal is not None:
            try:
                # Its room may be what the next checkpoint needs.
                journal.discard()
            except StorageError as left:
                log.warning("%s", left.message)
            journal.close()
            metrics.JOURNAL_BYTES.set(0)


def _is_checkpoint(folder: Path, run: str) -> bool:
    try:
        return read_manifest(folder)[0].run_id == run
    except StorageError:
        return False


def make_journal(config: RunConfig, shard: int, num_elements: int) -> Journal:
    """What the run's durability asks for.

    Args:
        num_elements: of this shard, padding included.
    """
    if config.durability == "checkpoint":
        return NoJournal()
    return StepJournal(config.journal_dir(shard), config.journal.max_bytes or usual_limit(num_elements))
