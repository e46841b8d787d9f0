"""The Shard service over gRPC: thin; what it does is in the engine and the exchange."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from protos.ps.v1 import shard_pb2
from ps import failpoints
from ps.config import RunConfig, from_json
from ps.errors import MismatchError, NotServing, PsError, StorageError
from ps.shard import metrics, stream
from ps.shard.engine import ShardEngine
from ps.shard.exchange import Exchange
from ps.shard.follower_stream import FollowerStream
from ps.shard.seat import Seat
from ps.storage.storage_proof import check_nonce
from ps.types import Fence, ParameterTable, Role
from ps.wire import frame
from ps.wire.messages import State
from ps.wire.proto import from_proto, to_proto
from ps.wire.status import abort

log = logging.getLogger(__name__)

SERVICE = "windlass.ps.v1.Shard"


class ShardHost:
    """What outlives an engine: the process's identity, and the seat once there is a run to serve."""

    def __init__(self, index: int, incarnation: int, on_seat: Callable[[Seat], None]) -> None:
        self.index = index
        self.incarnation = incarnation
        self.seat: Seat | None = None
        self._on_seat = on_seat
        #: Held while the coordinator configures, which may take as long as loading does.
        self._lock = threading.Lock()
        #: The run ends, or this process: streams end too.
        self.ending = threading.Event()
        self._streams = 0
        self._streams_lock = threading.Lock()

    def count_stream(self, change: int) -> None:
        """A tensor stream was opened (1) or has ended (-1)."""
        with self._streams_lock:
            self._streams += change
            metrics.STREAMS.set(self._streams)

    @property
    def engine(self) -> ShardEngine | None:
        return self.seat.engine if self.seat is not None else None

    def configure(self, request: shard_pb2.ConfigureRequest) -> shard_pb2.ConfigureResponse:
        """Carry out the coordinator's control, one call at a time."""
        with self._lock:
            fence = from_proto(Fence, request.fence)
            seat = self._seat_for(request, fence)
            seat.engine.lineage = request.lineage
            if request.action == shard_pb2.ConfigureRequest.LOAD:
                self._load(seat, request, fence)
            elif request.action == shard_pb2.ConfigureRequest.SERVE:
                seat.serve(fence, request.step, request.applied, request.loss_scale)
                failpoints.enter(f"{Role.SHARD.value}-{self.index}")
            elif request.action == shard_pb2.ConfigureRequest.FOLLOW:
                failpoints.enter(f"{Role.STANDBY.value}-{self.index}")
                failpoints.hit("follow.before")
                seat.follow(fence, request.step, request.applied, request.loss_scale, request.keep)
                failpoints.hit("follow.after")
            else:
                seat.adopt(fence)
            return self._report(seat.engine)

    def _seat_for(self, request: shard_pb2.ConfigureRequest, fence: Fence) -> Seat:
        if request.shard != self.index:
            raise MismatchError(f"this process is shard {self.index}, not shard {request.shard}")
        table = ParameterTable.unpack(request.table)
        if self.seat is not None:
            engine = self.seat.engine
            if fence < engine.protocol.fence:
                self.seat.adopt(fence)
            asked = (request.run, table.digest, request.num_shards)
            if asked != (engine.run, engine.plan.table.digest, engine.plan.num_shards):
                raise MismatchError(
                    f"this process serves run {engine.run} as one of {engine.plan.num_shards} shards; for "
                    f"run {request.run} with {request.num_shards} shards start a new one"
                )
            return self.seat
        config = from_json(RunConfig, request.job)
        if config.cluster.shards != request.num_shards:
            raise MismatchError(f"the job has {config.cluster.shards} shards, the coordinator {request.num_shards}")
        engine = ShardEngine(
            config, request.run, table, self.index, request.contributions, max(1, request.shards_on_machine)
        )
        engine.lineage = request.lineage
        self.seat = Seat(engine)
        self._on_seat(self.seat)
        if request.action != shard_pb2.ConfigureRequest.FOLLOW:
            self.seat.restore(fence)
        return self.seat

    def _load(self, seat: Seat, request: shard_pb2.ConfigureRequest, fence: Fence) -> None:
        folder = seat.engine.config.checkpoint_dir
        if request.nonce_file:
            try:
                check_nonce(folder, request.nonce_file, request.nonce)
            except StorageError as error:
                raise MismatchError(error.message) from None
        checkpoint = folder / Path(request.checkpoint).name if request.checkpoint else None
        failpoints.hit("load.before", request.checkpoint)
        seat.load(fence, checkpoint, request.manifest_sha256)
        failpoints.hit("load.after", request.checkpoint)

    def _report(self, engine: ShardEngine) -> shard_pb2.ConfigureResponse:
        with engine.lock:
            protocol = engine.protocol
            response = shard_pb2.ConfigureResponse(
                plan_digest=engine.plan.digest,
                incarnation=self.incarnation,
                has_state=engine.has_state,
                version=protocol.step,
                applied=protocol.applied,
                reduced=protocol.all_reduced,
                state_hash=engine.store.version_hash if engine.has_state else 0,
            )
            if protocol.is_ahead and protocol.updated_by is not None:
                response.updated_by.CopyFrom(to_proto(protocol.updated_by))
            last = protocol.deciding or protocol.last_decision
            if last is not None:
                response.last_decision.CopyFrom(to_proto(last))
        return response

    def status(self) -> shard_pb2.ShardStatusResponse:
        engine = self.engine
        if engine is None:
            return shard_pb2.ShardStatusResponse(shard=self.index, phase="empty")
        with engine.lock:
            protocol = engine.protocol
            serving = "initializing" if protocol.awaiting_initial_values else "serving"
            return shard_pb2.ShardStatusResponse(
                run=engine.run,
                fence=to_proto(protocol.fence),
                shard=self.index,
                phase=serving if protocol.serving else "loading",
                version=protocol.step,
                applied=protocol.applied,
                state_hash=engine.store.state_hash if engine.has_state else 0,
                chunks=len(engine.chunks),
                chunks_reduced=protocol.chunks_reduced,
                missing=protocol.missing(),
                streams=self._streams,
            )

    def snapshot(self, chunks: list[int]) -> Iterator[bytes]:
        """Encode the state of chunks; fails when a step is applied meanwhile."""
        engine = self.engine
        if engine is None or not engine.has_state:
            raise NotServing(f"shard {self.index} holds no state")
        version = engine.protocol.step
        for chunk in engine.chunks:
            if chunks and chunk.index not in chunks:
                continue
            for name, array in engine.store.arrays(chunk).items():
                with engine.lock:
                    if engine.protocol.step != version or engine.protocol.is_between:
                        raise NotServing(f"version {version} was left while it was read; try again")
                    encoded = frame.encode(State(version, chunk.index, name, engine.protocol.applied).pack(), array)
                yield encoded


