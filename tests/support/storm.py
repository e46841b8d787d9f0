"""A cluster of threads over streams that break: real shards and real clients, a coordinator that deals as it likes.

The model is a chain of layers, each a chunk: a forward reads one after the other, a backward writes their
gradients from the last to the first, and both look whether what they read is what it has to be.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.inprocess_transport import InProcessTransport
from ps.client.links import Inbox, Said
from ps.client.pusher import Contribution, Encoded
from ps.client.shared import Sharing
from ps.client.transport import Connection, OnClose, OnFrame, Transport
from ps.config import RunConfig, validate
from ps.coordinator.decision import TrainingState, after, decide, foregone
from ps.kernels.convert import decode, encode
from ps.shard.engine import Outbox, ShardEngine
from ps.shard.exchange import Exchange
from ps.shard.seat import Seat
from ps.sharding import Chunk, Plan, make_plan
from ps.types import Fence, WireDtype, slot_range
from ps.wire.proto import from_proto, to_proto
from tests.support.plans import table_of_chunks
from workers.engine.worker import Worker

RUN = "run-1"
CHUNKS = 7
SHARDS = 2
CONTRIBUTIONS = 4
SLOTS = 8
#: A storm in which nothing happens for so long hangs.
STUCK_S = 60.0


@dataclass(frozen=True)
class Weather:
    """How often what goes wrong; each is a probability."""

    #: That a stream breaks with a frame, in either direction.
    breaks: float = 0.0
    #: That a frame is late, by at most `late_s`.
    late: float = 0.0
    late_s: float = 0.002
    #: That a contribution is dealt to a second worker too; and, of each moment of a step, that one is dealt again.
    twice: float = 0.0
    again: float = 0.0
    #: Of each moment of a step: that there is a new fence, or that a worker leaves and another one comes.
    fence: float = 0.0
    leave: float = 0.0


CALM = Weather()


class StormyTransport:
    """Frames wait for room as they do in gRPC's streams, are late, and break their stream."""

    def __init__(self, inner: Transport, rng: random.Random, weather: Weather) -> None:
        self._inner = inner
        self.rng = rng
        self.weather = weather
        self.broken = 0
        self._pause = threading.Event()

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> Connection:
        return _Stormy(self, address, on_frame, on_close)

    def strikes(self) -> bool:
        """Whether the stream breaks now; may take its time."""
        if self.rng.random() < self.weather.late:
            self._pause.wait(self.rng.uniform(0, self.weather.late_s))
        strikes = self.rng.random() < self.weather.breaks
        self.broken += strikes
        return strikes


class _Stormy:
    def __init__(self, transport: StormyTransport, address: str, on_frame: OnFrame, on_close: OnClose) -> None:
        self._transport = transport
        self._on_frame = on_frame
        self._closed = threading.Event()
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(1)

        def closed(reason: str) -> None:
            self._closed.set()
            on_close(reason)

        self._inner = transport._inner.connect(address, self._receive, closed)
        threading.Thread(target=self._send, name=f"to {address}", daemon=True).start()

    def send(self, data: bytes, timeout_s: float) -> bool:
        if self._closed.is_set():
            return True
        try:
            self._outgoing.put(data, timeout=timeout_s)
        except queue.Full:
            return self._closed.is_set()
        return True

    @property
    def has_room(self) -> bool:
        return not self._outgoing.full()

    def close(self) -> None:
        self._closed.set()
        self._inner.close()

    def _send(self) -> None:
        while not self._closed.is_set():
            try:
                data = self._outgoing.get(timeout=0.05)
            except queue.Empty:
                continue
            assert data is not None
            if self._transport.strikes():
                self.close()
            elif not self._closed.is_set():
                self._inner.send(data, 1.0)

    def _receive(self, data: bytes) -> None:
        if self._transport.strikes():
            self.close()
        elif not self._closed.is_set():
            self._on_frame(data)


