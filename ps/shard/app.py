"""The shard process: server, session with the coordinator, the way in and the way out."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import shard_pb2
from protos.ps.v1.common_pb2 import Member
from ps import failpoints
from ps.config import RunConfig, from_json
from ps.errors import NotServing, PsError, StaleFence
from ps.kernels.compile import check_denormals, warm_up
from ps.kernels.update import Update
from ps.machine import machine_name
from ps.shard.engine import Outbox
from ps.shard.seat import Seat
from ps.shard.service import SERVICE, ShardHost, ShardServicer
from ps.shard.snapshot import SnapshotTarget
from ps.storage.shard_file import ShardFile
from ps.telemetry.courier import Courier
from ps.telemetry.exporter import identify, serve_metrics
from ps.types import Applied, Decision, Fence, Prepared, Role
from ps.wire.connection import FrameStream, OnClose, OnFrame
from ps.wire.health import Health, enable_reflection
from ps.wire.messages import Mirror
from ps.wire.options import bind, make_server, reachable
from ps.wire.proto import from_proto, to_proto
from ps.wire.security import PLAIN, Security
from ps.wire.session import Session

log = logging.getLogger(__name__)

#: Two threads for each waiting stream, for this many workers, and some for control.
MAX_STREAMS = 256
#: How long a shard that was asked to go waits for the coordinator to have its state saved.
LEAVE_S = 60.0
#: Prepared and applied are told again after so long without an answer.
RESEND_S = 1.0
#: What a shard opens to its standby.
METHOD = f"/{SERVICE}/Replicate"
NO_PLAN = "waiting for the plan"


class ShardApp:
    """One shard process."""

    def __init__(
        self,
        coordinator: str,
        index: int,
        listen: str,
        metrics_listen: str | None,
        security: Security = PLAIN,
        advertise: str | None = None,
    ) -> None:
        self._ended = threading.Event()
        self._leaving = threading.Event()
        self._registered = False
        self._exit_code = 0
        self._reason = ""
        self._run_name = ""
        #: Once there is something to be traced.
        self._courier: Courier | None = None
        incarnation = random.SystemRandom().getrandbits(62) + 1
        self._security = security
        self._host = ShardHost(index, incarnation, self._on_seat)
        self._server = make_server(MAX_STREAMS)
        self._health = Health(self._server, SERVICE)
        enable_reflection(self._server, [shard_pb2.DESCRIPTOR.services_by_name["Shard"].full_name])
        self._server.add_generic_rpc_handlers((ShardServicer(self._host).handler(),))
        port = bind(self._server, listen, security)
        member = Member(
            role="shard",
            rank=index,
            incarnation=incarnation,
            pid=os.getpid(),
            host=socket.gethostname(),
            machine=machine_name(),
            address=f"{reachable(listen, advertise)}:{port}",
            metrics_address=(
                f"{reachable(metrics_listen, advertise)}:{serve_metrics(metrics_listen)}" if metrics_listen else ""
            ),
        )
        self._session = Session(coordinator, member, self._on_message, self._on_connect, security)

    def run(self, start_timeout_s: float) -> int:
        """Serve until the coordinator ends the run, or somebody asks the process to go."""
        check_denormals()
        self._server.start()
        try:
            response = self._session.register(start_timeout_s)
            self._registered = True
            config = from_json(RunConfig, response.job)
            self._run_name = config.run_name
            identify(self._run_name, Role.SHARD, self._host.index)
            # A minute without a cache: it is there meanwhile, and says why it does not serve.
            self._session.doing("compiling kernels")
            self._session.start(starting=True)
            warm_up(Update(config.optimizer, config.precision.wire), config.precision.wire)
            self._session.doing(NO_PLAN)
            self._session.started()
            self._wait()
        finally:
            self._health.not_serving()
            if self._courier is not None:
                self._courier.close()
            self._session.close()
            self._server.stop(grace=0.5).wait(5.0)
            if self._host.engine is not None:
                self._host.engine.close()
        if self._exit_code:
            raise PsError(self._reason)
        log.info("shard %d ends: %s", self._host.index, self._reason)
        return 0

    def _wait(self) -> None:
        while not self._ended.wait(RESEND_S):
            seat = self._host.seat
            if seat is None:
                self._session.doing(NO_PLAN)
                continue
            self._session.doing(seat.doing)
            identify(self._run_name, seat.role, self._host.index)
            engine = seat.engine
            engine.resend()
            engine.journal.trim(engine.config.checkpoint_dir, engine.run)
            if seat.is_ready:
                self._health.serving()
            else:
                self._health.not_serving()

    def leave(self) -> None:
        """Ask the coordinator to save the state, then go."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        if not self._registered:
            self._session.abandon()
            return
        threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        self._session.send(leave=pb.Leave(reason="asked to stop"))
        if not self._ended.wait(LEAVE_S):
            self._end(True, f"no answer from the coordinator within {LEAVE_S:.0f} s")

    def _end(self, ok: bool, reason: str) -> None:
        self._exit_code, self._reason = int(not ok), reason
        self._ended.set()
        self._host.ending.set()

    # -- From the coordinator -------------------------------------------------------------------

    def _on_connect(self) -> None:
        if self._host.engine is not None:
            self._host.engine.resend_all()

    def _on_message(self, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("event")
        if kind == "end":
            self._end(message.end.ok, message.end.reason)
            return
        seat = self._host.seat
        if seat is None:
            return
        try:
            if kind == "decision":
                failpoints.hit("decision.before")
                seat.decide(from_proto(Decision, message.decision))
                failpoints.hit("decision.after")
            elif kind == "replicate":
                self._replicate(seat, message.replicate)
            elif kind == "foregone":
                seat.engine.foresee(from_proto(Decision, message.foregone))
            elif kind == "write_snapshot":
                seat.engine.snapshot(message.write_snapshot.version, from_proto(Fence, message.write_snapshot.fence))
        except (StaleFence, NotServing) as error:
            log.warning("ignored a %s: %s", kind, error.message)
        except PsError as error:
            self._end(False, error.message)

    def _replicate(self, seat: Seat, wanted: pb.Replicate) -> None:
        engine, fence = seat.engine, from_proto(Fence, wanted.fence)
        life, standby = self._host.incarnation, int(wanted.incarnation)
        greeting = Mirror(engine.run, engine.plan.digest, fence.term, fence.epoch, engine.shard, life, standby)
        seat.replicate(greeting, wanted.address, self._open_replica)

    def _open_replica(self, address: str, on_frame: OnFrame, on_close: OnClose) -> FrameStream:
        return FrameStream(address, METHOD, on_frame, on_close, self._security)

    # -- To the coordinator ---------------------------------------------------------------------

    def _on_seat(self, seat: Seat) -> None:
        engine, send = seat.engine, self._session.send

        def prepared(report: Prepared) -> None:
            send(prepared=to_proto(report))

        def applied(report: Applied) -> None:
            send(applied=to_proto(report))

        def initialized(fence: Fence, shard: int) -> None:
            send(initialized=pb.Initialized(fence=to_proto(fence), shard=shard))

        def snapshot(target: SnapshotTarget, result: ShardFile | PsError) -> None:
            written = pb.SnapshotWritten(fence=to_proto(target.fence), version=target.version, shard=target.shard)
            if isinstance(result, ShardFile):
                written.file, written.sha256, written.size = result.name, result.sha256, result.size
            else:
                written.error = result.message
            send(snapshot_written=written)

        def failed(error: BaseException) -> None:
            self._end(False, f"a kernel thread failed: {error}")

        engine.outbox = Outbox(prepared, applied, initialized, snapshot, failed)
        self._courier = Courier(self._session, engine.trace)
        self._courier.start()


def run(
    coordinator: str,
    index: int,
    listen: str,
    metrics_listen: str | None,
    security: Security = PLAIN,
    advertise: str | None = None,
    start_timeout_s: float = 120.0,
) -> int:
    """Run one shard until its end; returns the exit code.

    Raises:
        PsError: why it could not start, or ended; one line.
    """
    app = ShardApp(coordinator, index, listen, metrics_listen, security, advertise)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: app.leave())
    return app.run(start_timeout_s)
