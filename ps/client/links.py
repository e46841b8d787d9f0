"""The streams of one worker to all shards: opened, greeted, reopened when they break.

What happens is an event in one inbox, and the owner's single thread takes them one by one; but weights
go to a sink in the thread of their stream, which is kept waiting while the sink has no use for them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ps.client.transport import Connection, Transport
from ps.errors import MalformedFrame
from ps.telemetry.metrics import LinkBytes
from ps.types import Fence, Role
from ps.wire import frame
from ps.wire.messages import Header, Hello, Placed, Weights, parse_to_worker

log = logging.getLogger(__name__)

#: How often a blocked `send` looks whether the fence has moved.
SEND_POLL_S = 0.1
#: A shard that takes no frame for so long hangs: its stream is given up, and it is greeted again.
STALL_S = 30.0
#: Waiting times between two attempts to reach a shard, in seconds.
BACKOFF_S = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Received:
    """A frame from a shard."""

    shard: int
    header: Header


@dataclass(frozen=True)
class Lost:
    """A stream broke; it is being reopened."""

    shard: int
    reason: str
    #: Of the connection that it is about; by now there may be another one.
    life: int


@dataclass(frozen=True)
class Said:
    """The coordinator's session said something."""

    message: Any

    @property
    def moves_fence(self) -> bool:
        """What is being sent now belongs to the past."""
        return self.message.WhichOneof("event") in ("cluster", "end")


@dataclass(frozen=True)
class Arrived:
    """Weights have come that somebody may wait for."""


@dataclass(frozen=True)
class Failed:
    """A thread of the client could not go on."""

    error: BaseException


Event = Received | Lost | Said | Arrived | Failed

#: Takes weights: the shard, the header, the payload, and whether the stream is still the present one.
Sink = Callable[[int, Weights | Placed, memoryview, Callable[[], bool]], None]


class Inbox:
    """Events from all threads, for one."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        # A signal handler may put an event while the same thread holds it.
        self._lock = threading.RLock()
        self._fences = 0

    @property
    def fence_moves(self) -> bool:
        """A new fence, or the end, waits to be taken."""
        return self._fences > 0

    @property
    def is_empty(self) -> bool:
        """Nothing waits to be taken, at this moment."""
        return self._events.empty()

    def put(self, event: Event) -> None:
        self._count(event, 1)
        self._events.put(event)

    def get(self, timeout_s: float) -> Event | None:
        """The next event, or None when there is none in time."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        self._count(event, -1)
        return event

    def _count(self, event: Event, change: int) -> None:
        if isinstance(event, Said) and event.moves_fence:
            with self._lock:
                self._fences += change


@dataclass
class _Link:
    address: str
    bytes: LinkBytes
    connection: Connection | None = None
    #: Counts connections, so that a closed one's last words are not taken for the present one's.
    life: int = 0
    attempts: int = 0
    #: When to greet again, by the monotonic clock; None: nothing is due.
    retry_at: float | None = None