class Chain:
    """A model without torch: `Source` of a client, and `Contributor` of a worker."""

    def __init__(self, plan: Plan, wire: WireDtype, truth: dict[int, np.ndarray], rng: random.Random) -> None:
        self._plan = plan
        self._wire = wire
        #: The weights of each version, in FP32 as a worker has them.
        self._truth = truth
        self._rng = rng
        self._pause = threading.Event()
        self.weights = np.full(plan.size, np.nan, np.float32)
        self.gradients = np.full(plan.size, np.nan, np.float32)
        self.duty: Any = None

    # -- Source ---------------------------------------------------------------------------------

    def encode(self, chunk: Chunk, slots: int, room: np.ndarray) -> Encoded:
        return Encoded(encode(self.gradients[chunk.start : chunk.stop], slots, self._wire, room), b"\x01")

    def decode(self, chunk: Chunk, payload: np.ndarray) -> None:
        decode(payload, self._wire, self.weights[chunk.start : chunk.stop])

    def discard(self) -> None:
        # What is sent of it from now on makes the step overflow.
        self.gradients.fill(np.nan)

    def initial(self, chunk: Chunk, room: np.ndarray) -> None:
        room[:] = np.random.default_rng([1, chunk.index]).standard_normal(chunk.size, np.float32) * 0.1

    def forget_initial(self) -> None:
        pass

    # -- Contributor ----------------------------------------------------------------------------

    def contribute(self, step: int, contribution: int, loss_scale: float) -> Contribution:
        truth = self._truth[step]
        for chunk in self._plan.chunks:
            self.duty.await_weights([chunk])
            self._check(step, chunk, truth)
            self._linger()
        self.duty.await_weights(None)
        self.duty.forget_gradient()
        self.gradients.fill(np.nan)
        begun: Contribution = self.duty.begin_push(contribution, lambda: (float(contribution), 1))
        slots = len(slot_range(contribution, CONTRIBUTIONS, SLOTS))
        left: list[Chunk] = []
        for chunk in reversed(self._plan.chunks):
            self._check(step, chunk, truth)
            here = slice(chunk.start, chunk.stop)
            noise = np.random.default_rng([2, step, contribution, chunk.index]).standard_normal(chunk.size, np.float32)
            self.gradients[here] = (self.weights[here] + noise) * np.float32(slots * loss_scale * 2.0**-6)
            if self._rng.random() < 0.2:
                left.append(chunk)
            else:
                self.duty.push_chunk(begun, chunk)
            self._linger()
        return begun

    def evaluate(self, _part: int) -> tuple[float, int, int]:
        raise AssertionError("nothing is evaluated here")

    def _check(self, step: int, chunk: Chunk, truth: np.ndarray) -> None:
        here = slice(chunk.start, chunk.stop)
        if not np.array_equal(self.weights[here], truth[here]):
            there = self.weights[here]
            found = [version for version, weights in self._truth.items() if np.array_equal(weights[here], there)]
            raise AssertionError(f"step {step} computes with chunk {chunk.index} of version {found}")

    def _linger(self) -> None:
        if self._rng.random() < 0.3:
            self._pause.wait(self._rng.uniform(0, 0.001))


class Hand:
    """One worker, in a thread."""

    def __init__(self, storm: Storm, rank: int, incarnation: int) -> None:
        self.inbox = Inbox()
        #: Stands for the session.
        session: Any = SimpleNamespace(run=RUN, send=self._hear, doing=lambda *_: None, connected=True)
        self.chain = Chain(storm.plan, storm.wire, storm.truth, random.Random(storm.rng.random()))
        transport = StormyTransport(
            InProcessTransport(storm.open_stream), random.Random(storm.rng.random()), storm.weather
        )
        self.transport = transport
        self.client = ParameterClient(
            transport, self.inbox, rank, incarnation, storm.plan.table, self.chain, storm.sharing
        )
        eager = storm.config.is_eager
        self.chain.duty = Duty(session, self.inbox, self.client, SLOTS, storm.wire, layerwise=True, eager=eager)
        self.worker = Worker(session, self.inbox, self.chain.duty, self.chain)
        self.failure: BaseException | None = None
        #: What every shard holds, by this worker.
        self.reported: list[tuple[Fence, int, int]] = []
        self.thread = threading.Thread(target=self._run, name=f"worker {rank}", daemon=True)
        self.thread.start()

    def _hear(self, **event: Any) -> None:
        if "contributed" in event:
            told = event["contributed"]
            self.reported.append((from_proto(Fence, told.fence), told.step, told.contribution))

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as failure:  # noqa: BLE001 - the coordinator raises it
            self.failure = failure
        finally:
            self.client.close()

    def say(self, **event: Any) -> None:
        self.inbox.put(Said(pb.SessionResponse(**event)))

    def end(self) -> None:
        # Asked twice it leaves the open step, too.
        self.worker.leave()
        self.worker.leave()
        self.thread.join(STUCK_S)
        assert not self.thread.is_alive(), "a worker cannot be ended"


