"""A torch-free worker whose gradients are there already: it pushes, pulls and converts, nothing else.

The real session, client and duty; only the model is two flat FP32 arrays. Or, with `--hooks`, a torch module whose
gradients come through the hooks of a backward. With `--compute-s` it sleeps where others compute: that many workers
can be had on any machine, and each as slow as is wanted.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty, Interrupted
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Said
from ps.client.pusher import Encoded
from ps.client.shared import Sharing
from ps.config import from_json
from ps.errors import PsError
from ps.kernels.compile import warm_up_worker
from ps.kernels.convert import decode, encode
from ps.pages import float32_zeros
from ps.sharding import Chunk, Plan, make_plan
from ps.telemetry.courier import Courier
from ps.telemetry.trace import Recorder
from ps.types import ParameterTable, TensorSpec, WireDtype
from ps.wire.session import Session
from workers.config import JobConfig

Array = np.ndarray

#: The forward's part of a contribution's time.
FORWARD = 1 / 3


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

    def backward(self, _on_chunk: Callable[[Chunk], None]) -> None:
        """Nothing: the gradients are there, and no chunk is told of before all are."""

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


def work(duty: Duty, plan: Plan, backward: Callable[[Callable[[Chunk], None]], None], compute_s: float) -> None:
    """Push what is dealt, as soon as its weights are there, until the run ends.

    Args:
        backward: brings the gradients, and may tell of chunks that it has finished.
        compute_s: how long a contribution takes, beside that.

    Raises:
        PsError: it ended badly.
    """
    while duty.end is None:
        dealt = duty.ready()
        if dealt is None:
            duty.take(1.0)
            continue
        duty.pulled()
        try:
            _pretend_forward(duty, plan, compute_s * FORWARD)
            duty.forget_gradient()
            begun = duty.begin_push(dealt.pending[0], lambda: (1.0, 1))
            _pretend_backward(plan, compute_s * (1 - FORWARD), partial(duty.push_chunk, begun))
        except Interrupted:
            continue
        finally:
            duty.done()
        backward(partial(duty.push_chunk, begun))
        duty.push(begun, compute_s)
        duty.take(0.0)
    if not duty.end.ok:
        raise PsError(duty.end.reason)


def _pretend_forward(duty: Duty, plan: Plan, seconds: float) -> None:
    """Take so long as a model whose layers are the plan's chunks, and wait for the weights of each as it does.

    Raises:
        Interrupted: nobody wants what would be computed.
    """
    if not seconds:
        return
    for chunk in plan.chunks:
        duty.await_weights([chunk])
        time.sleep(seconds / len(plan.chunks))
    duty.await_weights(None)


def _pretend_backward(plan: Plan, seconds: float, on_chunk: Callable[[Chunk], None]) -> None:
    """Take so long, from the last layer to the first, and tell of each one's gradient."""
    if not seconds:
        return
    end = time.monotonic() + seconds
    for left in range(len(plan.chunks) - 1, -1, -1):
        time.sleep(max(0.0, end - left * seconds / len(plan.chunks) - time.monotonic()))
        on_chunk(plan.chunks[left])


def _arrays(hooks: bool, plan: Plan, wire: WireDtype, seed: int) -> Any:
    if not hooks:
        return FlatArrays(plan.size, wire, seed)
    # Torch takes memory and time to import, which the other workers do without.
    from benchmarks.support.hooked_arrays import HookedArrays

    return HookedArrays(plan, wire, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("coordinator", help="HOST:PORT")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--tensors", type=int, help="default: matrices of 1024 x 1024")
    parser.add_argument("--hooks", action="store_true", help="gradients come through a torch module's hooks")
    parser.add_argument("--compute-s", type=float, default=0.0, help="seconds of a contribution, which it sleeps")
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
    plan = make_plan(table, job.cluster.shards)
    arrays = _arrays(arguments.hooks, plan, wire, rank)
    trace = Recorder(job.traced_steps)
    sharing = Sharing(job.launch.transport)
    client = ParameterClient(GrpcTransport(), inbox, rank, incarnation, table, arrays, sharing, trace)
    slots, seconds = job.batch.micro_batches_per_step, arguments.compute_s
    courier = Courier(session, trace)
    session.start()
    courier.start()
    try:
        layerwise, eager = seconds > 0, job.is_eager
        duty = Duty(session, inbox, client, slots, wire, layerwise=layerwise, eager=eager, trace=trace)
        work(duty, plan, arrays.backward, seconds)
    finally:
        client.close()
        courier.close()
        session.close()


if __name__ == "__main__":
    main()
