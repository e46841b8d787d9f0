"""Which contributions of the open step a shard holds, chunk by chunk. Pure bookkeeping.

A chunk keeps up to four contributions as received; beyond that it folds four at a time into a
float64 accumulator. With FP16 on the wire the sum is exact, so they fold as they arrive. With BF16
or FP32 they fold in contribution order: only the contiguous run that starts at the lowest
contribution not folded yet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ps.sharding import Chunk

#: Contributions that one pass of a kernel reads.
FAN_IN = 4


@dataclass(frozen=True)
class Held:
    """One contribution of one chunk, as received: a view of the message."""

    contribution: int
    slots: int
    gradient: np.ndarray


@dataclass(frozen=True)
class FoldJob:
    """Add these to the chunk's accumulator, in order."""

    chunk: Chunk
    held: tuple[Held, ...]


@dataclass(frozen=True)
class ReduceJob:
    """Finish the sum, divide, write the mean and take the statistics."""

    chunk: Chunk
    held: tuple[Held, ...]


ReductionJob = FoldJob | ReduceJob


@dataclass
class Progress:
    """How far the open step is, over all chunks of a shard."""

    chunks_reduced: int = 0


@dataclass
class ChunkReduction:
    """The open step's contributions of one chunk."""

    chunk: Chunk
    #: C; a chunk is complete when so many distinct contributions have come.
    contributions: int
    #: The sum does not depend on the order (FP16).
    exact: bool
    #: Told when the chunk is reduced.
    progress: Progress = field(default_factory=Progress)
    #: Payload hash of every contribution that has come.
    hashes: dict[int, bytes] = field(default_factory=dict)
    present: int = 0
    accumulator: np.ndarray | None = None
    reduced: bool = False
    #: Reduced, without overflow.
    finite: bool = False
    #: What may be added now, in this order.
    _waiting: deque[Held] = field(default_factory=deque)
    #: What came before its turn (BF16, FP32), by contribution; and whose turn it is.
    _early: dict[int, Held] = field(default_factory=dict)
    _turn: int = 0
    _busy: bool = False

    def add(self, held: Held, payload_hash: bytes, present: bytes) -> ReductionJob | None:
        """Take a contribution that has not come before; return what can be done now."""
        self.hashes[held.contribution] = payload_hash
        self.present |= int.from_bytes(present, "little")
        if self.exact:
            self._waiting.append(held)
        else:
            self._early[held.contribution] = held
            while self._turn in self._early:
                self._waiting.append(self._early.pop(self._turn))
                self._turn += 1
        return self._next()

    def done(self, job: ReductionJob) -> ReductionJob | None:
        """Note that a job has been carried out; return the next one."""
        self._busy = False
        if isinstance(job, ReduceJob):
            self.reduced = True
            self.accumulator = None
            self.progress.chunks_reduced += 1
            return None
        return self._next()

    def restore(self, hashes: dict[int, bytes], present: int, *, finite: bool) -> None:
        """Take it as reduced, as it was when somebody wrote that down."""
        self.hashes, self.present = hashes, present
        self.reduced, self.finite = True, finite
        self.progress.chunks_reduced += 1

    @property
    def complete(self) -> bool:
        return len(self.hashes) == self.contributions

    def _next(self) -> ReductionJob | None:
        if self._busy:
            return None
        if len(self._waiting) > FAN_IN:
            return FoldJob(self.chunk, self._take(FAN_IN))
        if self.complete:
            return ReduceJob(self.chunk, self._take(len(self._waiting)))
        return None

    def _take(self, count: int) -> tuple[Held, ...]:
        self._busy = True
        return tuple(self._waiting.popleft() for _ in range(count))
