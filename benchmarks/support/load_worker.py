"""A torch-free worker whose gradients are there already: it pushes, pulls and converts, nothing else.

The real session, client and duty; only the model is two flat FP32 arrays.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
from typing import Any

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Said
from ps.client.pusher import Encoded
from ps.client.shared import Sharing
from ps.config import from_json
from ps.errors import PsError
from ps.kernels.compile import warm_up_worker
from ps.kernels.convert import decode, encode
from ps.pages import float32_zeros
from ps.sharding import Chunk, make_plan
from ps.telemetry.courier import Courier
from ps.telemetry.trace import Recorder
from ps.types import ParameterTable, TensorSpec, WireDtype
from ps.wire.session import Session
from workers.config import JobConfig

Array = np.ndarray


def table_of(parameters: int, tensors: int | None = None) -> ParameterTable:
    """Lay out a model.

    Args:
        tensors: so many of about the same size; None: matrices of 1024 x 1024 and what is left over, so that tensors
            and chunks do not coincide.
    """
    if tensors is None:
        rest = parameters % (1 << 20)
        shapes = [(1024, 1024)] * (parameters >> 20) + ([(rest,)] if rest else [])
    else:
        shapes = [(parameters * (i + 1) // tensors - parameters * i // tensors,) for i in range(tensors)]
    return ParameterTable(tuple(TensorSpec(f"w{index}", shape, 0) for index, shape in enumerate(shapes)))


class FlatArrays:
    """Weights and gradients as flat FP32 arrays."""

    def __init__(self, size: int, wire: WireDtype, seed: int) -> None:
        self.weights = float32_zeros(size)
        self.gradients = float32_zeros(size)
        np.random.default_rng(seed).standard_normal(size, np.float32, out=self.gradients)
        self.gradients *= np.float32(1e-3)
        self._wire = wire

    def encode(self, chunk: Chunk, slots: int, room: Array) -> Encoded:
        digest = encode(self.gradients[chunk.start : chunk.stop], slots, self._wire, room)
        return Encoded(digest, ((1 << len(chunk.runs)) - 1).to_bytes(chunk.presence_bytes, "little"))

    def decode(self, chunk: Chunk, payload: Array) -> None:
        decode(payload, self._wire, self.weights[chunk.start : chunk.stop])

    def initial(self, chunk: Chunk, room: Array) -> None:
        for run in chunk.runs:
            room[run.start : run.stop] = 0.02

    def discard(self) -> None:
        pass

    def forget_initial(self) -> None:
        pass


def work(duty: Duty) -> None:
    """Push what is dealt, as soon as its weights are there, until the run ends.

    Raises:
        PsError: it ended badly.
    """
    while duty.end is None:
        dealt = duty.ready()
        if dealt is None:
            duty.take(1.0)
            continue
        duty.pulled()
        duty.forget_gradient()
        duty.done()
        duty.push(duty.begin_push(dealt.pending[0], lambda: (1.0, 1)), compute_s=0.0)
        duty.take(0.0)
    if not duty.end.ok:
        raise PsError(duty.end.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("coordinator", help="HOST:PORT")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--tensors", type=int, help="default: matrices of 1024 x 1024")
    arguments = parser.parse_args()
    rank, table = arguments.rank, table_of(arguments.parameters, arguments.tensors)
    inbox = Inbox()
    incarnation = random.SystemRandom().getrandbits(62) + 1
    member = Member(role="worker", rank=rank, incarnation=incarnation, pid=os.getpid(), host=socket.gethostname())
    message = pb.Model(table=table.packed(), data_digest="", evaluation_parts=0)
    session = Session(
        arguments.coordinator, member, lambda said: inbox.put(Said(said)), lambda: session.send(model=message)
    )
    job = from_json(JobConfig, session.register(60.0).job)
    wire = job.precision.wire
    warm_up_worker(wire)
    arrays: Any = FlatArrays(make_plan(table, job.cluster.shards).size, wire, rank)
    trace = Recorder(job.traced_steps)
    sharing = Sharing(job.launch.transport)
    client = ParameterClient(GrpcTransport(), inbox, rank, incarnation, table, arrays, sharing, trace)
    slots = job.batch.micro_batches_per_step
    courier = Courier(session, trace)
    session.start()
    courier.start()
    try:
        work(Duty(session, inbox, client, slots, wire, eager=job.is_eager, trace=trace))
    finally:
        client.close()
        courier.close()
        session.close()


if __name__ == "__main__":
    main()
