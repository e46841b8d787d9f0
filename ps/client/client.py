"""Push and pull: one worker's side of the step protocol, over any transport.

Owned by one thread, which calls `handle` with every event of the inbox; the pusher sends and the
streams decode beside it. Everything that was pushed can be sent again until the step is decided:
`source` encodes it anew, or the client says that it has to be computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ps.client.ledger import Ledger
from ps.client.links import Arrived, Failed, Inbox, Lost, Received, ShardLinks
from ps.client.pulled import Model, PulledModel
from ps.client.pusher import Contribution, Encoded, Pusher
from ps.client.shared import SharedPlaces, Sharing
from ps.client.transport import Transport
from ps.errors import MalformedFrame, MismatchError, SharedMemoryError, StaleFence, StalePlace, VersionGone
from ps.kernels.digest import hash_payload
from ps.sharding import Chunk, Plan, make_plan
from ps.telemetry.trace import OFF, Recorder
from ps.types import Fence, ParameterTable, WireDtype, slot_range
from ps.wire import frame
from ps.wire.messages import Ack, Attach, Initialize, Placed, Pull, Refused, Unchanged, Weights, Welcome

log = logging.getLogger(__name__)

Array = np.ndarray


class Source(Protocol):
    """Where chunks come from and go to: the worker's model. `encode`, `discard` and `decode` are other threads'."""

    def encode(self, chunk: Chunk, slots: int, room: Array) -> Encoded:
        """Write a chunk of the computed gradient, divided by `slots`, into `room`."""

    def discard(self) -> None:
        """The computed gradient is decided, or dropped: nobody will ask for it again."""

    def decode(self, chunk: Chunk, payload: Array) -> None:
        """Take over the published weights of a chunk."""

    def initial(self, chunk: Chunk, room: Array) -> None:
        """Write the FP32 initial values of a chunk into `room`."""

    def forget_initial(self) -> None:
        """All of a shard's initial values are sent: free what `initial` keeps between calls."""


