"""A worker without torch: Windlass's own loop, client and session around a model of a few chunks."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Said
from ps.client.pusher import Contribution, Encoded
from ps.client.shared import Sharing
from ps.config import RunConfig, from_json
from ps.kernels.convert import decode, encode
from ps.sharding import Chunk, Plan, make_plan
from ps.types import WireDtype, slot_range
from ps.wire.session import Session
from tests.simulation import sequential, threads
from workers.engine.worker import Worker


class Chain:
    """A chain of layers, each a chunk: the `Source` of a client, and the `Contributor` of a worker.

    A forward reads one layer after the other, a backward writes their gradients from the last to the first; both look
    whether what they read is what it has to be.
    """

    def __init__(
        self, plan: Plan, config: RunConfig, expected: Callable[[int], np.ndarray], rng: random.Random, layer_s: float
    ) -> None:
        self._plan = plan
        self._wire: WireDtype = config.precision.wire
        self._slots, self._contributions = config.batch.micro_batches_per_step, config.contributions
        self._expected = expected
        self._rng = rng
        #: What a layer's forward or backward takes at most.
        self._layer_s = layer_s
        self.weights = np.full(plan.size, np.nan, np.float32)
        self.gradients = np.full(plan.size, np.nan, np.float32)
        self.duty: Duty

    # -- Source ---------------------------------------------------------------------------------

    def encode(self, chunk: Chunk, slots: int, room: np.ndarray) -> Encoded:
        digest = encode(self.gradients[chunk.start : chunk.stop], slots, self._wire, room)
        return Encoded(digest, bytes([(1 << len(chunk.runs)) - 1]))

    def decode(self, chunk: Chunk, payload: np.ndarray) -> None:
        decode(payload, self._wire, self.weights[chunk.start : chunk.stop])

    def discard(self) -> None:
        # What is sent of it from now on is seen.
        self.gradients.fill(np.nan)

    def initial(self, chunk: Chunk, room: np.ndarray) -> None:
        room[:] = sequential.initial(chunk)

    def forget_initial(self) -> None:
        pass

    # -- Contributor ----------------------------------------------------------------------------

    def contribute(self, step: int, contribution: int, loss_scale: float) -> Contribution:
        expected = self._expected(step)
        for chunk in self._plan.chunks:
            self.duty.await_weights([chunk])
            self._check(step, chunk, expected)
            self._compute()
        self.duty.await_weights(None)
        self.duty.forget_gradient()
        self.gradients.fill(np.nan)
        begun = self.duty.begin_push(contribution, lambda: (sequential.loss(step, contribution), 1))
        slots = len(slot_range(contribution, self._contributions, self._slots))
        for chunk in reversed(self._plan.chunks):
            self._check(step, chunk, expected)
            here = slice(chunk.start, chunk.stop)
            self.gradients[here] = sequential.gradient(self.weights[here], step, contribution, chunk, slots, loss_scale)
            if self._rng.random() < 0.8:
                self.duty.push_chunk(begun, chunk)
            self._compute()
        return begun

    def evaluate(self, _part: int) -> tuple[float, int, int]:
        raise AssertionError("nothing is evaluated here")

    def _check(self, step: int, chunk: Chunk, expected: np.ndarray) -> None:
        here = slice(chunk.start, chunk.stop)
        if not np.array_equal(self.weights[here], expected[here]):
            raise AssertionError(
                f"step {step} is computed with other weights than its version's in chunk {chunk.index}"
            )

    def _compute(self) -> None:
        threads.time.sleep(self._rng.random() * self._layer_s)


def run(
    coordinator: str,
    rank: int,
    expected: Callable[[int], np.ndarray],
    rng: random.Random,
    layer_s: float,
    sharing: Sharing,
    on_join: Callable[[Worker], None],
) -> None:
    """Be a worker until the end of the run.

    Args:
        expected: the weights of a version.
        layer_s: what a layer takes at most, in seconds.
        sharing: whether its payloads go through shared memory.
        on_join: told of the worker once it has been taken in.

    Raises:
        PsError: why it could not go on.
    """
    inbox = Inbox()
    incarnation = rng.getrandbits(62) + 1
    member = Member(role="worker", rank=rank, incarnation=incarnation, pid=1, host="here")
    message = pb.Model(table=sequential.TABLE.packed(), data_digest="", evaluation_parts=0)

    def on_connect() -> None:
        session.send(model=message)

    session = Session(coordinator, member, lambda said: inbox.put(Said(said)), on_connect)
    config = from_json(RunConfig, session.register(600.0).job)
    chain = Chain(make_plan(sequential.TABLE, config.cluster.shards), config, expected, rng, layer_s)
    client = ParameterClient(
        GrpcTransport(), inbox, int(session.member.rank), incarnation, sequential.TABLE, chain, sharing
    )
    slots, wire = config.batch.micro_batches_per_step, config.precision.wire
    chain.duty = Duty(session, inbox, client, slots, wire, layerwise=True, eager=config.is_eager)
    worker = Worker(session, inbox, chain.duty, chain)
    on_join(worker)
    session.start()
    try:
        worker.run()
    finally:
        client.close()
        session.close()
