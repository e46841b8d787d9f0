"""What a shard holds: FP32 master weights, optimizer moments, reduced gradients, published frames.

Arrays are anonymous memory maps over the shard's chunks, one after the other; a chunk is a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ps.kernels.update import RunTable, Update
from ps.pages import float32_zeros
from ps.shard.publication import Publication, Published
from ps.sharding import Chunk
from ps.types import Decision, WireDtype


class Store:
    """The state of one shard."""

    def __init__(self, chunks: Sequence[Chunk], update: Update, dtype: WireDtype, *, eager: bool = False) -> None:
        """
        Args:
            eager: chunks are updated while others still wait for gradients: what is published of the version
                before stays until the step is closed, for whoever has to compute with it again.
        """
        self._eager = eager
        self.chunks = tuple(chunks)
        self.update = update
        self.dtype = dtype
        self.moment_names: tuple[str, ...] = update.moment_names
        self.num_elements = sum(chunk.size for chunk in chunks)
        self._offsets, position = {}, 0
        for chunk in chunks:
            self._offsets[chunk.index] = position
            position += chunk.size
        self.publication = Publication(self.chunks, dtype, copies=2 if eager else 1)
        self._weights = float32_zeros(position)
        self._moments = {name: float32_zeros(position) for name in update.moment_names}
        self._mean = float32_zeros(position)
        self._runs = {chunk.index: RunTable.build(chunk.runs, chunk.size) for chunk in chunks}
        self._square_sums = {chunk.index: np.zeros(chunk.num_segments) for chunk in chunks}
        self._hashes = dict.fromkeys(self._offsets, 0)
        #: Hash of the state at the open version, before any of its chunks was updated.
        self.version_hash = 0
        self.published: dict[int, Published] = {}
        #: What was published before, of chunks that are updated in the open step.
        self._before: dict[int, Published] = {}
        self._positions = {chunk.index: position for position, chunk in enumerate(chunks)}
        #: Positions of the chunks that were published in the open step, as they were; the next step has another list.
        self.news: list[int] = []

    def _slice(self, array: np.ndarray, chunk: Chunk) -> np.ndarray:
        start = self._offsets[chunk.index]
        return array[start : start + chunk.size]

    def weights(self, chunk: Chunk) -> np.ndarray:
        return self._slice(self._weights, chunk)

    def moments(self, chunk: Chunk) -> list[np.ndarray]:
        return [self._slice(array, chunk) for array in self._moments.values()]

    def arrays(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """Everything that a checkpoint holds of a chunk, by name."""
        named = zip(self.moment_names, self.moments(chunk), strict=True)
        return {"weights": self.weights(chunk), **dict(named)}

    def mean(self, chunk: Chunk) -> np.ndarray:
        return self._slice(self._mean, chunk)

    def square_sums(self, chunk: Chunk) -> np.ndarray:
        return self._square_sums[chunk.index]

    def all_square_sums(self) -> tuple[float, ...]:
        return tuple(float(value) for chunk in self.chunks for value in self._square_sums[chunk.index])

    @property
    def state_hash(self) -> int:
        """64-bit hash of weights and moments, whatever the chunks."""
        return sum(self._hashes.values()) & (2**64 - 1)

    def apply(self, chunk: Chunk, present: np.ndarray, decision: Decision) -> Published:
        """Carry out a decision on one chunk, and encode its new weights."""
        draft = self.publication.draft(chunk, decision.applied)
        self._hashes[chunk.index] = self.update.apply(
            self.mean(chunk),
            self.weights(chunk),
            self.moments(chunk),
            self._runs[chunk.index],
            present,
            decision,
            draft.payload,
            chunk.start,
        )
        return self.publication.publish(draft, decision.version)

    def encode(self, chunk: Chunk, version: int, applied: int) -> Published:
        """Encode the weights as they are, after they were loaded or initialized."""
        draft = self.publication.draft(chunk, applied)
        self.update.publish(self.weights(chunk), draft.payload)
        self._hashes[chunk.index] = self.update.state_hash(self.weights(chunk), self.moments(chunk), chunk.start)
        return self.publication.publish(draft, version)

    def publish(self, chunk: Chunk, published: Published) -> None:
        """From now on workers get this."""
        self.published[chunk.index] = published
        self.news.append(self._positions[chunk.index])

    def retract(self, chunk: Chunk) -> None:
        """A chunk is about to be published anew: nobody may be told any more of a place that is written again."""
        published = self.published.get(chunk.index)
        if published is None:
            return
        if self._eager:
            self._before[chunk.index] = published
        elif published.place >= 0:
            self.published[chunk.index] = replace(published, version=-1)

    def at(self, chunk: Chunk, version: int) -> Published:
        """What is published of a chunk: this version where it is still there, else the newest."""
        before = self._before.get(chunk.index)
        return before if before is not None and before.version == version else self.published[chunk.index]

    def close_step(self) -> None:
        """The state is that of another version, whole; the one before is not needed any more."""
        self.version_hash = self.state_hash
        self._before.clear()
        self.news = []

    def frame(self, chunk: Chunk, published: Published) -> bytes:
        """The frame of what `at` returned, for a worker that shares no memory."""
        if published.frame is not None:
            return published.frame
        encoded = self.publication.encode(chunk, published)
        if self.published[chunk.index] is published:
            self.published[chunk.index] = replace(published, frame=encoded)
        return encoded

    def clear(self) -> None:
        """Forget everything: zeros, nothing published."""
        for array in (self._weights, *self._moments.values()):
            array[:] = 0
        self.published.clear()
        self.close_step()
