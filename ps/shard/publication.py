"""How a shard's weights are published: as frames, and in shared memory once a worker of this host asks.

A frame is never changed after it is made. A place in shared memory is written again at every step,
so each has a sequence number: odd while it is written, and another one after it. A worker that
finds it changed has read of two versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ps.sharding import Chunk
from ps.types import WireDtype
from ps.wire import frame
from ps.wire.messages import Weights
from ps.wire.shared_memory import HEADER_BYTES, Segment

_SEQUENCE = np.dtype(np.int64)


@dataclass(frozen=True)
class Published:
    """One chunk's weights as workers get them."""

    #: The version they are (decided steps), and the committed steps in them.
    version: int
    applied: int
    #: The encoded frame; made of the shared place when the first worker without one asks.
    frame: bytes | None
    #: Where the weights are in shared memory; -1: they are not.
    place: int = -1
    #: Which of the segment's sequence numbers is theirs, and what it is while they are there.
    slot: int = 0
    sequence: int = 0


@dataclass(frozen=True)
class Draft:
    """Room for the next weights of a chunk, to be filled before anybody sees it."""

    applied: int
    #: Writable, wire dtype [chunk.size].
    payload: np.ndarray
    frame: bytes | None
    place: int = -1
    slot: int = 0


class Publication:
    """The published weights of one shard."""

    def __init__(self, chunks: Sequence[Chunk], dtype: WireDtype, copies: int = 1) -> None:
        """
        Args:
            copies: versions of a chunk that are published at once: 2 where one may be needed beside the next.
        """
        self._copies = copies
        self._chunks = tuple(chunks)
        self._dtype = dtype
        self._places: dict[int, int] = {}
        position = -(-len(self._chunks) * copies * _SEQUENCE.itemsize // HEADER_BYTES) * HEADER_BYTES
        for chunk in self._chunks:
            self._places[chunk.index] = position
            position += chunk.size * dtype.itemsize * copies
        self._size = position
        #: The copy of each chunk that was written last.
        self._slots = {chunk.index: position * copies for position, chunk in enumerate(self._chunks)}
        self.segment: Segment | None = None
        self._sequences = np.zeros(0, np.int64)

    def share(self) -> Segment:
        """Publish in shared memory from now on. Idempotent.

        Raises:
            SharedMemoryError: there is none, or not enough.
        """
        if self.segment is None:
            segment = Segment.create(self._size)
            segment.claim(0, self._size)
            self._sequences = segment.array(_SEQUENCE, 0, len(self._chunks) * self._copies)
            self.segment = segment
        return self.segment

    def draft(self, chunk: Chunk, applied: int) -> Draft:
        """Begin to publish a chunk: what was in its place in shared memory counts no more."""
        if self.segment is None:
            header = Weights(applied=applied, chunk=chunk.index, dtype=str(self._dtype))
            room = frame.Draft(header.pack(), self._dtype.numpy, chunk.size)
            return Draft(applied, room.payload, room.data)
        before = self._slots[chunk.index]
        turn = (before + 1) % self._copies
        slot = before - before % self._copies + turn
        self._slots[chunk.index] = slot
        self._sequences[slot] += 1
        place = self._places[chunk.index] + turn * chunk.size * self._dtype.itemsize
        return Draft(applied, self._payload(chunk, place), None, place, slot)

    def publish(self, draft: Draft, version: int) -> Published:
        """End what `draft` began."""
        if draft.frame is not None:
            return Published(version, draft.applied, draft.frame)
        self._sequences[draft.slot] += 1
        return Published(version, draft.applied, None, draft.place, draft.slot, int(self._sequences[draft.slot]))

    def encode(self, chunk: Chunk, published: Published) -> bytes:
        """The frame of a chunk that is published in shared memory."""
        header = Weights(applied=published.applied, chunk=chunk.index, dtype=str(self._dtype))
        return frame.encode(header.pack(), self._payload(chunk, published.place))

    def _payload(self, chunk: Chunk, place: int) -> np.ndarray:
        assert self.segment is not None
        return self.segment.array(self._dtype.numpy, place, chunk.size)