class Storm:
    """Makes steps whatever the weather; `run` returns the state hashes after each of them."""

    def __init__(
        self,
        run_dir: Path,
        seed: int,
        weather: Weather,
        *,
        workers: int = 2,
        sharing: Sharing = Sharing.NEVER,
        eager: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.weather = weather
        self.sharing = sharing
        self.config: RunConfig = validate(
            RunConfig,
            {
                "run_dir": run_dir,
                "cluster": {"shards": SHARDS},
                "batch": {"micro_batches_per_step": SLOTS},
                "precision": {"wire": "fp32" if eager else "fp16"},
                "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.0 if eager else 1.0},
                "schedule": {"warmup_steps": 0},
            },
        )
        self.wire = self.config.precision.wire
        self.plan = make_plan(table_of_chunks(CHUNKS), SHARDS)
        self.truth: dict[int, np.ndarray] = {}
        self.engines = [ShardEngine(self.config, RUN, self.plan.table, shard, CONTRIBUTIONS) for shard in range(SHARDS)]
        self._told: queue.Queue[tuple[str, Any]] = queue.Queue()
        for engine in self.engines:
            engine.outbox = Outbox(
                lambda report: self._told.put(("prepared", report)),
                lambda report: self._told.put(("applied", report)),
                lambda fence, shard: self._told.put(("initialized", (fence, shard))),
                failed=lambda failure: self._told.put(("failed", failure)),
            )
        self.fence = Fence(1, 1)
        self.state = TrainingState.start(self.config)
        self._incarnations = 0
        self.broken = 0
        self.left = 0
        self.hands = [self._hire(rank) for rank in range(workers)]

    def open_stream(self, address: str) -> Exchange:
        return Exchange(self.engines[int(address)], 1)

    def _hire(self, rank: int) -> Hand:
        self._incarnations += 1
        return Hand(self, rank, self._incarnations)

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self.hands:
            hand.end()
            self.broken += hand.transport.broken
        for engine in self.engines:
            engine.close()

    # -- The coordinator ------------------------------------------------------------------------

    def run(self, steps: int) -> list[tuple[int, ...]]:
        for engine in self.engines:
            Seat(engine).load(self.fence, None, "")
        self._serve()
        self.hands[0].say(deal=self._deal(initialize=True))
        self._await("initialized", lambda told: (told[0], told[1]))
        hashes = []
        for _ in range(steps):
            self._note_truth()
            if self.config.is_eager:
                self._foresee()
            for hand in self.hands:
                hand.say(deal=self._deal())
            for contribution in range(CONTRIBUTIONS):
                takers = 2 if self.rng.random() < self.weather.twice else 1
                for hand in self.rng.sample(self.hands, min(takers, len(self.hands))):
                    hand.say(deal=self._deal(contribution))
            self._decide()
            hashes.append(tuple(engine.store.state_hash for engine in self.engines))
        return hashes

    def _decide(self) -> None:
        reports = self._await("prepared", lambda report: (report.fence, report.shard), self._disturb)
        state, decision = self.state, decide(self.config, self.state, reports, self.fence)
        assert not decision.skip, "what was pushed was no gradient"
        self.state = after(self.state, decision)
        for engine in self.engines:
            engine.decide(decision)
        self._await("applied", lambda report: (report.fence, report.shard) if report.step == state.version else None)

    def _await(
        self, kind: str, key: Callable[[Any], tuple[Fence, int] | None], disturb: Callable[[], None] = lambda: None
    ) -> list[Any]:
        """What every shard says under the present fence."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + STUCK_S
        while len(found) < SHARDS:
            for hand in self.hands:
                if hand.failure is not None:
                    raise hand.failure
            assert time.monotonic() < deadline, f"step {self.state.version}: no {kind}; {self._threads()}"
            try:
                what, told = self._told.get(timeout=0.002)
            except queue.Empty:
                disturb()
                found = {shard: told for shard, told in found.items() if key(told) == (self.fence, shard)}
                continue
            if what == "failed":
                raise told
            place = key(told) if what == kind else None
            if place is not None and place[0] == self.fence:
                found[place[1]] = told
        return [found[shard] for shard in range(SHARDS)]

    def _disturb(self) -> None:
        """Something happens in the middle of a step."""
        weather, rng = self.weather, self.rng
        self._tell_done()
        if rng.random() < weather.again:
            rng.choice(self.hands).say(deal=self._deal(rng.randrange(CONTRIBUTIONS)))
        if rng.random() < weather.leave:
            rank = rng.randrange(len(self.hands))
            hand = self.hands[rank]
            hand.end()
            self.left += 1
            self.broken += hand.transport.broken
            self.hands[rank] = self._hire(rank)
            self._greet(self.hands[rank])
            self._deal_all(self.hands[rank])
        if rng.random() < weather.fence:
            self.fence = Fence(self.fence.term, self.fence.epoch + 1)
            self._serve()
            if self.config.is_eager:
                self._foresee()
            self._deal_all(rng.choice(self.hands))

    def _tell_done(self) -> None:
        """Who has finished a contribution says so, and the others hear of it."""
        for hand in self.hands:
            reported, hand.reported = hand.reported, []
            for fence, step, contribution in reported:
                if (fence, step) == (self.fence, self.state.version):
                    for other in self.hands:
                        if other is not hand:
                            other.say(deal=self._deal(done=(contribution,)))

    def _deal_all(self, hand: Hand) -> None:
        for contribution in self.rng.sample(range(CONTRIBUTIONS), CONTRIBUTIONS):
            hand.say(deal=self._deal(contribution))

    def _serve(self) -> None:
        state = self.state
        for engine in self.engines:
            Seat(engine).serve(self.fence, state.version, state.applied, state.scaler.scale)
        for hand in self.hands:
            self._greet(hand)

    def _foresee(self) -> None:
        decision = foregone(self.config, self.state, self.fence)
        assert decision is not None
        for engine in self.engines:
            engine.foresee(decision)

    def _greet(self, hand: Hand) -> None:
        shards = [Member(role="shard", rank=shard, address=str(shard)) for shard in range(SHARDS)]
        hand.say(
            cluster=pb.Cluster(
                fence=to_proto(self.fence),
                plan_digest=self.plan.digest,
                shards=shards,
                contributions=CONTRIBUTIONS,
                step=self.state.version,
            )
        )

    def _deal(self, *contributions: int, initialize: bool = False, done: tuple[int, ...] = ()) -> pb.Deal:
        return pb.Deal(
            fence=to_proto(self.fence),
            step=self.state.version,
            applied=self.state.applied,
            loss_scale=self.state.scaler.scale,
            contributions=contributions,
            initialize=initialize,
            done=done,
        )

    def _note_truth(self) -> None:
        weights = np.zeros(self.plan.size, np.float32)
        for engine in self.engines:
            for chunk in engine.chunks:
                rounded = np.empty(chunk.size, self.wire.numpy)
                encode(engine.store.weights(chunk), 1, self.wire, rounded)
                decode(rounded, self.wire, weights[chunk.start : chunk.stop])
        self.truth[self.state.version] = weights

    def _threads(self) -> str:
        """Where everybody is, for a storm that hangs."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{names.get(ident)}:\n" + "".join(traceback.format_stack(stack)[-6:])
            for ident, stack in sys._current_frames().items()
        ]
        duties = [f"{hand.chain.duty.dealt} pulled {vars(hand.client.pulled)}" for hand in self.hands]
        missing = [engine.protocol.missing() for engine in self.engines]
        return "\n".join([f"missing {missing}", *duties, *stacks])
