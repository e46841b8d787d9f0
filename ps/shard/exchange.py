"""One worker's tensor stream, as the shard sees it; any transport may carry it.

Frames come in through `receive`; answers go out through `replies`, which blocks until there is one.
Acknowledgements go first; a pull is answered chunk by chunk: of those that are published, in forward order.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from ps import failpoints
from ps.errors import ConflictingContribution, MalformedFrame, Refusal, StaleFence, VersionGone
from ps.shard import metrics
from ps.shard.engine import ShardEngine
from ps.shard.protocol import Accepted
from ps.shard.sharing import StreamMemory
from ps.shard.store import Store
from ps.telemetry.metrics import LinkBytes
from ps.types import Fence, Role
from ps.wire import frame
from ps.wire.messages import (
    MAX_PLACES,
    Ack,
    Attach,
    Header,
    Hello,
    Initialize,
    Placed,
    Pull,
    Push,
    PushPlaced,
    Refused,
    Unchanged,
    Welcome,
    parse_to_shard,
)

log = logging.getLogger(__name__)

#: So many chunks in shared memory are told of at once, but for the first and the last ones: a frame costs two
#: processes as much as converting half of such a chunk.
TOGETHER = 4


@dataclass
class _Cursor:
    """A pull on its way; chunks by their positions among the shard's."""

    request: Pull
    #: Those that have not gone, and a heap of those among them that can go.
    waiting: set[int]
    ready: list[int] = field(default_factory=list)
    #: What was published in the step that was looked at last, and how much of it was seen.
    news: list[int] | None = None
    seen: int = 0
    #: The first chunk of the last frame; -1: nothing was sent, only found unchanged.
    sent: int = -1

    def look(self, store: Store) -> None:
        """See what has been published since the last look: all of it once per step, then only what is new."""
        if self.news is not store.news:
            self.news, self.ready = store.news, sorted(self.waiting)
        else:
            for position in self.news[self.seen :]:
                heapq.heappush(self.ready, position)
        self.seen = len(self.news)


