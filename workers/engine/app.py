"""The worker process: session, model, data; the way in and the way out."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
from dataclasses import dataclass
from functools import partial

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Said
from ps.client.shared import Sharing
from ps.client.transport import Transport
from ps.config import from_json
from ps.kernels.compile import warm_up_worker
from ps.sharding import make_plan
from ps.telemetry import logs
from ps.telemetry.courier import Courier
from ps.telemetry.exporter import identify, serve_metrics
from ps.telemetry.trace import Recorder
from ps.types import Role
from ps.wire.health import Health, enable_reflection
from ps.wire.options import bind, make_server, reachable
from ps.wire.security import PLAIN, Security
from ps.wire.session import Session
from workers.config import JobConfig
from workers.data.batches import HeldOut, TokenBatches
from workers.data.kept import keep_where_the_run_is
from workers.data.prepare import PreparedData, prepare
from workers.engine import device, metrics
from workers.engine.compute import Contributor
from workers.engine.flat_model import FlatModel, without_values
from workers.engine.worker import Worker
from workers.models.gpt import GPT
from workers.models.groups import parameter_table

log = logging.getLogger(__name__)

#: A worker serves nothing but its health.
HEALTH_SERVICE = "windlass.ps.v1.Worker"
HEALTH_THREADS = 4


@dataclass(frozen=True)
class Joined:
    """A worker that has been taken in, with its data and its model."""

    worker: Worker
    session: Session
    client: ParameterClient
    courier: Courier

    def run(self) -> str:
        """Work until the end; returns why it ended.

        Raises:
            PsError: why it could not go on.
        """
        self.session.start()
        self.courier.start()
        try:
            return self.worker.run()
        finally:
            self.client.close()
            self.courier.close()
            self.session.close()


def run(
    coordinator: str,
    rank: int | None,
    device_name: str | None,
    listen: str,
    metrics_listen: str | None,
    security: Security = PLAIN,
    advertise: str | None = None,
    start_timeout_s: float = 120.0,
) -> int:
    """Run one worker until the end of the run; returns the exit code.

    Args:
        coordinator: host:port.
        rank: its number; None: the coordinator gives one.
        device_name: None: as the job says.
        listen: host:port of the health service; port 0 takes any.
        metrics_listen: host:port of the Prometheus exporter; None: no exporter.
        security: its certificates, if any.
        advertise: the host that others are told; None: that of `listen`, or this host's name.

    Raises:
        PsError: why it could not start, or ended; one line.
    """
    server = make_server(HEALTH_THREADS)
    health = Health(server, HEALTH_SERVICE)
    enable_reflection(server, [])
    address = f"{reachable(listen, advertise)}:{bind(server, listen, security)}"
    server.start()
    metrics_address = (
        f"{reachable(metrics_listen, advertise)}:{serve_metrics(metrics_listen)}" if metrics_listen else ""
    )
    try:
        transport = GrpcTransport(security)
        joined = join(coordinator, rank, device_name, transport, start_timeout_s, address, metrics_address, security)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: joined.worker.leave())
        health.serving()
        reason = joined.run()
    finally:
        health.not_serving()
        server.stop(grace=None)
    log.info("worker %d ends: %s", joined.session.member.rank, reason)
    return 0


def join(
    coordinator: str,
    rank: int | None,
    device_name: str | None,
    transport: Transport,
    start_timeout_s: float,
    address: str = "",
    metrics_address: str = "",
    security: Security = PLAIN,
) -> Joined:
    """Register, and prepare everything that the run needs of this worker.

    Raises:
        PsError: why it could not; one line.
    """
    inbox = Inbox()
    incarnation = random.SystemRandom().getrandbits(62) + 1
    member = Member(
        role="worker",
        rank=-1 if rank is None else rank,
        incarnation=incarnation,
        pid=os.getpid(),
        host=socket.gethostname(),
        address=address,
        metrics_address=metrics_address,
    )
    model_message: list[pb.Model] = []

    def on_connect() -> None:
        session.send(model=model_message[0])

    session = Session(coordinator, member, lambda message: inbox.put(Said(message)), on_connect, security)
    response = session.register(start_timeout_s)
    logs.bind(rank=int(response.rank))
    job = from_json(JobConfig, response.job)
    identify(job.run_name, Role.WORKER, int(response.rank))
    session.doing("loading the data and the model")
    data = prepare(job.data)
    trace = Recorder(job.traced_steps)
    worker, client, message = _build(
        job, data, session, inbox, transport, device_name or job.worker.device, incarnation, trace
    )
    model_message.append(message)
    session.doing("waiting for the shards")
    return Joined(worker, session, client, Courier(session, trace))


def _build(
    job: JobConfig,
    data: PreparedData,
    session: Session,
    inbox: Inbox,
    transport: Transport,
    device_name: str,
    incarnation: int,
    trace: Recorder,
) -> tuple[Worker, ParameterClient, pb.Model]:
    chosen = device.choose(device_name)
    device.prepare(chosen, job.worker.threads)
    dtype = device.compute_dtype(job.precision, chosen)
    wire = job.precision.wire
    warm_up_worker(wire)
    accumulate_fp16 = job.precision.accumulate == "fp16"

    with without_values():
        module = GPT(job.model, data.vocab_size, job.data.sequence_length)
    table = parameter_table(module, job.optimizer.decay_all)
    plan = make_plan(table, job.cluster.shards)
    initial_value = partial(module.initial_value, seed=job.seed)
    flat = FlatModel(module, plan, chosen, dtype, wire, accumulate_fp16, initial_value, overlap=job.worker.overlap)
    contributions = job.contributions
    slots = job.batch.micro_batches_per_step
    held_out = HeldOut(data, job.data.sequence_length, job.evaluation.max_sequences, contributions)
    client = ParameterClient(
        transport, inbox, int(session.member.rank), incarnation, table, flat, Sharing(job.launch.transport), trace
    )
    duty = Duty(
        session,
        inbox,
        client,
        slots,
        wire,
        layerwise=job.worker.overlap,
        eager=job.is_eager,
        on_pushed=metrics.PUSH_SECONDS.observe,
        trace=trace,
    )
    contributor = Contributor(
        module,
        flat,
        TokenBatches(data, job.data.sequence_length, job.batch.micro_batch_size, job.seed, slots),
        held_out,
        job.seed,
        slots,
        contributions,
        job.batch.micro_batch_size,
        accumulate_fp16,
        duty,
        trace,
    )
    worker = Worker(session, inbox, duty, contributor, partial(keep_where_the_run_is, job, data), trace)
    log.info("%d parameters in %s on %s", table.num_parameters, dtype, chosen)
    message = pb.Model(table=table.packed(), data_digest=data.digest, evaluation_parts=contributions)
    return worker, client, message