class ShardServicer:
    """Generic handlers: tensor frames stay raw bytes, control messages are protobuf."""

    def __init__(self, host: ShardHost) -> None:
        self._host = host

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given; no serializer touches a frame."""
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Configure": unary(
                    self._configure,
                    shard_pb2.ConfigureRequest.FromString,
                    shard_pb2.ConfigureResponse.SerializeToString,
                ),
                "Status": unary(
                    self._status,
                    shard_pb2.ShardStatusRequest.FromString,
                    shard_pb2.ShardStatusResponse.SerializeToString,
                ),
                "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
                "Replicate": grpc.stream_stream_rpc_method_handler(self._replicate),
                "Snapshot": grpc.unary_stream_rpc_method_handler(self._snapshot, shard_pb2.SnapshotRequest.FromString),
            },
        )

    def _configure(
        self, request: shard_pb2.ConfigureRequest, context: grpc.ServicerContext
    ) -> shard_pb2.ConfigureResponse:
        try:
            return self._host.configure(request)
        except PsError as error:
            log.error("%s", error.message)
            abort(context, error)
            raise

    def _status(self, _request: shard_pb2.ShardStatusRequest, _context: object) -> shard_pb2.ShardStatusResponse:
        return self._host.status()

    def _snapshot(self, request: shard_pb2.SnapshotRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from self._host.snapshot(list(request.chunks))
        except PsError as error:
            abort(context, error)

    def _exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        engine = self._host.engine
        if engine is None:
            abort(context, NotServing(f"shard {self._host.index} serves no run yet: try again"))
            return
        exchange = Exchange(engine, self._host.incarnation)
        self._host.count_stream(1)
        try:
            yield from stream.serve(frames, context, exchange, self._host.ending)
        finally:
            self._host.count_stream(-1)

    def _replicate(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        seat = self._host.seat
        if seat is None:
            abort(context, NotServing(f"the standby of shard {self._host.index} does not follow yet: try again"))
            return
        yield from stream.serve(frames, context, FollowerStream(seat, self._host.incarnation), self._host.ending)