class Exchange:
    """The server's side of one stream."""

    def __init__(self, engine: ShardEngine, incarnation: int) -> None:
        self._engine = engine
        self._changed = threading.Condition(engine.lock)
        self._incarnation = incarnation
        self._outbox: deque[bytes] = deque()
        self._cursor: _Cursor | None = None
        #: Whose answer is the frame that goes next; None: it is of no pull.
        self._answered: _Cursor | None = None
        self._closed = False
        self._sharing = StreamMemory()
        #: Until the worker has said who it is.
        self._bytes = LinkBytes(Role.WORKER, -1)

    def close(self) -> None:
        """End `replies`; what was received stays."""
        with self._engine.lock:
            self._sharing.close()
            self._closed = True
            self._changed.notify_all()

    def receive(self, data: bytes) -> None:
        """Take one frame. A refusal is answered, never raised."""
        self._bytes.received.inc(len(data))
        header: Header | None = None
        try:
            fields, payload = frame.decode(data)
            header = parse_to_shard(fields)
            with self._taking(header):
                self._handle(header, payload)
        except Refusal as refusal:
            self._refuse(refusal, header)

    def _handle(self, header: Header, payload: memoryview) -> None:
        if isinstance(header, Push):
            self._acknowledge(header, self._engine.push(header, payload))
        elif isinstance(header, PushPlaced):
            for push, gradient in self._sharing.payloads(header, self._chunk_bytes):
                accepted = self._engine.push(push, gradient, shared=True)
                self._bytes.received.inc(len(gradient))
                self._acknowledge(push, accepted)
        elif isinstance(header, Initialize):
            self._engine.initialize(header, payload)
            self._reply(Ack(0, -1, header.chunk))
        elif isinstance(header, Pull):
            self._pull(header)
        elif isinstance(header, Hello):
            self._hello(header)
        elif isinstance(header, Attach):
            with self._engine.lock:
                self._sharing.attached(header)

    def _acknowledge(self, header: Push, accepted: Accepted) -> None:
        # Once per contribution: nothing waits for a chunk's, and a small frame costs as much as 100 KB of a large one.
        if accepted.whole:
            failpoints.hit("acknowledge.before")
            self._reply(Ack(header.step, header.contribution, -1))
            failpoints.hit("acknowledge.after")

    def _chunk_bytes(self, index: int) -> int:
        engine = self._engine
        return engine.protocol.owned(index).size * engine.store.dtype.itemsize

    def _hello(self, header: Hello) -> None:
        engine = self._engine
        with engine.lock:
            self._cursor = None
            engine.protocol.check(header)
            self._bytes = LinkBytes(Role.WORKER, header.rank)
            if header.plan != engine.plan.digest:
                raise MalformedFrame(
                    f"the worker's plan {header.plan[:12]} is not this shard's {engine.plan.digest[:12]}"
                )
            shared = self._sharing.begin(header, engine.share)
            held = [[contribution, _bitmap(chunks, engine)] for contribution, chunks in engine.protocol.held()]
            welcome = Welcome(
                engine.shard,
                self._incarnation,
                engine.protocol.fence.term,
                engine.protocol.fence.epoch,
                engine.protocol.step,
                engine.protocol.applied,
                held,
                greeting=header.greeting,
                **shared,
            )
        self._reply(welcome)

    def _pull(self, header: Pull) -> None:
        with self._engine.lock:
            self._engine.protocol.check(header)
            self._cursor = _Cursor(header, set(range(len(self._engine.chunks))))
            self._changed.notify_all()

    def _refuse(self, refusal: Refusal, header: Header | None) -> None:
        metrics.REFUSED_FRAMES.labels(refusal.code).inc()
        if isinstance(refusal, ConflictingContribution):
            metrics.CONFLICTS.inc()
        numbers = [getattr(header, name, -1) for name in ("step", "contribution", "chunk")]
        log.info("refused %s: %s", header.kind if header is not None else "a frame", refusal.message)
        self._reply(Refused(refusal.code, refusal.message[:1000], *numbers))

    def _reply(self, header: Header) -> None:
        encoded = frame.encode(header.pack())
        with self._engine.lock:
            self._outbox.append(encoded)
            self._changed.notify_all()

    def _taking(self, header: Header) -> AbstractContextManager[None]:
        """What a push costs, in a timeline: its way here, and what is done with it."""
        trace = self._engine.trace
        if not trace.on or not isinstance(header, Push | PushPlaced):
            return nullcontext()
        chunk = header.chunk if isinstance(header, Push) else -1
        about = {"chunk": chunk, "contribution": header.contribution}
        track = f"stream from worker {header.rank}"
        trace.since_last("receive", "push", header.step, track=track, **about)
        return trace.span("take", "push", header.step, track=track, **about)

    # -- Outgoing -------------------------------------------------------------------------------

    def replies(self) -> Iterator[bytes]:
        """Yield frames for the worker until the stream is closed."""
        while True:
            with self._engine.lock:
                reply = self._next()
                while reply is None and not self._closed:
                    self._engine.waiting[self._changed] = self._weights_needed()
                    self._changed.wait()
                    reply = self._next()
                self._engine.waiting.pop(self._changed, None)
            if reply is None:
                return
            self._bytes.sent.inc(len(reply))
            with self._sending():
                yield reply

    def _next(self) -> bytes | None:
        """The next frame that can go now; called with the lock held."""
        if self._closed:
            return None
        self._answered = None
        if self._outbox:
            return self._outbox.popleft()
        cursor = self._answered = self._cursor
        if cursor is None:
            return None
        try:
            return self._advance(cursor)
        except Refusal as refusal:
            self._cursor = self._answered = None
            metrics.REFUSED_FRAMES.labels(refusal.code).inc()
            return frame.encode(Refused(refusal.code, refusal.message, cursor.request.version, -1, -1).pack())

    def _weights_needed(self) -> int | None:
        """How many chunks must be published in the open step before there is something to send."""
        cursor = self._cursor
        if cursor is None:
            return None
        batched = self._sharing.ready and cursor.sent >= 0
        return cursor.seen + (min(TOGETHER, len(cursor.waiting)) if batched else 1)

    def _sending(self) -> AbstractContextManager[None]:
        """What a frame's way out costs, in a timeline."""
        cursor, trace = self._answered, self._engine.trace
        if not trace.on or cursor is None:
            return nullcontext()
        track = f"stream to worker {cursor.request.rank}"
        return trace.span("send", "pull", cursor.request.version - 1, chunk=cursor.sent, track=track)

    def _advance(self, cursor: _Cursor) -> bytes | None:
        engine, request = self._engine, cursor.request
        if engine.protocol.fence != Fence(request.term, request.epoch):
            raise StaleFence(f"the fence moved to {engine.protocol.fence} while version {request.version} was pulled")
        if not engine.protocol.serving or not engine.has_state:
            return None
        cursor.look(engine.store)
        placed: list[list[int]] = []
        applied = -1
        reply: bytes | None = None
        while cursor.ready and reply is None and len(placed) < MAX_PLACES:
            position = cursor.ready[0]
            if position not in cursor.waiting:
                heapq.heappop(cursor.ready)
                continue
            chunk = engine.chunks[position]
            published = engine.store.at(chunk, request.version)
            if published.version > request.version:
                raise VersionGone(
                    f"version {request.version} is no longer published; chunk {chunk.index} is at {published.version}"
                )
            is_new = published.version == request.version and published.applied != request.applied
            if is_new and self._sharing.ready and published.place >= 0:
                placed.append([chunk.index, published.place, published.slot, published.sequence])
                applied = published.applied
                self._bytes.sent.inc(chunk.size * engine.store.dtype.itemsize)
            elif is_new and placed:
                break
            elif is_new:
                reply = engine.store.frame(chunk, published)
                cursor.sent = chunk.index
            heapq.heappop(cursor.ready)
            if published.version == request.version:
                cursor.waiting.discard(position)
        if placed:
            # Everything that is there is told of at once: a frame costs more than what it says.
            reply = frame.encode(Placed(applied, str(engine.store.dtype), placed).pack())
            cursor.sent = placed[0][0]
        if not cursor.waiting:
            self._cursor = None
            if cursor.sent < 0:
                reply = frame.encode(Unchanged(request.version, engine.protocol.applied).pack())
        return reply


def _bitmap(chunks: list[int], engine: ShardEngine) -> bytes:
    """One bit per chunk of the shard, in its order, least significant first."""
    held = set(chunks)
    bits = sum(1 << position for position, chunk in enumerate(engine.chunks) if chunk.index in held)
    return bits.to_bytes(-(-len(engine.chunks) // 8), "little")
