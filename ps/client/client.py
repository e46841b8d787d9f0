"""Push and pull: one worker's side of the step protocol, over any transport.

Owned by one thread, which calls `handle` with every event of the inbox. Everything that was pushed
can be sent again until the step is decided: `source` encodes it anew, or says that it has to be
computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import xxhash

from ps.client.ledger import Ledger, Pulling
from ps.client.links import Inbox, Lost, Received, ShardLinks
from ps.client.shared import SharedPlaces, Sharing
from ps.client.transport import Transport
from ps.errors import MismatchError, SharedMemoryError, StaleFence, StalePlace, VersionGone
from ps.sharding import Chunk, Plan, make_plan
from ps.types import Fence, ParameterTable, WireDtype, slot_range
from ps.wire import frame
from ps.wire.messages import Ack, Attach, Initialize, Pull, Push, Refused, Unchanged, Weights, Welcome

log = logging.getLogger(__name__)

Array = np.ndarray


@dataclass(frozen=True)
class Contribution:
    """What rides in the header of every chunk of a contribution."""

    step: int
    index: int
    loss_scale: float
    #: Sum over its slots of the micro-batch's mean loss, unscaled.
    loss_sum: float
    tokens: int


class Source(Protocol):
    """Where chunks come from and go to: the worker's model."""

    def encode(self, chunk: Chunk, slots: int, room: Array) -> bytes:
        """Write a chunk of the computed gradient, divided by `slots`, into `room`; returns the presence map."""

    def discard(self) -> None:
        """The computed gradient is decided, or dropped: nobody will ask for it again."""

    def decode(self, chunk: Chunk, payload: Array) -> None:
        """Take over the published weights of a chunk."""

    def initial(self, chunk: Chunk, room: Array) -> None:
        """Write the FP32 initial values of a chunk into `room`."""

    def forget_initial(self) -> None:
        """All of a shard's initial values are sent: free what `initial` keeps between calls."""