class ParameterClient:
    """Pushes contributions and pulls versions."""

    def __init__(
        self,
        transport: Transport,
        inbox: Inbox,
        rank: int,
        incarnation: int,
        table: ParameterTable,
        source: Source,
        sharing: Sharing = Sharing.NEVER,
        trace: Recorder = OFF,
    ) -> None:
        self._trace = trace
        self.links = ShardLinks(transport, inbox, rank, incarnation, self._received, self._offer)
        self._sharing = sharing
        #: What is shared with each shard since its last greeting.
        self._places: dict[int, SharedPlaces] = {}
        self._greetings = 0
        self.table = table
        self.source = source
        self._pusher = Pusher(self.links, source, self._places.get, lambda error: inbox.put(Failed(error)), trace)
        self.pulled = PulledModel(self._pusher.discard, lambda: inbox.put(Arrived()))
        #: Contributions that were computed, are not in the buffer any more, and that a shard lacks.
        self.recompute: set[int] = set()
        #: Contributions of the step begun last that every shard holds, since the last look.
        self.completed: list[int] = []
        self.initialized: set[int] | None = None
        #: Shards that have answered the present greeting: only they are asked for anything.
        self._welcomed: set[int] = set()
        self._plan: Plan | None = None
        self._slots = 0
        self._contributions = 0
        self._dtype = WireDtype.FP16
        self._ledger: Ledger | None = None
        #: Chunks of the contribution that is being pushed which were not put yet.
        self._unpushed: set[int] = set()

    @property
    def model(self) -> Model:
        """Which weights the worker holds."""
        return self.pulled.model

    @property
    def plan(self) -> Plan:
        assert self._plan is not None, "open comes first"
        return self._plan

    def open(
        self,
        run: str,
        fence: Fence,
        plan_digest: str,
        addresses: list[str],
        slots: int,
        contributions: int,
        dtype: WireDtype,
        *,
        eager: bool = False,
    ) -> None:
        """Serve under a fence: forget what was pushed and pulled under another one.

        Args:
            eager: weights of the next version may come before the open step is decided.

        Raises:
            MismatchError: the coordinator's plan is not the one that follows from this worker's table.
        """
        if self._plan is None or self._plan.num_shards != len(addresses):
            self._plan = make_plan(self.table, len(addresses))
        if plan_digest != self._plan.digest:
            raise MismatchError(
                f"the coordinator's plan {plan_digest[:12]} is not the {self._plan.digest[:12]} that follows from "
                "this worker's parameters: their versions of windlass differ"
            )
        self._slots, self._contributions, self._dtype = slots, contributions, dtype
        self._pusher.wire = dtype
        self.pulled.eager = eager
        self._ledger = Ledger(self._plan)
        self._pusher.discard()
        self.pulled.reset()
        self.recompute = set()
        self.completed = []
        self.initialized = None
        self._welcomed = set()
        self.links.open(run, self._plan.digest, fence, addresses)

    def close(self) -> None:
        self._pusher.close()
        self.links.close()
        for places in self._places.values():
            places.close()

    @property
    def transport(self) -> str:
        """How payloads travel to the shards that have answered: "shm", "grpc", "shm+grpc"; empty: none has."""
        shares = {shard in self._places and self._places[shard].ready for shard in self._welcomed}
        return "+".join(name for name, share in (("shm", True), ("grpc", False)) if share in shares)

    def _offer(self, shard: int) -> dict[str, Any]:
        """Offer a shard shared memory with each greeting, if it is wanted."""
        before = self._places.pop(shard, None)
        if before is not None:
            before.close()
        if self._sharing is Sharing.NEVER:
            return {}
        self._greetings += 1
        places = self._places[shard] = SharedPlaces(self.plan, shard, self._dtype, self._contributions, self._greetings)
        return places.offer()

    # -- Push -----------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Everything that was pushed for earlier steps is decided."""
        assert self._ledger is not None
        if self._ledger.step != step:
            self._ledger.begin(step)
            self._pusher.discard()
            self.recompute = set()
            self.completed = []

    def begin_push(self, contribution: Contribution) -> None:
        """The gradient in `source` becomes that of a contribution: from now on chunks of it may be pushed."""
        assert self._ledger is not None
        self._pusher.hold(contribution)
        self.recompute.discard(contribution.index)
        if contribution.index not in self._ledger.unacknowledged:
            self._ledger.computed(contribution.index)
        self._unpushed = set(self._ledger.unacknowledged[contribution.index])

    def push_chunk(self, contribution: Contribution, chunk: Chunk) -> None:
        """A chunk of the gradient is there, and stays as it is."""
        if chunk.index in self._unpushed:
            self._unpushed.discard(chunk.index)
            self._pusher.put(contribution, self._slots_of(contribution), chunk)

    def push(self, contribution: Contribution) -> None:
        """Push what has not been pushed of a contribution that was begun; nothing if it is decided by now."""
        for chunk in self.plan.chunks:
            self.push_chunk(contribution, chunk)

    def drop(self, contribution: int) -> None:
        """Every shard holds a contribution by somebody else: what was not sent of it is not sent."""
        self.recompute.discard(contribution)
        if self._ledger is not None:
            self._ledger.drop(contribution)
        buffered = self._pusher.buffered
        if buffered is not None and buffered.index == contribution:
            self._pusher.discard()

    def sent_at(self, contribution: int) -> float | None:
        """When the last chunk of a contribution of the open step was sent, by the monotonic clock; None: none was."""
        return self._pusher.sent_at(self._ledger.step, contribution) if self._ledger is not None else None

    def _slots_of(self, contribution: Contribution) -> int:
        return len(slot_range(contribution.index, self._contributions, self._slots))

    def forget_gradient(self) -> None:
        """The gradient is about to be overwritten: what is missing later must be computed again.

        Raises:
            WaitTimeout: it could not be sent before.
        """
        self._pusher.settle()
        self._pusher.forget()

    def initialize(self) -> None:
        """Send the initial values of every chunk, to each shard once it has answered."""
        self.initialized = set()
        for shard in sorted(self._welcomed):
            self._initialize_shard(shard)

    def _initialize_shard(self, shard: int) -> None:
        for chunk in self.plan.chunks_of(shard):
            room = np.zeros(chunk.size, np.float32)
            self.source.initial(chunk, room)
            header = Initialize(**self.links.identity(), chunk=chunk.index, hash=hash_payload(room))
            self.links.send(shard, frame.encode(header.pack(), room))
        self.source.forget_initial()

    # -- Pull -----------------------------------------------------------------------------------

    def pull(self, version: int, applied: int) -> None:
        """Ask all shards for a version; `pulled` says when it is there. Idempotent.

        Args:
            applied: the committed steps in that version; for a version that is not decided yet, one
                more than in the present one (after a skip the answer is that nothing changed).
        """
        if self.pulled.ask(self.plan, version, applied):
            for shard in sorted(self._welcomed):
                self._ask(shard)

    def _ask(self, shard: int) -> None:
        wanted = self.pulled.pulling_of(shard)
        if wanted is not None:
            version, held = wanted
            pull = Pull(**self.links.identity(), version=version, applied=held)
            self.links.send(shard, frame.encode(pull.pack()))

    def _received(
        self, shard: int, header: Weights | Placed, payload: memoryview, is_alive: Callable[[], bool]
    ) -> None:
        """Take weights; called in the threads of the streams."""
        came = header.chunk if isinstance(header, Weights) else -1
        self._trace.since_last("receive", "pull", self.pulled.step, chunk=came, track=_track(shard))
        if isinstance(header, Weights):
            chunk = self._chunk(shard, header.chunk)
            if payload.nbytes != (expected := chunk.size * self._dtype.itemsize):
                raise MalformedFrame(
                    f"shard {shard} sent {payload.nbytes} bytes of weights for chunk {chunk.index} of {expected} bytes"
                )
            weights = np.frombuffer(payload, self._dtype.numpy)

            def write() -> bool:
                with self._decoding(shard, chunk):
                    self.source.decode(chunk, weights)
                return True

            self.pulled.take(shard, chunk.index, header.applied, is_alive, write)
            return
        # Of one greeting, as the frame is: the next one's may be of another life of the shard.
        places = self._places.get(shard)
        for index, *where in header.chunks:
            chunk = self._chunk(shard, index)
            published = places.published(chunk, *where) if places is not None else None
            if published is None:
                # Of an earlier greeting: the answer to the present one has them asked for again.
                return

            def write_shared(chunk: Chunk = chunk, published: Any = published) -> bool:
                with self._decoding(shard, chunk):
                    self.source.decode(chunk, published.weights)
                if not published.intact:
                    log.info("chunk %d was written anew while it was read: its version is gone", chunk.index)
                return bool(published.intact)

            self.pulled.take(shard, index, header.applied, is_alive, write_shared)
            self.links.count_shared(shard, chunk.size * self._dtype.itemsize)

    def _decoding(self, shard: int, chunk: Chunk) -> AbstractContextManager[None]:
        return self._trace.span("decode", "pull", self.pulled.step, chunk=chunk.index, track=_track(shard))

    def _chunk(self, shard: int, index: int) -> Chunk:
        if not 0 <= index < len(self.plan.chunks) or self.plan.chunks[index].shard != shard:
            raise MalformedFrame(f"shard {shard} sent weights of chunk {index}, which is not its own")
        return self.plan.chunks[index]

    # -- Events ---------------------------------------------------------------------------------

    def handle(self, event: Received | Lost | Arrived | Failed) -> None:
        """Take one event of a shard.

        Raises:
            Refusal: a shard refused a frame for a reason that sending it again cannot mend.
        """
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Lost):
            log.info("lost shard %d: %s", event.shard, event.reason)
            if self.links.lost(event):
                self._welcomed.discard(event.shard)
        elif isinstance(event, Received):
            _HANDLERS[type(event.header)](self, event)

    def _welcome(self, event: Received) -> None:
        header: Any = event.header
        self.links.welcomed(event.shard)
        if Fence(header.term, header.epoch) != self.links.fence or self._ledger is None:
            return
        self._share(event.shard, header)
        self._welcomed.add(event.shard)
        if self.initialized is not None:
            self._initialize_shard(event.shard)
        self._ask(event.shard)
        if header.step != self._ledger.step:
            if header.step < self._ledger.step and self._ledger.lacks(event.shard):
                # It updated every chunk before it hears so: what it refused goes again once the step is open there.
                self.links.retry(event.shard)
            return
        held = {contribution: _chunks(bitmap, self.plan, event.shard) for contribution, bitmap in header.held}
        for contribution, chunks in self._ledger.missing_at(event.shard, held).items():
            self._push_again(contribution, chunks)
        for contribution in list(self._ledger.unacknowledged):
            self._note_complete(contribution)

    def _share(self, shard: int, header: Welcome) -> None:
        places = self._places.get(shard)
        if places is None:
            return
        try:
            nonce = places.welcomed(header)
        except SharedMemoryError as error:
            if self._sharing is Sharing.ALWAYS:
                raise SharedMemoryError(
                    f"launch.transport=shm: worker and shard {shard} share no memory ({error.message}); "
                    "use launch.transport=auto"
                ) from None
            log.info("frames go to shard %d, there is no shared memory: %s", shard, error.message)
            return
        if nonce is not None:
            log.info("sharing memory with shard %d", shard)
            self.links.send(shard, frame.encode(Attach(**self.links.identity(), nonce=nonce).pack()))
            places.begin()

    def _push_again(self, contribution: int, chunks: list[int]) -> None:
        buffered = self._pusher.buffered
        if buffered is None or buffered.index != contribution:
            self.recompute.add(contribution)
            return
        for index in chunks:
            # What is not pushed yet will be, when it is there.
            if index not in self._unpushed:
                self._pusher.put(buffered, self._slots_of(buffered), self.plan.chunks[index])

    def _ack(self, event: Received) -> None:
        header: Any = event.header
        if header.contribution == -1:
            if self.initialized is not None:
                self.initialized.add(header.chunk)
                if len(self.initialized) == len(self.plan.chunks):
                    self.initialized = None
        elif self._ledger is not None and self._ledger.acknowledged(header.step, header.contribution, event.shard):
            self._note_complete(header.contribution)

    def _note_complete(self, contribution: int) -> None:
        assert self._ledger is not None
        if self._ledger.complete(contribution):
            self.recompute.discard(contribution)
            if contribution not in self.completed:
                self.completed.append(contribution)

    def _unchanged(self, event: Received) -> None:
        header: Any = event.header
        self.pulled.unchanged(event.shard, header.version, header.applied)

    def _refused(self, event: Received) -> None:
        header: Any = event.header
        error = header.error()
        if isinstance(error, StaleFence | StalePlace):
            log.info("shard %d moved on: %s", event.shard, error.message)
        elif isinstance(error, VersionGone):
            # The next deal names a newer version.
            self.pulled.forget_pull(header.step)
        elif error.retry:
            # Greeting the shard again shows what is to be done.
            log.info("shard %d: %s", event.shard, error.message)
            self._welcomed.discard(event.shard)
            self.links.retry(event.shard)
        else:
            raise error


_HANDLERS: dict[type, Callable[[ParameterClient, Received], None]] = {
    Welcome: ParameterClient._welcome,
    Ack: ParameterClient._ack,
    Unchanged: ParameterClient._unchanged,
    Refused: ParameterClient._refused,
}


def _track(shard: int) -> str:
    """The thread of a stream, in a timeline."""
    return f"stream to shard {shard}"


def _chunks(bitmap: bytes, plan: Plan, shard: int) -> set[int]:
    """The chunks that a shard's bitmap names."""
    bits = int.from_bytes(bitmap, "little")
    return {chunk.index for position, chunk in enumerate(plan.chunks_of(shard)) if bits >> position & 1}
