"""A standby: it holds what its shard sends, applies the same decisions, and serves nobody until it is needed.

A chunk counts once its state has come; from then on everything that is reduced of it comes too, and decisions are
applied to it. With the state of every chunk the standby does what its shard does, by the same code.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from ps import failpoints
from ps.errors import MalformedFrame, Refusal, StaleFence
from ps.types import Applied, ContributionReport, Decision
from ps.wire import frame
from ps.wire.messages import Covered, Header, Mirror, Mirrored, Reduced, Refused, State, StepReduced, parse_to_standby

if TYPE_CHECKING:
    from ps.shard.engine import ShardEngine

log = logging.getLogger(__name__)

#: A frame of the next step waits so long for the decision of the present one, which the coordinator may be telling
#: to the shard first.
OPEN_S = 60.0


class Follower:
    """What a standby holds. Everything but `decide` is called with the engine's lock held."""

    def __init__(self, engine: ShardEngine) -> None:
        self._engine = engine
        #: By chunk: the version of its state.
        self._versions: dict[int, int] = {}
        #: By chunk: the version of a state that is on its way, and which of its arrays have come.
        self._coming: dict[int, tuple[int, set[str]]] = {}
        #: By chunk: which of its runs had a gradient, for what is reduced of the open step.
        self._reduced: dict[int, bytes] = {}
        #: The stream that counts: the last one that was opened.
        self.stream: FollowerStream | None = None

    @property
    def is_whole(self) -> bool:
        """The state of every chunk is held, as of the open step."""
        step = self._engine.protocol.step
        return len(self._versions) == len(self._engine.chunks) and set(self._versions.values()) == {step}

    @property
    def doing(self) -> str:
        """What it does, for people."""
        chunks = len(self._engine.chunks)
        holds = "" if self.is_whole else f", holds {len(self._versions)} of {chunks} chunks"
        return f"step {self._engine.protocol.step}: stands by{holds}"

    def forget(self, why: str) -> None:
        """Hold nothing: the shard sends its state anew."""
        if self._versions:
            log.warning("standby %d begins anew: %s", self._engine.shard, why)
        self._versions.clear()
        self._coming.clear()
        self._reduced.clear()
        self._engine.has_state = False
        self.close()

    def close(self) -> None:
        """Take nothing more from the stream that is open; what is held stays."""
        if self.stream is not None:
            self.stream.close()

    def held(self) -> Mirrored:
        """Say what is held, to a stream that begins."""
        engine = self._engine
        # A state of which only some arrays came is of no use on another stream.
        self._coming.clear()
        positions = {chunk.index: position for position, chunk in enumerate(engine.chunks)}

        def bitmap(chunks: Iterator[int]) -> bytes:
            bits = sum(1 << positions[index] for index in chunks)
            return bits.to_bytes(-(-len(positions) // 8), "little")

        return Mirrored(engine.protocol.step, bitmap(iter(self._versions)), bitmap(iter(self._reduced)))

    def take_state(self, header: State, payload: memoryview) -> None:
        """Take one array of a chunk."""
        engine = self._engine
        chunk = engine.protocol.owned(header.chunk)
        arrays = engine.store.arrays(chunk)
        array = arrays.get(header.array)
        if array is None or payload.nbytes != array.nbytes:
            raise MalformedFrame(f"state: {payload.nbytes} bytes of {header.array[:40]!r} for chunk {chunk.index}")
        if header.version < engine.protocol.step:
            raise MalformedFrame(f"state: chunk {chunk.index} of version {header.version} is too old")
        failpoints.hit("state.before", header.array)
        array[:] = np.frombuffer(payload, np.float32)
        version, came = self._coming.get(chunk.index, (header.version, set()))
        came = came | {header.array} if version == header.version else {header.array}
        self._coming[chunk.index] = header.version, came
        if came == set(arrays):
            del self._coming[chunk.index]
            engine.store.publish(chunk, engine.store.encode(chunk, header.version, header.applied))
            self._versions[chunk.index] = header.version
            self._note_whole()
        failpoints.hit("state.after", header.array)

    def take_reduced(self, header: Reduced, payload: memoryview) -> None:
        """Take what is reduced of a chunk of the open step."""
        store, chunk = self._engine.store, self._engine.protocol.owned(header.chunk)
        if self._versions.get(chunk.index) != header.step:
            return
        mean, squares = store.mean(chunk), store.square_sums(chunk)
        sizes = (payload.nbytes, len(header.squares), len(header.present))
        if sizes != (mean.nbytes, squares.nbytes, chunk.presence_bytes):
            raise MalformedFrame(f"reduced: chunk {chunk.index} has other sizes than {sizes}")
        failpoints.hit("reduced.before")
        mean[:] = np.frombuffer(payload, np.float32)
        squares[:] = np.frombuffer(header.squares, np.float64)
        self._reduced[chunk.index] = header.present
        failpoints.hit("reduced.after")

    def take_step(self, header: StepReduced, payload: memoryview) -> Covered:
        """All of the open step has been sent; say whether it is held."""
        whole = self.is_whole and len(self._reduced) == len(self._engine.chunks)
        if whole and not self._engine.protocol.all_reduced:
            reports = _reports(payload)
            present = {index: int.from_bytes(bits, "little") for index, bits in self._reduced.items()}
            finite = {
                index: bool(np.isfinite(self._engine.store.square_sums(self._engine.protocol.owned(index))).all())
                for index in present
            }
            self._engine.protocol.take_reduced(present, finite, reports)
        return Covered(header.step, whole)

    def decide(self, decision: Decision) -> None:
        """Carry out a decision on every chunk whose state is held."""
        engine, protocol = self._engine, self._engine.protocol
        with engine.lock:
            if decision.fence != protocol.fence:
                raise StaleFence(f"a decision under {decision.fence}, where this standby is at {protocol.fence}")
            if decision.step < protocol.step or protocol.deciding is not None or protocol.all_reduced:
                # As the shard itself does.
                engine.decide(decision)
                return
            affected = [chunk for chunk in engine.chunks if self._versions.get(chunk.index, -1) <= decision.step]
            affected = [chunk for chunk in affected if chunk.index in self._versions]
            missing = [c for c in affected if c.index not in self._reduced or self._versions[c.index] != decision.step]
            if missing and not decision.skip:
                self.forget(f"what was reduced of {len(missing)} chunks in step {decision.step} has not come")
                affected = []
            if not decision.skip:
                for chunk in affected:
                    bits = np.frombuffer(self._reduced[chunk.index], np.uint8)
                    present = np.unpackbits(bits, bitorder="little")[: len(chunk.runs)].astype(bool)
                    engine.store.publish(chunk, engine.store.apply(chunk, present, decision))
            self._versions |= {chunk.index: decision.version for chunk in affected}
            protocol.went_on(decision)
            engine.note_followed(Applied(protocol.fence, decision.step, engine.shard, 0))
            self._opened()

    def advanced(self) -> None:
        """The engine has carried out a decision on every chunk."""
        step = self._engine.protocol.step
        self._versions = dict.fromkeys(self._versions, step)
        self._opened()

    def _opened(self) -> None:
        """The next step is open, and nothing of it is reduced; what is on its way may be its state."""
        self._reduced.clear()
        self._note_whole()
        self._engine.opened.notify_all()

    def _note_whole(self) -> None:
        if self.is_whole and not self._engine.has_state:
            self._engine.has_state = True
            log.info("standby %d holds version %d", self._engine.shard, self._engine.protocol.step)


class FollowerStream:
    """The standby's side of the stream from its shard."""

    def __init__(self, engine: ShardEngine, incarnation: int) -> None:
        self._engine = engine
        self._incarnation = incarnation
        self._follower: Follower | None = None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False

    def close(self) -> None:
        """Take nothing more, and end `replies` with what is answered already."""
        with self._engine.lock:
            if not self._closed:
                self._closed = True
                self._answers.put(None)
            self._engine.opened.notify_all()

    def replies(self) -> Iterator[bytes]:
        while (answer := self._answers.get()) is not None:
            yield answer

    def receive(self, data: bytes) -> None:
        """Take one frame; one of the next step waits until it is open. A refusal is answered, and ends the stream."""
        try:
            with self._engine.lock:
                if self._closed:
                    return
                fields, payload = frame.decode(data)
                answer = self._handle(parse_to_standby(fields), payload)
        except Refusal as refusal:
            log.warning("refused what the shard sent: %s", refusal.message)
            refused = Refused(refusal.code, refusal.message, -1, -1, -1)
            self._answers.put(frame.encode(refused.pack()))
            self.close()
            return
        if isinstance(answer, Covered):
            failpoints.hit("cover.before")
            self._answers.put(frame.encode(answer.pack()))
            failpoints.hit("cover.after")
        elif answer is not None:
            self._answers.put(frame.encode(answer.pack()))

    def _handle(self, header: Header, payload: memoryview) -> Header | None:
        if isinstance(header, Mirror):
            return self._begin(header)
        follower = self._follower
        if follower is None or follower is not self._engine.follower or follower.stream is not self:
            raise StaleFence("this stream is not that of the present shard")
        if isinstance(header, State):
            follower.take_state(header, payload)
            return None
        assert isinstance(header, Reduced | StepReduced), "there are no other kinds"
        protocol, opened = self._engine.protocol, self._engine.opened
        if header.step > protocol.step:
            opened.wait_for(lambda: self._closed or protocol.step >= header.step, OPEN_S)
        if self._closed or self._engine.follower is not follower:
            return None
        is_open = header.step == protocol.step
        if isinstance(header, StepReduced):
            # The shard waits for an answer, whatever it is.
            return follower.take_step(header, payload) if is_open else Covered(header.step, False)
        if is_open:
            follower.take_reduced(header, payload)
        return None

    def _begin(self, header: Mirror) -> Mirrored:
        engine = self._engine
        follower, protocol = engine.follower, engine.protocol
        if follower is None or header.fence != protocol.fence or header.run != engine.run:
            raise StaleFence(f"shard {header.shard} under {header.fence}: this process does not follow it")
        if (header.shard, header.plan, header.standby) != (engine.shard, engine.plan.digest, self._incarnation):
            raise StaleFence(f"this process is not the standby that shard {header.shard} means")
        if follower.stream is not None:
            follower.stream.close()
        follower.stream, self._follower = self, follower
        return follower.held()


def _reports(payload: memoryview) -> tuple[ContributionReport, ...]:
    try:
        rows: list[list[Any]] = msgpack.unpackb(payload)
        return tuple(
            ContributionReport(int(number), float(loss_sum), int(tokens), int(rank), int(life))
            for number, loss_sum, tokens, rank, life in rows
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise MalformedFrame(f"step_reduced: {len(payload)} bytes are no list of contributions: {error}") from None
