"""A snapshot: the state exactly after one decision, copied before the next one touches it.

A background thread writes the shard's file chunk by chunk, copying each chunk as it gets there. An
update that comes first copies its chunk itself, unless the copies in memory have reached their
bound: then it waits for the writer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ps.errors import CheckpointWriteFailed, PsError
from ps.pages import float32_zeros
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.storage.shard_file import ShardFile, ShardFileWriter, chunk_name
from ps.types import Fence

log = logging.getLogger(__name__)

#: Copies that wait for the disk, at most.
MAX_COPY_BYTES = 256 << 20
#: A disk that takes longer than this for one chunk has failed.
STALL_S = 120.0

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SnapshotTarget:
    """Where a snapshot goes, and what it holds."""

    folder: Path
    version: int
    shard: int
    num_shards: int
    metadata: dict[str, str]
    #: Under which it was asked for.
    fence: Fence


class Snapshot:
    """One snapshot on its way to the disk."""

    def __init__(
        self, store: Store, target: SnapshotTarget, on_end: Callable[[SnapshotTarget, ShardFile | PsError], None]
    ) -> None:
        self._store = store
        self.target = target
        self._on_end = on_end
        self._changed = threading.Condition()
        self._copies: dict[int, Arrays] = {}
        self._copy_bytes = 0
        self._taken: set[int] = set()
        self._over = False
        self._thread = threading.Thread(target=self._write, name=f"snapshot-{target.version}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; True when it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def protect(self, chunk: Chunk) -> None:
        """Return when `chunk` may be changed. Called before every update."""
        with self._changed:
            if self._over or chunk.index in self._taken:
                return
            size = 4 * chunk.size * (1 + len(self._store.moment_names))
            free = self._changed.wait_for(
                lambda: (
                    self._over
                    or chunk.index in self._taken
                    or not self._copies
                    or self._copy_bytes + size <= MAX_COPY_BYTES
                ),
                STALL_S,
            )
            if not free:
                # Training goes on; this checkpoint does not.
                self._over = True
                self._changed.notify_all()
            if not self._over and chunk.index not in self._taken:
                self._take(chunk, size)

    def _take(self, chunk: Chunk, size: int) -> None:
        self._copies[chunk.index] = {name: _copy(array) for name, array in self._store.arrays(chunk).items()}
        self._copy_bytes += size
        self._taken.add(chunk.index)

    def _copy_of(self, chunk: Chunk) -> Arrays:
        """The chunk as it was; the writer's own copy is not bounded, so it can never starve."""
        with self._changed:
            if self._over:
                raise CheckpointWriteFailed(
                    f"the disk of {self.target.folder} has written nothing for {STALL_S:.0f} s while "
                    f"version {self.target.version} is being saved"
                )
            if chunk.index not in self._taken:
                self._take(chunk, 4 * chunk.size * (1 + len(self._store.moment_names)))
            return self._copies[chunk.index]

    def _release(self, chunk: Chunk) -> None:
        with self._changed:
            copies = self._copies.pop(chunk.index, {})
            self._copy_bytes -= sum(array.nbytes for array in copies.values())
            self._changed.notify_all()

    def _write(self) -> None:
        try:
            result: ShardFile | PsError = self._write_file()
        except PsError as error:
            result = error
        except Exception as error:
            log.exception("the thread that writes version %d failed", self.target.version)
            result = CheckpointWriteFailed(f"writing version {self.target.version} failed: {error}")
        with self._changed:
            self._over = True
            self._copies.clear()
            self._changed.notify_all()
        self._on_end(self.target, result)

    def _write_file(self) -> ShardFile:
        target = self.target
        names = ("weights", *self._store.moment_names)
        arrays = [(chunk_name(name, chunk.start), chunk.size) for chunk in self._store.chunks for name in names]
        writer = ShardFileWriter(target.folder, target.shard, target.num_shards, arrays, target.metadata)
        try:
            for chunk in self._store.chunks:
                copies = self._copy_of(chunk)
                for name in names:
                    writer.write(chunk_name(name, chunk.start), copies[name])
                self._release(chunk)
            return writer.commit()
        except BaseException:
            writer.abort()
            raise


def _copy(array: np.ndarray) -> np.ndarray:
    """In pages of its own, which are gone with it; the heap would keep them until the next snapshot."""
    copy = float32_zeros(array.size)
    np.copyto(copy, array)
    return copy
