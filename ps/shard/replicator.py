"""A shard's side of the stream to its standby: what is reduced, and the state so far, chunk by chunk.

The state of a chunk goes right after an update of it, a few chunks at a time, and everything that is reduced of that
chunk afterwards follows it. So the standby is filled while the run goes on, and nothing is copied twice. Whether a step
waits for the standby is not decided here: the report says what the standby holds, and the coordinator what follows.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgpack
import numpy as np

from ps.errors import MalformedFrame
from ps.sharding import Chunk
from ps.types import Prepared
from ps.wire import frame
from ps.wire.connection import FrameStream, OnClose, OnFrame
from ps.wire.messages import Covered, Mirror, Mirrored, Reduced, State, StepReduced, parse_from_standby

log = logging.getLogger(__name__)

METHOD = "/windlass.ps.v1.Shard/Replicate"
#: State that waits to be sent, at most, in bytes: more of it is taken after a later update.
MAX_STATE = 64 << 20
#: Between two attempts to reach the standby, in seconds.
RETRY_S = 0.1
#: How often whoever sends looks whether the stream is broken or stalled, in seconds.
POLL_S = 0.2
#: A step waits for a standby that neither takes nor says anything so long, in seconds.
STALL_S = 2.0

#: Opens a stream to an address.
Opener = Callable[[str, OnFrame, OnClose], FrameStream]


class Source(Protocol):
    """The shard, as its replicator sees it. All of it is called without the shard's lock."""

    def resume(self, link: Link, held: Mirrored) -> None:
        """The standby has said what it holds: send what it lacks."""

    def covered(self, link: Link, step: int, whole: bool) -> None:
        """The standby holds all that was sent of a step, and (`whole`) the state of every chunk."""

    def uncovered(self, replicator: Replicator) -> None:
        """A stream has ended: nothing is known of what the standby holds."""


class Link:
    """What goes over one stream to a standby. The shard serializes the calls; nothing of it outlives the stream."""

    def __init__(self, standby: int) -> None:
        #: The life of the standby.
        self.standby = standby
        #: Chunks whose state has been sent; None: the standby has not said what it holds.
        self._filled: set[int] | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._state_bytes = 0
        self._broken = threading.Event()
        #: The step that the standby has not said yet whether it holds; -1: none.
        self._awaited = -1
        #: When the standby last took or said something.
        self._moved_at = time.monotonic()

    @property
    def is_joined(self) -> bool:
        """The standby has said what it holds, and the stream is not broken."""
        return self._filled is not None and not self._broken.is_set()

    @property
    def is_stalled(self) -> bool:
        """A step waits for the standby, and that one has not moved for too long."""
        return self._awaited >= 0 and time.monotonic() - self._moved_at > STALL_S

    def joined(self, filled: set[int]) -> None:
        """The standby holds the state of these chunks."""
        self._filled = filled

    def holds(self, chunk: Chunk) -> bool:
        return self._filled is not None and chunk.index in self._filled

    def wants_state(self, chunk: Chunk) -> bool:
        """Whether the state of a chunk is to be sent now."""
        return self.is_joined and not self.holds(chunk) and self._state_bytes < MAX_STATE

    def send_state(self, chunk: Chunk, frames: Sequence[bytes]) -> None:
        """Send what `draft_state` made; what is reduced of the chunk from now on is sent too."""
        assert self._filled is not None, "wants_state said so"
        self._filled.add(chunk.index)
        for encoded in frames:
            self._state_bytes += len(encoded)
            self._outgoing.put(encoded)

    def send_reduced(self, step: int, chunk: Chunk, present: bytes, squares: np.ndarray, mean: np.ndarray) -> None:
        """Send what is reduced of a chunk (float32 [chunk.size]; float64 sums of squares by segment)."""
        if self.is_joined and self.holds(chunk):
            header = Reduced(step, chunk.index, present, squares.tobytes())
            self._outgoing.put(frame.encode(header.pack(), mean))

    def send_step(self, report: Prepared) -> None:
        """Everything of a step has been sent; the standby answers when it holds it."""
        rows = [[c.contribution, c.loss_sum, c.tokens, c.rank, c.incarnation] for c in report.contributions]
        self._awaited, self._moved_at = report.step, time.monotonic()
        self._outgoing.put(frame.encode(StepReduced(report.step).pack(), msgpack.packb(rows)))

    def moved(self, covered: int = -1) -> None:
        """The standby took or said something, maybe that it has all of a step."""
        self._moved_at = time.monotonic()
        if covered == self._awaited:
            self._awaited = -1

    def cut(self) -> None:
        """Send nothing more. Idempotent, and any thread's."""
        self._broken.set()
        self._outgoing.put(None)

    def drain(self, stream: FrameStream) -> None:
        """Send what there is to send, until the stream is cut or stalls."""
        while not self._broken.is_set() and not self.is_stalled:
            try:
                encoded = self._outgoing.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if encoded is None:
                return
            while not stream.send(encoded, POLL_S):
                if self._broken.is_set() or self.is_stalled:
                    return
            self.moved()
            self._state_bytes = max(0, self._state_bytes - len(encoded))


class Replicator:
    """Keeps a stream to one life of a standby, under one fence."""

    def __init__(self, source: Source, address: str, greeting: Mirror, opener: Opener) -> None:
        self.address = address
        self.greeting = greeting
        self.link = Link(greeting.standby)
        self._source = source
        self._opener = opener
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="standby", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Send nothing more. Idempotent, and any thread's."""
        self._closed.set()
        self.link.cut()

    def _keep(self) -> None:
        while not self._closed.is_set():
            link = self.link
            stream = self._opener(self.address, partial(self._receive, link), partial(self._on_close, link))
            try:
                stream.send(frame.encode(self.greeting.pack()), POLL_S)
                link.drain(stream)
                if link.is_stalled:
                    log.warning("the standby at %s has taken nothing for %.1f s", self.address, STALL_S)
            finally:
                link.cut()
                stream.close()
            self.link = Link(self.greeting.standby)
            if not self._closed.is_set():
                self._source.uncovered(self)
            self._closed.wait(RETRY_S)

    def _on_close(self, link: Link, reason: str) -> None:
        if link.is_joined and not self._closed.is_set():
            log.info("the stream to the standby at %s broke: %s", self.address, reason)
        link.cut()

    def _receive(self, link: Link, data: bytes) -> None:
        try:
            header = parse_from_standby(frame.decode(data)[0])
        except MalformedFrame as error:
            log.error("the standby at %s: %s", self.address, error.message)
            link.cut()
            return
        if isinstance(header, Mirrored):
            self._source.resume(link, header)
        elif isinstance(header, Covered):
            link.moved(header.step)
            self._source.covered(link, header.step, header.whole)
        else:
            log.warning("the standby at %s refuses: %s", self.address, header.message)
            link.cut()


def draft_state(chunk: Chunk, arrays: dict[str, np.ndarray], version: int, applied: int) -> list[bytes]:
    """Encode the state of a chunk, an array in each frame (float32 [chunk.size])."""
    return [frame.encode(State(version, chunk.index, name, applied).pack(), array) for name, array in arrays.items()]
