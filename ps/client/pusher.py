"""Sends chunks of the gradient as they become ready, beside whoever computes.

A chunk is encoded at the moment in which its stream has room for it, so that nothing waits in memory.
Where the payload goes through shared memory only its place is told, and places that become ready while
the stream is busy are told together.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from ps import failpoints
from ps.client.links import STALL_S, ShardLinks
from ps.client.shared import SharedPlaces
from ps.errors import WaitTimeout
from ps.sharding import Chunk
from ps.telemetry.trace import COMPUTE, OFF, Recorder
from ps.types import WireDtype
from ps.wire import frame
from ps.wire.messages import Push, PushPlaced

#: One chunk takes at most so long: a shard that hangs is given up by the links before.
SETTLE_S = 3 * STALL_S
#: So many places are told of at once while there are more to come: a frame costs as much as encoding half a chunk.
TOGETHER = 4
#: Places are told of before they take more of a header than this; each takes so much beside its presence map.
_TELL_BYTES, _PLACE_BYTES = frame.MAX_HEADER_BYTES // 2, 32


class Encoded(NamedTuple):
    """What is said of a payload that was written."""

    #: `ps.kernels.digest.hash_payload` of it.
    digest: bytes
    #: The presence map of the chunk's runs.
    present: bytes


class Encoder(Protocol):
    """Where the gradient is."""

    def encode(self, chunk: Chunk, slots: int, room: np.ndarray) -> Encoded:
        """Write a chunk of the computed gradient, divided by `slots`, into `room`."""

    def discard(self) -> None:
        """Nobody will ask for the gradient again."""


@dataclass(frozen=True)
class Contribution:
    """What rides in the header of every chunk of a contribution."""

    step: int
    index: int
    loss_scale: float
    #: Returns the sum over its slots of the micro-batch's mean loss, unscaled, and the tokens: they may still be on
    #: their way from the device when the first chunk is ready.
    report: Callable[[], tuple[float, int]]


@dataclass(frozen=True)
class _Job:
    contribution: Contribution
    slots: int
    chunk: Chunk
    #: Who pushes, under which fence.
    identity: dict[str, Any]


@dataclass
class _Untold:
    """Places in the memory shared with one shard that it has not been told of."""

    contribution: Contribution
    places: SharedPlaces
    header: PushPlaced
    #: Of the payloads, and of the header.
    num_bytes: int = 0
    header_bytes: int = 0
    chunks: list[list[Any]] = field(default_factory=list)


class Pusher:
    """One thread that encodes and sends. `discard` is any thread's, the rest is the owner's."""

    def __init__(
        self,
        links: ShardLinks,
        encoder: Encoder,
        places_of: Callable[[int], SharedPlaces | None],
        on_failure: Callable[[BaseException], None],
        trace: Recorder = OFF,
    ) -> None:
        """
        Args:
            places_of: what is shared with a shard now.
            on_failure: a chunk could not be encoded or sent; called in the pusher's thread.
        """
        self.wire = WireDtype.FP16
        self._links = links
        self._encoder = encoder
        self._places_of = places_of
        self._on_failure = on_failure
        self._trace = trace
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unfinished = 0
        #: Held while the gradient is read, and while its memory is given back.
        self._reading = threading.Lock()
        #: The contribution whose gradient is there.
        self._buffered: Contribution | None = None
        self._untold: dict[int, _Untold] = {}
        #: The step that is pushed, and when the last chunk of each of its contributions was sent.
        self._sent_step = -1
        self._sent_at: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def put(self, contribution: Contribution, slots: int, chunk: Chunk) -> None:
        """Push a chunk of the gradient that is there now, soon."""
        with self._changed:
            self._unfinished += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pusher", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(contribution, slots, chunk, self._links.identity()))

    def hold(self, contribution: Contribution) -> None:
        """The gradient is that of this contribution from now on."""
        with self._reading:
            self._buffered = contribution

    @property
    def buffered(self) -> Contribution | None:
        """The contribution whose gradient is there."""
        with self._reading:
            return self._buffered

    def sent_at(self, step: int, contribution: int) -> float | None:
        """When the last of what was put of a contribution was sent, by the monotonic clock; None: nothing was."""
        return self._sent_at.get(contribution) if step == self._sent_step else None

    def forget(self) -> None:
        """The gradient is about to be overwritten; `settle` comes first."""
        with self._reading:
            self._buffered = None

    def discard(self, version: int | None = None) -> None:
        """The gradient is not needed any more: what of it was not sent is not sent, its memory is given back.

        Args:
            version: only a gradient of a step before this version is not needed; None: none is.
        """
        with self._reading:
            buffered = self._buffered
            if buffered is not None and (version is None or buffered.step < version):
                self._buffered = None
                self._encoder.discard()

    def settle(self) -> None:
        """Wait until everything that was put is read, or dropped with its stream.

        Raises:
            WaitTimeout: it takes implausibly long.
        """
        held = self._buffered
        with self._changed:
            if not self._unfinished:
                return
            with self._trace.span("wait until pushed", "wait", held.step if held is not None else -1, track=COMPUTE):
                while self._unfinished:
                    if not self._changed.wait(SETTLE_S):
                        raise WaitTimeout(
                            f"{self._unfinished} chunks of a gradient were not taken by their shards in time"
                        )

    def close(self) -> None:
        """End the thread; what was not sent is not sent. Idempotent."""
        self.forget()
        self._jobs.put(None)

    # -- The thread's ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._guarded(self._push, job)
            self._note_sent(job.contribution)
            with self._changed:
                self._unfinished -= 1
                self._changed.notify_all()

    def _note_sent(self, contribution: Contribution) -> None:
        if contribution.step != self._sent_step:
            self._sent_step, self._sent_at = contribution.step, {}
        self._sent_at[contribution.index] = time.monotonic()

    def _next(self) -> _Job | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            for shard in list(self._untold):
                self._guarded(self._tell, shard)
            return self._jobs.get()

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as failure:  # noqa: BLE001 - the owner's thread raises it
            self._on_failure(failure)

    def _push(self, job: _Job) -> None:
        if self._links.fence_moves:
            return
        failpoints.hit("push.before")
        contribution, chunk = job.contribution, job.chunk
        places = self._places_of(chunk.shard)
        room = places.room(contribution.step, contribution.index, chunk) if places is not None else None
        if places is not None and room is not None:
            self._write(job, places, *room)
            failpoints.hit("push.after")
            return
        blank = self._header(job, Encoded(bytes(8), bytes(chunk.presence_bytes)))
        # Hash and presence map have a fixed length, so the frame is laid out before they are known.
        draft = frame.Draft(blank.pack(), self.wire.numpy, chunk.size)
        encoded = self._encode(job, draft.payload)
        if encoded is None:
            return
        draft.rewrite(self._header(job, encoded).pack())
        with self._span("send", contribution.step, contribution.index, chunk.index):
            self._links.send(chunk.shard, draft.data)
        failpoints.hit("push.after")

    def _encode(self, job: _Job, room: np.ndarray) -> Encoded | None:
        """None: the gradient is not there any more."""
        with self._reading:
            if self._buffered is not job.contribution:
                return None
            with self._span("encode", job.contribution.step, job.contribution.index, job.chunk.index):
                return self._encoder.encode(job.chunk, job.slots, room)

    def _write(self, job: _Job, places: SharedPlaces, place: int, room: np.ndarray) -> None:
        encoded = self._encode(job, room)
        if encoded is None:
            return
        shard = job.chunk.shard
        untold = self._untold.get(shard)
        if untold is not None and (untold.places is not places or untold.contribution is not job.contribution):
            self._tell(shard)
            untold = None
        if untold is None:
            untold = self._untold[shard] = _Untold(job.contribution, places, self._placed(job, places))
        untold.chunks.append([job.chunk.index, place, *encoded])
        untold.num_bytes += room.nbytes
        untold.header_bytes += _PLACE_BYTES + len(encoded.present)
        together = len(untold.chunks) >= TOGETHER and self._links.has_room(shard)
        if together or untold.header_bytes > _TELL_BYTES:
            self._tell(shard)

    def _tell(self, shard: int) -> None:
        untold = self._untold.pop(shard)
        encoded = frame.encode({**untold.header.pack(), "chunks": untold.chunks})
        with self._span("send", untold.header.step, untold.header.contribution):
            self._links.send(shard, encoded, untold.num_bytes)

    def _span(self, name: str, step: int, contribution: int, chunk: int = -1) -> AbstractContextManager[None]:
        return self._trace.span(name, "push", step, chunk=chunk, contribution=contribution, track="pusher")

    def _placed(self, job: _Job, places: SharedPlaces) -> PushPlaced:
        loss_sum, tokens = job.contribution.report()
        return PushPlaced(
            **job.identity,
            step=job.contribution.step,
            contribution=job.contribution.index,
            slots=job.slots,
            loss_scale=job.contribution.loss_scale,
            dtype=str(self.wire),
            loss_sum=loss_sum,
            tokens=tokens,
            greeting=places.greeting,
            chunks=[],
        )

    def _header(self, job: _Job, encoded: Encoded) -> Push:
        loss_sum, tokens = job.contribution.report()
        return Push(
            **job.identity,
            step=job.contribution.step,
            contribution=job.contribution.index,
            chunk=job.chunk.index,
            slots=job.slots,
            loss_scale=job.contribution.loss_scale,
            dtype=str(self.wire),
            hash=encoded.digest,
            present=encoded.present,
            loss_sum=loss_sum,
            tokens=tokens,
        )
