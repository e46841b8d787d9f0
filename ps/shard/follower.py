"""A standby: it holds what its shard sends, applies the same decisions, and serves nobody until it is needed.

A chunk counts once its state has come; from then on everything that is reduced of it comes too, and decisions are
applied to it. They come from the shard as well, in order with the rest. With the state of every chunk, and all that is
reduced of a step, the standby does what its shard does, by the same code, and hears the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ps import failpoints
from ps.errors import MalformedFrame, StaleFence
from ps.shard.protocol import StepProtocol
from ps.shard.records import Decided, Reduced
from ps.shard.replay import hold
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.types import Decision
from ps.wire.messages import Mirrored, State

log = logging.getLogger(__name__)


class Follower:
    """What a standby holds.

    Concurrency: under the shard's lock, all of it.

    Args:
        carry_out: does what a shard does with a decision of a step of which everything is held.
        went_on: a decision was carried out on what is held so far, and the next step is open.
        end_stream: nothing more is taken from the stream that is open.
    """

    def __init__(
        self,
        protocol: StepProtocol,
        store: Store,
        carry_out: Callable[[Decision], None],
        went_on: Callable[[Decision], None],
        end_stream: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        self._store = store
        self._chunks = store.chunks
        self._carry_out = carry_out
        self._went_on = went_on
        self._end_stream = end_stream
        #: By chunk: the version of its state.
        self._versions: dict[int, int] = {}
        #: By chunk: the version of a state that is on its way, and which of its arrays have come.
        self._coming: dict[int, tuple[int, set[str]]] = {}
        #: It was whole already, when somebody last looked.
        self._was_whole = False

    @property
    def is_whole(self) -> bool:
        """The state of every chunk is held, as of the open step."""
        return len(self._versions) == len(self._chunks) and set(self._versions.values()) == {self._protocol.step}

    @property
    def doing(self) -> str:
        """What it does, for people."""
        holds = "" if self.is_whole else f", holds {len(self._versions)} of {len(self._chunks)} chunks"
        return f"step {self._protocol.step}: stands by{holds}"

    def forget(self, why: str) -> None:
        """Hold nothing: the shard sends its state anew, on another stream."""
        if self._versions:
            log.warning("standby %d begins anew: %s", self._protocol.shard, why)
        self._versions.clear()
        self._coming.clear()
        self._was_whole = False
        self._protocol.reopen(self._protocol.loss_scale)
        self._end_stream()

    def held(self) -> Mirrored:
        """Say what is held, to a stream that begins."""
        step = self._protocol.step
        # A state of which only some arrays came is of no use on another stream, nor is one of a later step.
        self._coming.clear()
        self._versions = {index: version for index, version in self._versions.items() if version == step}
        reduced = (chunk.index for chunk in self._chunks if self._protocol.reduction(chunk.index).reduced)
        return Mirrored(step, self._bitmap(self._versions), self._bitmap(reduced))

    def _bitmap(self, chunks: Iterable[int]) -> bytes:
        positions = {chunk.index: position for position, chunk in enumerate(self._chunks)}
        bits = sum(1 << positions[index] for index in chunks)
        return bits.to_bytes(-(-len(positions) // 8), "little")

    # -- From the shard -------------------------------------------------------------------------

    def take_state(self, header: State, payload: memoryview) -> None:
        """Take one array of a chunk."""
        store, chunk = self._store, self._protocol.owned(header.chunk)
        arrays = store.arrays(chunk)
        array = arrays.get(header.array)
        if array is None or payload.nbytes != array.nbytes:
            raise MalformedFrame(f"state: {payload.nbytes} bytes of {header.array[:40]!r} for chunk {chunk.index}")
        if header.version < self._protocol.step:
            raise MalformedFrame(f"state: chunk {chunk.index} of version {header.version} is too old")
        failpoints.hit("state.before", header.array)
        array[:] = np.frombuffer(payload, np.float32)
        version, came = self._coming.get(chunk.index, (header.version, set()))
        came = came | {header.array} if version == header.version else {header.array}
        self._coming[chunk.index] = header.version, came
        if came == set(arrays):
            del self._coming[chunk.index]
            store.publish(chunk, store.encode(chunk, header.version, header.applied))
            self._versions[chunk.index] = header.version
            self._look()
        failpoints.hit("state.after", header.array)

    def take_reduced(self, record: Reduced, payload: memoryview) -> bool:
        """Take what is reduced of a chunk of the open step; True: this is all, and this standby could take over."""
        protocol, store, chunk = self._protocol, self._store, self._protocol.owned(record.chunk)
        if record.step != protocol.step or self._versions.get(chunk.index) != record.step:
            return False
        sizes = (payload.nbytes, len(record.square_sums), len(record.present))
        if sizes != (store.mean(chunk).nbytes, chunk.num_segments, chunk.presence_bytes):
            raise MalformedFrame(f"reduced: chunk {chunk.index} has other sizes than {sizes}")
        numbers = [report.contribution for report in record.contributions]
        if numbers != list(range(protocol.shape.contributions)) or len(record.hashes) != len(numbers):
            raise MalformedFrame(f"reduced: chunk {chunk.index} is not made of all contributions")
        failpoints.hit("reduced.before")
        held = hold(store, protocol, record, payload)
        failpoints.hit("reduced.after")
        return held and protocol.all_reduced

    def take_decided(self, record: Decided) -> None:
        """Carry out a decision on every chunk whose state is held."""
        protocol = self._protocol
        # The shard may have heard it under an older fence; the stream is of the present one.
        decision = replace(record.decision, fence=protocol.fence)
        if decision.step < protocol.step:
            return
        if decision.step == protocol.step and protocol.all_reduced:
            self._carry_out(decision)
            return
        affected = [c for c in self._chunks if self._versions.get(c.index, decision.version) <= decision.step]
        missing = [chunk for chunk in affected if not self._may_update(chunk, decision)]
        if missing:
            self.forget(f"what was reduced of {len(missing)} chunks in step {decision.step} has not come")
            affected = []
        if not decision.skip:
            for chunk in affected:
                self._store.publish(chunk, self._store.apply(chunk, protocol.present(chunk), decision))
        self._versions |= {chunk.index: decision.version for chunk in affected}
        protocol.went_on(decision)
        self._look()
        self._went_on(decision)

    def _may_update(self, chunk: Chunk, decision: Decision) -> bool:
        reduced = decision.skip or self._protocol.reduction(chunk.index).reduced
        return reduced and self._versions[chunk.index] == decision.step

    # -- From the coordinator -------------------------------------------------------------------

    def decide(self, decision: Decision) -> None:
        """Hear a decision. If not everything of its step is held, it counts when it comes from the shard.

        Raises:
            StaleFence: it is not of the present fence.
        """
        protocol = self._protocol
        if decision.fence != protocol.fence:
            raise StaleFence(f"a decision under {decision.fence}, where this standby is at {protocol.fence}")
        if decision.step < protocol.step or (decision.step == protocol.step and protocol.all_reduced):
            self._carry_out(decision)

    def advanced(self) -> None:
        """A decision has been carried out on every chunk, as a shard does it."""
        self._versions = dict.fromkeys(self._versions, self._protocol.step)

    def _look(self) -> None:
        if self.is_whole and not self._was_whole:
            self._was_whole = True
            self._store.close_step()
            log.info("standby %d holds version %d", self._protocol.shard, self._protocol.step)