@dataclass
class Model:
    """Which weights the worker holds."""

    version: int = -1
    applied: int = -1


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
    ) -> None:
        self.links = ShardLinks(transport, inbox, rank, incarnation, self._offer)
        self._sharing = sharing
        #: What is shared with each shard since its last greeting.
        self._places: dict[int, SharedPlaces] = {}
        self._greetings = 0
        self.table = table
        self.source = source
        self.model = Model()
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
        self._pulling: Pulling | None = None
        self._buffered: Contribution | None = None

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
    ) -> None:
        """Serve under a fence: forget what was pushed and pulled under another one.

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
        self._ledger = Ledger(self._plan)
        self._pulling = None
        self._drop_buffer()
        self.recompute = set()
        self.completed = []
        self.initialized = None
        self._welcomed = set()
        self.model = Model()
        self.links.open(run, self._plan.digest, fence, addresses)

    def close(self) -> None:
        self.links.close()
        for places in self._places.values():
            places.close()

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
            self._drop_buffer()
            self.recompute = set()
            self.completed = []

    def push(self, contribution: Contribution) -> None:
        """Push a contribution whose gradient `source` holds now; it holds it until the next one."""
        assert self._ledger is not None
        self._buffered = contribution
        self.recompute.discard(contribution.index)
        if contribution.index not in self._ledger.unacknowledged:
            self._ledger.computed(contribution.index)
        wanted = self._ledger.unacknowledged[contribution.index]
        for chunk in self.plan.chunks:
            if chunk.index in wanted:
                self._push_chunk(contribution, chunk)

    def _drop_buffer(self) -> None:
        if self._buffered is not None:
            self._buffered = None
            self.source.discard()

    def forget_buffer(self) -> None:
        """The gradient buffer is about to be overwritten: what is missing later must be computed again."""
        self._buffered = None

    def _push_chunk(self, contribution: Contribution, chunk: Chunk) -> None:
        slots = len(slot_range(contribution.index, self._contributions, self._slots))
        if self._push_shared(contribution, chunk, slots):
            return
        # Hash and presence map have a fixed length, so the frame is laid out before they are known.
        blank = self._push_header(contribution, chunk, slots, bytes(8), bytes(chunk.presence_bytes))
        draft = frame.Draft(blank.pack(), self._dtype.numpy, chunk.size)
        present = self.source.encode(chunk, slots, draft.payload)
        header = self._push_header(contribution, chunk, slots, xxhash.xxh3_64_digest(draft.payload.data), present)
        draft.rewrite(header.pack())
        self.links.send(chunk.shard, draft.data)

    def _push_shared(self, contribution: Contribution, chunk: Chunk, slots: int) -> bool:
        """Write a chunk where its shard reads it; False when it has to go as a frame."""
        places = self._places.get(chunk.shard)
        room = places.room(contribution.step, contribution.index, chunk) if places is not None else None
        if places is None or room is None:
            return False
        place, payload = room
        present = self.source.encode(chunk, slots, payload)
        header = self._push_header(contribution, chunk, slots, xxhash.xxh3_64_digest(payload.data), present)
        placed = replace(header, place=place, place_bytes=payload.nbytes, greeting=places.greeting)
        self.links.send(chunk.shard, frame.encode(placed.pack()), payload.nbytes)
        return True

    def _push_header(self, contribution: Contribution, chunk: Chunk, slots: int, digest: bytes, present: bytes) -> Push:
        return Push(
            **self.links.identity(),
            step=contribution.step,
            contribution=contribution.index,
            chunk=chunk.index,
            slots=slots,
            loss_scale=contribution.loss_scale,
            dtype=str(self._dtype),
            hash=digest,
            present=present,
            loss_sum=contribution.loss_sum,
            tokens=contribution.tokens,
        )

    def initialize(self) -> None:
        """Send the initial values of every chunk, to each shard once it has answered."""
        self.initialized = set()
        for shard in sorted(self._welcomed):
            self._initialize_shard(shard)

    def _initialize_shard(self, shard: int) -> None:
        for chunk in self.plan.chunks_of(shard):
            room = np.zeros(chunk.size, np.float32)
            self.source.initial(chunk, room)
            header = Initialize(**self.links.identity(), chunk=chunk.index, hash=xxhash.xxh3_64_digest(room.data))
            self.links.send(shard, frame.encode(header.pack(), room))
        self.source.forget_initial()

    # -- Pull -----------------------------------------------------------------------------------

    def pull(self, version: int, applied: int) -> None:
        """Ask all shards for a version; `model.version` says when it is there. Idempotent.

        Args:
            applied: the committed steps in that version; for a version that is not decided yet, one
                more than in the present one (after a skip the answer is that nothing changed).
        """
        if self.model.version == version or (self._pulling is not None and self._pulling.version == version):
            return
        self._pulling = Pulling(self.plan, version, self.model.applied, applied)
        for shard in sorted(self._welcomed):
            self._ask(shard)

    def _ask(self, shard: int) -> None:
        assert self._pulling is not None
        pull = Pull(**self.links.identity(), version=self._pulling.version, applied=self._pulling.held)
        self.links.send(shard, frame.encode(pull.pack()))

    @property
    def is_torn(self) -> bool:
        """Weights of the next version are arriving: the open step is decided, the model cannot be used."""
        return self._pulling is not None and self._pulling.torn

    @property
    def is_waiting(self) -> bool:
        """A version was asked for and nothing of it has come."""
        return self._pulling is not None and self._pulling.untouched

    # -- Events ---------------------------------------------------------------------------------

    def handle(self, event: Received | Lost) -> None:
        """Take one event of a shard.

        Raises:
            Refusal: a shard refused a frame for a reason that sending it again cannot mend.
        """
        if isinstance(event, Lost):
            log.info("lost shard %d: %s", event.shard, event.reason)
            if self.links.lost(event):
                self._welcomed.discard(event.shard)
            return
        try:
            _HANDLERS[type(event.header)](self, event)
        finally:
            self.links.done(event)

    def _welcome(self, event: Received) -> None:
        header: Any = event.header
        self.links.welcomed(event.shard)
        if Fence(header.term, header.epoch) != self.links.fence or self._ledger is None:
            return
        self._share(event.shard, header)
        self._welcomed.add(event.shard)
        if self.initialized is not None:
            self._initialize_shard(event.shard)
        if self._pulling is not None and self._pulling.remaining[event.shard]:
            self._ask(event.shard)
        if header.step != self._ledger.step:
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

    def _push_again(self, contribution: int, chunks: list[int]) -> None:
        buffered = self._buffered
        if buffered is None or buffered.index != contribution:
            self.recompute.add(contribution)
            return
        for index in chunks:
            self._push_chunk(buffered, self.plan.chunks[index])

    def _ack(self, event: Received) -> None:
        header: Any = event.header
        if header.contribution == -1:
            if self.initialized is not None:
                self.initialized.add(header.chunk)
                if len(self.initialized) == len(self.plan.chunks):
                    self.initialized = None
        elif self._ledger is not None and self._ledger.acknowledged(header.step, header.contribution, header.chunk):
            self._note_complete(header.contribution)

    def _note_complete(self, contribution: int) -> None:
        assert self._ledger is not None
        if self._ledger.complete(contribution):
            self.recompute.discard(contribution)
            if contribution not in self.completed:
                self.completed.append(contribution)

    def _weights(self, event: Received) -> None:
        header: Any = event.header
        pulling = self._pulling
        chunk = self.plan.chunks[header.chunk]
        payload = self._payload(event, chunk)
        if payload is None or pulling is None or not pulling.chunk(event.shard, header.chunk, header.applied):
            return
        # Weights of the next version: the step is decided, and what was pushed for it is never asked for again.
        self._drop_buffer()
        self.model = Model()
        self.source.decode(chunk, np.frombuffer(payload, self._dtype.numpy))
        if header.place >= 0 and not self._places[event.shard].intact(header):
            log.info("chunk %d was written anew while it was read: its version is gone", chunk.index)
            self._pulling = None
            return
        self._note_pulled(pulling)

    def _payload(self, event: Received, chunk: Chunk) -> memoryview | None:
        """The weights of a chunk: in shared memory, or in the frame.

        None: in memory of an earlier greeting. The answer to the present one has them asked for again.
        """
        header: Any = event.header
        if header.place < 0:
            return event.payload
        places = self._places.get(event.shard)
        if places is None or not places.ready:
            return None
        payload = places.payload(header, chunk.size * self._dtype.itemsize)
        self.links.count_shared(event.shard, len(payload))
        return payload

    def _unchanged(self, event: Received) -> None:
        header: Any = event.header
        pulling = self._pulling
        if pulling is not None and header.version == pulling.version and pulling.same(event.shard, header.applied):
            self._note_pulled(pulling)

    def _note_pulled(self, pulling: Pulling) -> None:
        if pulling.complete:
            self.model = Model(pulling.version, pulling.applied if pulling.started else pulling.held)
            self._pulling = None

    def _refused(self, event: Received) -> None:
        header: Any = event.header
        error = header.error()
        if isinstance(error, StaleFence | StalePlace):
            log.info("shard %d moved on: %s", event.shard, error.message)
        elif isinstance(error, VersionGone):
            # The next deal names a newer version.
            self._pulling = None
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
    Weights: ParameterClient._weights,
    Unchanged: ParameterClient._unchanged,
    Refused: ParameterClient._refused,
}


def _chunks(bitmap: bytes, plan: Plan, shard: int) -> set[int]:
    """The chunks that a shard's bitmap names."""
    bits = int.from_bytes(bitmap, "little")
    return {chunk.index for position, chunk in enumerate(plan.chunks_of(shard)) if bits >> position & 1}
