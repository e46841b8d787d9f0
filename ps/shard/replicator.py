"""A shard's side of the stream to its standby: what is reduced and decided, and the state so far, chunk by chunk.

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
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from ps.errors import MalformedFrame
from ps.shard.records import Decided, Reduced, pack
from ps.sharding import Chunk
from ps.wire import frame
from ps.wire.messages import Covered, Mirror, Mirrored, Noted, State, parse_from_standby

log = logging.getLogger(__name__)

#: State that waits to be sent, at most, in bytes: more of it is taken after a later update.
MAX_STATE = 64 << 20
#: A standby that is being filled may be so far behind, in bytes and in decisions, before a step waits for it.
MAX_BEHIND = 64 << 20
MAX_DECISIONS_BEHIND = 2
#: Between two attempts to reach the standby, in seconds.
RETRY_S = 0.1
#: How often whoever sends looks whether the stream is broken or stalled, in seconds.
POLL_S = 0.2
#: A step waits for a standby that neither takes nor says anything so long, in seconds.
STALL_S = 2.0


class Stream(Protocol):
    """An open stream of frames to a standby."""

    def send(self, frame: bytes, timeout_s: float) -> bool:
        """Send a frame, in order; False: there is no room for it yet."""

    def close(self) -> None:
        """Send and receive nothing more. Idempotent."""


#: Opens a stream to an address. Whoever asks is told of each frame, and then why the stream has ended.
Opener = Callable[[str, Callable[[bytes], None], Callable[[str], None]], Stream]


class Source(Protocol):
    """The shard, as its replicator sees it. All of it is called without the shard's lock."""

    def resume(self, link: Link, held: Mirrored) -> None:
        """The standby has said what it holds: send what it lacks."""

    def covered(self, link: Link, step: int) -> None:
        """The standby holds the state of every chunk, and all that is reduced of a step."""

    def caught_up(self, link: Link) -> None:
        """The standby is not too far behind any more."""

    def uncovered(self, replicator: Replicator) -> None:
        """A stream has ended: nothing is known of what the standby holds."""


@dataclass(frozen=True)
class _Outgoing:
    """A frame to be sent, and what it is of."""

    encoded: bytes
    is_state: bool = False
    is_decision: bool = False


class Link:
    """What goes over one stream to a standby. The shard serializes the calls; nothing of it outlives the stream."""

    def __init__(self, standby: int) -> None:
        #: The life of the standby.
        self.standby = standby
        #: It has said that it holds the state of every chunk; and the last step that it holds all of.
        self.is_whole = False
        self.covered = -1
        #: Chunks whose state has been sent; None: the standby has not said what it holds.
        self._filled: set[int] | None = None
        #: Chunks of which it has, or will have, what is reduced of the open step.
        self._reduced: set[int] = set()
        self._outgoing: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        #: Guards what is counted of frames that wait: the shard puts them there, the replicator takes them.
        self._lock = threading.Lock()
        self._state_bytes = self._bytes = self._decisions = 0
        self._broken = threading.Event()
        #: Whether a report waits for the standby, and when that one last took or said something.
        self.is_awaited = False
        self._moved_at = time.monotonic()

    @property
    def is_joined(self) -> bool:
        """The standby has said what it holds, and the stream is not broken."""
        return self._filled is not None and not self._broken.is_set()

    @property
    def is_stalled(self) -> bool:
        """A step waits for the standby, and that one has not moved for too long."""
        return self.is_awaited and time.monotonic() - self._moved_at > STALL_S

    @property
    def is_behind(self) -> bool:
        """So much waits to be sent that the next step has to wait, too."""
        with self._lock:
            return self._bytes > MAX_BEHIND and self._decisions > MAX_DECISIONS_BEHIND

    def joined(self, filled: set[int], reduced: set[int], num_chunks: int) -> None:
        """The standby holds the state of these chunks, and what is reduced of those."""
        self._filled, self._reduced = filled, reduced
        self.is_whole = len(filled) == num_chunks

    def holds(self, chunk: Chunk) -> bool:
        return self._filled is not None and chunk.index in self._filled

    def wants_state(self, chunk: Chunk) -> bool:
        """Whether the state of a chunk is to be sent now."""
        with self._lock:
            return self.is_joined and not self.holds(chunk) and self._state_bytes < MAX_STATE

    def wants_reduced(self, chunk: Chunk) -> bool:
        """Whether what is reduced of a chunk is to be sent."""
        return self.is_joined and self.holds(chunk) and chunk.index not in self._reduced

    def will_cover(self, num_chunks: int) -> bool:
        """Whether a standby that holds the state of every chunk has been sent all of the open step."""
        return self.is_joined and self.is_whole and len(self._reduced) == num_chunks

    def send_state(self, chunk: Chunk, frames: Sequence[bytes]) -> None:
        """Send what `draft_state` made; what is reduced of the chunk from now on is sent too."""
        assert self._filled is not None, "wants_state said so"
        self._filled.add(chunk.index)
        for encoded in frames:
            self._put(_Outgoing(encoded, is_state=True))

    def send_reduced(self, record: Reduced, mean: np.ndarray) -> None:
        """Send what is reduced of a chunk (m, float32 [chunk.size])."""
        self._reduced.add(record.chunk)
        self._put(_Outgoing(frame.encode(Noted(pack(record)).pack(), mean)))

    def send_decided(self, record: Decided) -> None:
        """Send what was decided of the open step; what is sent after it is of the next one."""
        if self.is_joined:
            self._reduced.clear()
            self._put(_Outgoing(frame.encode(Noted(pack(record)).pack()), is_decision=True))

    def covers(self, step: int) -> None:
        """The standby could take over, with all that is reduced of a step."""
        self.is_whole, self.covered = True, step

    def moved(self) -> None:
        """The standby took or said something."""
        self._moved_at = time.monotonic()

    def cut(self) -> None:
        """Send nothing more. Idempotent, and any thread's."""
        self._broken.set()
        self._outgoing.put(None)

    def drain(self, stream: Stream, caught_up: Callable[[], None]) -> None:
        """Send what there is to send, until the stream is cut or stalls.

        Args:
            caught_up: called when the standby is not too far behind any more.
        """
        while not self._broken.is_set() and not self.is_stalled:
            try:
                outgoing = self._outgoing.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if outgoing is None:
                return
            while not stream.send(outgoing.encoded, POLL_S):
                if self._broken.is_set() or self.is_stalled:
                    return
            self.moved()
            was_behind = self.is_behind
            self._count(outgoing, -1)
            if was_behind and not self.is_behind:
                caught_up()

    def _put(self, outgoing: _Outgoing) -> None:
        self._count(outgoing, 1)
        self._outgoing.put(outgoing)

    def _count(self, outgoing: _Outgoing, sign: int) -> None:
        size = sign * len(outgoing.encoded)
        with self._lock:
            self._bytes += size
            self._state_bytes += size * outgoing.is_state
            self._decisions += sign * outgoing.is_decision


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
                link.drain(stream, partial(self._source.caught_up, link))
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
        link.moved()
        if isinstance(header, Mirrored):
            self._source.resume(link, header)
        elif isinstance(header, Covered):
            self._source.covered(link, header.step)
        else:
            log.warning("the standby at %s refuses: %s", self.address, header.message)
            link.cut()


def draft_state(chunk: Chunk, arrays: dict[str, np.ndarray], version: int, applied: int) -> list[bytes]:
    """Encode the state of a chunk, an array in each frame (float32 [chunk.size])."""
    return [frame.encode(State(version, chunk.index, name, applied).pack(), array) for name, array in arrays.items()]
