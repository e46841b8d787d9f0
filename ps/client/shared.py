"""What one stream shares with its shard: places for gradients, and the shard's published weights.

Negotiated on the stream. The worker's greeting offers a segment; the shard answers with its nonce and
offers the one in which it publishes; the worker proves that it has that one too. Whatever does not
work out leaves both sides with frames.

A place is written once per step, and each greeting brings new places: what the shard still holds of
an earlier one is never written to again.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from ps.errors import SharedMemoryError
from ps.sharding import Chunk, Plan
from ps.types import WireDtype
from ps.wire.messages import Welcome
from ps.wire.shared_memory import Segment

log = logging.getLogger(__name__)


class Sharing(StrEnum):
    """Whether payloads go through shared memory where they can; the values of `launch.transport`."""

    NEVER = "grpc"
    AUTO = "auto"
    ALWAYS = "shm"


@dataclass(frozen=True)
class Published:
    """Weights in a shard's memory, which it may write anew."""

    #: Wire dtype [chunk.size].
    weights: np.ndarray
    _sequence: np.ndarray
    _expected: int

    @property
    def intact(self) -> bool:
        """Whether they still are what the shard told of: asked after they were read."""
        return int(self._sequence[0]) == self._expected


class SharedPlaces:
    """One greeting's shared memory with one shard. The client's thread opens and closes; the rest is any thread's."""

    def __init__(self, plan: Plan, shard: int, dtype: WireDtype, contributions: int, greeting: int) -> None:
        self.greeting = greeting
        self._dtype = dtype
        self._shard = shard
        self._offsets: dict[int, int] = {}
        position = 0
        for chunk in plan.chunks_of(shard):
            self._offsets[chunk.index] = position
            position += chunk.size * dtype.itemsize
        #: Bytes of one contribution: the first that is computed in a step is written into the first lane.
        self._lane_bytes = position
        self._lanes = 0
        self._step = -1
        self._lane_of: dict[int, int] = {}
        self._written: set[tuple[int, int]] = set()
        #: What the shard has offered, and the same once it has been sent the proof.
        self._offered: Segment | None = None
        self._published: Segment | None = None
        self._gradients: Segment | None = None
        #: A descriptor that is closed while memory is claimed through it may be another file's by then.
        self._lock = threading.Lock()
        try:
            self._gradients = Segment.create(position * contributions)
        except SharedMemoryError as error:
            log.info("no shared memory with shard %d: %s", shard, error.message)

    @property
    def ready(self) -> bool:
        """Both sides have proved that they share."""
        return self._published is not None

    def offer(self) -> dict[str, Any]:
        """The fields of the greeting that offer the segment; empty ones when there is none."""
        if self._gradients is None:
            return {}
        return {
            "shared": self._gradients.name,
            "shared_bytes": self._gradients.size,
            "greeting": self.greeting,
        }

    def welcomed(self, header: Welcome) -> bytes | None:
        """Take up the shard's answer; `begin` once the proof is on its way.

        Returns:
            The nonce to prove it with; None: the answer is to an earlier greeting.

        Raises:
            SharedMemoryError: nothing is shared, and why.
        """
        gradients = self._gradients
        if gradients is None:
            raise SharedMemoryError("this process has no shared memory")
        if header.greeting != self.greeting:
            # What it offered is gone, maybe before the shard came to it.
            return None
        try:
            published = Segment.attach(header.shared, header.shared_bytes) if header.shared else None
            if published is None or header.nonce != gradients.nonce:
                raise SharedMemoryError("the shard has not attached this worker's segment")
        except SharedMemoryError:
            self.close()
            raise
        self._offered = published
        return published.nonce

    def begin(self) -> None:
        """The proof has been sent: a place that is told of from now on comes after it."""
        with self._lock:
            self._published = self._offered

    def close(self) -> None:
        """Go on with frames."""
        with self._lock:
            for segment in (self._gradients, self._offered):
                if segment is not None:
                    segment.close()
            self._gradients = self._offered = self._published = None

    def room(self, step: int, contribution: int, chunk: Chunk) -> tuple[int, np.ndarray] | None:
        """A place for a chunk of a contribution: its first byte and its elements; None: it has to go as a frame."""
        with self._lock:
            return self._room(step, contribution, chunk)

    def _room(self, step: int, contribution: int, chunk: Chunk) -> tuple[int, np.ndarray] | None:
        gradients = self._gradients
        if gradients is None or self._published is None:
            return None
        if step != self._step:
            # All of the last step's weights are here, so that every shard has decided it, and reads none of it.
            self._step = step
            self._lane_of.clear()
            self._written.clear()
        lane = self._lane_of.setdefault(contribution, len(self._lane_of))
        if lane >= self._lanes:
            try:
                gradients.claim(lane * self._lane_bytes, self._lane_bytes)
            except SharedMemoryError as error:
                log.warning("contribution %d goes to shard %d as frames: %s", contribution, self._shard, error.message)
                return None
            self._lanes = lane + 1
        if (lane, chunk.index) in self._written:
            # The shard may be reading it.
            return None
        self._written.add((lane, chunk.index))
        place = lane * self._lane_bytes + self._offsets[chunk.index]
        return place, gradients.array(self._dtype.numpy, place, chunk.size)

    def published(self, chunk: Chunk, place: int, slot: int, sequence: int) -> Published | None:
        """The published weights that a shard has told of; None: nothing is shared (any more).

        Raises:
            SharedMemoryError: the place is not in what it shares.
        """
        segment = self._published
        if segment is None:
            return None
        weights = segment.array(self._dtype.numpy, place, chunk.size)
        return Published(weights, segment.array(np.dtype(np.int64), 0, slot + 1)[slot:], sequence)
