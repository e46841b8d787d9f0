"""The checkpoint files of one shard that are on their way to the disk, and how the last ones ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from ps.errors import CheckpointWriteFailed, PsError
from ps.shard import metrics
from ps.shard.snapshot import Snapshot, SnapshotTarget
from ps.shard.store import Store
from ps.storage.shard_file import ShardFile
from ps.types import Fence

log = logging.getLogger(__name__)

#: Snapshots that may be on their way to the disk when the next update begins.
MAX_SNAPSHOTS = 2

Result = ShardFile | PsError


class Snapshots:
    """Snapshots of one shard.

    Args:
        lock: the shard's, which guards the state that is written.
        holds: whether the state is that of a version, and of no other; called with the lock held.
        tell: what is to be told of the end of one.

    Concurrency: thread-safe.
    """

    def __init__(
        self,
        store: Store,
        lock: threading.RLock,
        holds: Callable[[int], bool],
        tell: Callable[[SnapshotTarget, Result], None],
    ) -> None:
        self._store = store
        self._lock = lock
        self._holds = holds
        self._tell = tell
        #: Those on their way, the oldest first; replaced, never changed.
        self.pending: list[Snapshot] = []
        #: How the last ones ended, to be told again after a reconnect.
        self._results: dict[int, tuple[SnapshotTarget, Result]] = {}
        #: Versions that were asked for while they were being written, and under which fence.
        self._asked_again: dict[int, Fence] = {}

    def wait(self, most: int, timeout_s: float) -> None:
        """Wait until at most so many are on their way, for each of them at most so long."""
        while len(pending := self.pending) > most:
            oldest = pending[0]
            oldest.join(timeout_s)
            with self._lock:
                self.pending = [snapshot for snapshot in self.pending if snapshot is not oldest]

    def knows(self, version: int, fence: Fence) -> bool:
        """Whether a version that is asked for is on its way, or there: then that is told (again) under this fence."""
        with self._lock:
            self.pending = [snapshot for snapshot in self.pending if not snapshot.join(0)]
            if any(snapshot.target.version == version for snapshot in self.pending):
                self._asked_again[version] = fence
                return True
            before = self._results.get(version)
            if before is None or not _is_there(*before):
                return False
            target, result = replace(before[0], fence=fence), before[1]
            self._results[version] = target, result
            self._tell(target, result)
            return True

    def begin(self, target: SnapshotTarget) -> None:
        """Write the present state."""
        with self._lock:
            snapshot = Snapshot(self._store, target, self._ended)
            self.pending = [*self.pending, snapshot]
            snapshot.start()

    def forget(self) -> None:
        """What was written belongs to another past."""
        with self._lock:
            self._results = {}
            self._asked_again.clear()

    def tell_again(self) -> None:
        """Tell how the last ones ended."""
        with self._lock:
            for target, result in self._results.values():
                self._tell(target, result)

    def _ended(self, target: SnapshotTarget, result: Result) -> None:
        with self._lock:
            asked_again = self._asked_again.pop(target.version, None)
            if asked_again is not None:
                target = replace(target, fence=asked_again)
                if not _is_there(target, result):
                    # A new coordinator has emptied the folder under it.
                    if self._holds(target.version):
                        self.begin(target)
                        return
                    emptied = f"{target.folder} was emptied while version {target.version} was saved"
                    result = CheckpointWriteFailed(emptied)
        if isinstance(result, PsError):
            log.error("the checkpoint of version %d could not be written: %s", target.version, result.message)
            metrics.SNAPSHOT_FAILURES.inc()
        with self._lock:
            self._results = {**self._results, target.version: (target, result)}
            for version in sorted(self._results)[:-MAX_SNAPSHOTS]:
                del self._results[version]
        self._tell(target, result)


def _is_there(target: SnapshotTarget, result: Result) -> bool:
    """Whether a snapshot's file is still in its folder, which a new coordinator may have emptied."""
    return isinstance(result, ShardFile) and (target.folder / result.name).is_file()
