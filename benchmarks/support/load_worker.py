"""A torch-free worker whose gradients are there already: it pushes, pulls and converts, nothing else.

The real session, client and loop; only the model is two flat FP32 arrays.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from typing import Any

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Said
from ps.client.pusher import Contribution
from ps.client.shared import Sharing
from ps.config import RunConfig, from_json
from ps.kernels.compile import warm_up_worker
from ps.kernels.convert import decode, encode
from ps.sharding import Chunk, make_plan
from ps.types import ParameterTable, TensorSpec, WireDtype
from ps.wire.session import Session
from workers.engine.worker import Worker

Array = np.ndarray


def table_of(parameters: int) -> ParameterTable:
    """Matrices of 1024 x 1024 and what is left over, so that tensors and chunks do not coincide."""
    sizes = [1 << 20] * (parameters >> 20)
    rest = parameters - sum(sizes)
    shapes = [(1024, 1024)] * len(sizes) + ([(rest,)] if rest else [])
    return ParameterTable(tuple(TensorSpec(f"w{index}", shape, 0) for index, shape in enumerate(shapes)))


class FlatArrays:
    """Weights and gradients as flat FP32 arrays."""

    def __init__(self, size: int, wire: WireDtype, seed: int) -> None:
        self.weights = np.zeros(size, np.float32)
        self.gradients = np.random.default_rng(seed).standard_normal(size, np.float32) * np.float32(1e-3)
        self._wire = wire

    def encode(self, chunk: Chunk, slots: int, room: Array) -> bytes:
        encode(self.gradients[chunk.start : chunk.stop], slots, self._wire, room)
        return ((1 << len(chunk.runs)) - 1).to_bytes(chunk.presence_bytes, "little")

    def decode(self, chunk: Chunk, payload: Array) -> None:
        decode(payload, self._wire, self.weights[chunk.start : chunk.stop])

    def initial(self, chunk: Chunk, room: Array) -> None:
        for run in chunk.runs:
            room[run.start : run.stop] = 0.02

    def discard(self) -> None:
        pass

    def forget_initial(self) -> None:
        pass


class Ready:
    """Contributions that cost nothing."""

    def __init__(self, duty: Duty) -> None:
        self._duty = duty

    def contribute(self, _step: int, contribution: int, _loss_scale: float) -> Contribution:
        self._duty.await_weights(None)
        return self._duty.begin_push(contribution, lambda: (1.0, 1))

    def evaluate(self, _part: int) -> tuple[float, int, int]:
        return 1.0, 1, 1


def main(coordinator: str, rank: int, parameters: int) -> None:
    inbox = Inbox()
    incarnation = random.SystemRandom().getrandbits(62) + 1
    member = Member(role="worker", rank=rank, incarnation=incarnation, pid=os.getpid(), host=socket.gethostname())
    table = table_of(parameters)
    message = pb.Model(table=table.packed(), data_digest="", evaluation_parts=0)
    session = Session(coordinator, member, lambda said: inbox.put(Said(said)), lambda: session.send(model=message))
    config = from_json(RunConfig, session.register(60.0).job)
    wire = config.precision.wire
    warm_up_worker(wire)
    arrays: Any = FlatArrays(make_plan(table, config.cluster.shards).size, wire, rank)
    client = ParameterClient(
        GrpcTransport(), inbox, rank, incarnation, table, arrays, Sharing(os.environ.get("LAB_TRANSPORT", "grpc"))
    )
    session.start()
    try:
        duty = Duty(session, inbox, client, config.batch.micro_batches_per_step, wire, eager=config.is_eager)
        Worker(session, inbox, duty, Ready(duty)).run()
    finally:
        client.close()
        session.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