class ShardLinks:
    """One stream per shard. Owned by one thread; only the inbox is shared."""

    def __init__(
        self,
        transport: Transport,
        inbox: Inbox,
        rank: int,
        incarnation: int,
        sink: Sink = lambda *_: None,
        offer: Callable[[int], dict[str, Any]] = lambda _: {},
    ) -> None:
        """
        Args:
            sink: takes weights, in the threads of their streams.
            offer: fields of a shard's greeting that offer it more than frames.
        """
        self._sink = sink
        self._offer = offer
        self._transport = transport
        self._inbox = inbox
        self._rank = rank
        self._incarnation = incarnation
        self._links: dict[int, _Link] = {}
        self.run = ""
        self.plan_digest = ""
        self.fence = Fence(0, 0)

    def open(self, run: str, plan_digest: str, fence: Fence, addresses: list[str]) -> None:
        """Greet every shard under a fence, over its present stream if its address is the same."""
        self.run, self.plan_digest, self.fence = run, plan_digest, fence
        for shard, address in enumerate(addresses):
            link = self._links.get(shard)
            if link is None or link.address != address:
                life = 0
                if link is not None:
                    # Its last words are not the new stream's.
                    life = link.life = link.life + 1
                    if link.connection is not None:
                        link.connection.close()
                self._links[shard] = link = _Link(address, LinkBytes(Role.SHARD, shard), life=life)
            self._greet(shard, link)

    def close(self) -> None:
        for link in self._links.values():
            link.life += 1
            if link.connection is not None:
                link.connection.close()

    def identity(self) -> dict[str, Any]:
        """The fields with which every frame of this worker begins."""
        return {
            "run": self.run,
            "term": self.fence.term,
            "epoch": self.fence.epoch,
            "rank": self._rank,
            "incarnation": self._incarnation,
        }

    def send(self, shard: int, encoded: bytes, shared_bytes: int = 0) -> None:
        """Send a frame, waiting for room; it is dropped while the stream is down.

        It is dropped too when a new fence comes meanwhile, or when the shard hangs: it must not keep its
        worker from hearing that somebody else serves in its place. What it lacks it is sent after the next greeting.

        Args:
            shared_bytes: of the payload, where it is in shared memory.
        """
        link = self._links[shard]
        connection = link.connection
        if connection is None:
            return
        link.bytes.sent.inc(len(encoded) + shared_bytes)
        give_up_at = time.monotonic() + STALL_S
        while not connection.send(encoded, SEND_POLL_S):
            if self._inbox.fence_moves:
                return
            if time.monotonic() > give_up_at:
                log.warning("shard %d has taken nothing for %.0f s: its stream is opened anew", shard, STALL_S)
                connection.close()
                return

    def count_shared(self, shard: int, num_bytes: int) -> None:
        """A payload was received through shared memory."""
        self._links[shard].bytes.received.inc(num_bytes)

    @property
    def fence_moves(self) -> bool:
        """What is being sent now belongs to the past: the owner will hear so soon."""
        return self._inbox.fence_moves

    def has_room(self, shard: int) -> bool:
        """Whether `send` would not wait."""
        connection = self._links[shard].connection
        return connection is None or connection.has_room

    def retry(self, shard: int) -> None:
        """Greet a shard again, soon: it could not serve, or the stream broke."""
        link = self._links[shard]
        if link.retry_at is None:
            link.retry_at = time.monotonic() + BACKOFF_S[min(link.attempts, len(BACKOFF_S) - 1)]
            link.attempts += 1

    def welcomed(self, shard: int) -> None:
        """A shard answered: the next failure is retried quickly again."""
        self._links[shard].attempts = 0

    def lost(self, event: Lost) -> bool:
        """Forget a broken stream; False: it was replaced before this was heard."""
        link = self._links[event.shard]
        if link.life != event.life:
            return False
        link.connection = None
        self.retry(event.shard)
        return True

    def tick(self) -> float:
        """Do what is due; returns the seconds until something is, at most 1."""
        now = time.monotonic()
        soonest = now + 1.0
        for shard, link in self._links.items():
            if link.retry_at is not None:
                if link.retry_at <= now:
                    self._greet(shard, link)
                else:
                    soonest = min(soonest, link.retry_at)
        return max(0.0, soonest - now)

    def _greet(self, shard: int, link: _Link) -> None:
        link.retry_at = None
        if link.connection is None:
            self._connect(shard, link)
        self.send(shard, frame.encode(Hello(**self.identity(), plan=self.plan_digest, **self._offer(shard)).pack()))

    def _connect(self, shard: int, link: _Link) -> None:
        link.life += 1
        life = link.life

        def is_alive() -> bool:
            return link.life == life

        def on_frame(data: bytes) -> None:
            link.bytes.received.inc(len(data))
            try:
                fields, payload = frame.decode(data)
                header = parse_to_worker(fields)
            except MalformedFrame as error:
                # What is lost with it is not known: the stream begins anew.
                log.error("shard %d sent what is not a frame, and its stream is closed: %s", shard, error.message)
                if is_alive() and link.connection is not None:
                    link.connection.close()
                return
            if not is_alive():
                return
            if isinstance(header, Weights | Placed):
                self._receive(shard, header, payload, is_alive)
            else:
                self._inbox.put(Received(shard, header))

        def on_close(reason: str) -> None:
            if is_alive():
                self._inbox.put(Lost(shard, reason, life))

        link.connection = self._transport.connect(link.address, on_frame, on_close)

    def _receive(self, shard: int, header: Weights | Placed, payload: memoryview, is_alive: Callable[[], bool]) -> None:
        try:
            self._sink(shard, header, payload, is_alive)
        except Exception as error:  # noqa: BLE001 - the owner's thread raises it
            self._inbox.put(Failed(error))
