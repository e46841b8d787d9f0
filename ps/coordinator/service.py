"""The Coordinator service over gRPC: between protobuf messages and the state machine's events."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Iterator, Set
from functools import partial
from typing import Any

import grpc

from protos.ps.v1 import common_pb2
from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import coordinator_pb2_grpc as pb_grpc
from ps.coordinator.loop import Loop
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.monitoring import count_contribution
from ps.coordinator.status import status
from ps.coordinator.timeline import Timeline, part_of
from ps.coordinator.timings import Spent
from ps.errors import MismatchError, PeerUnavailable, PsError
from ps.telemetry.chrome_trace import Part
from ps.telemetry.trace import clock_name
from ps.types import Applied, Fence, ParameterTable, Prepared, Role
from ps.wire.access import check_claim
from ps.wire.proto import from_proto
from ps.wire.status import abort

log = logging.getLogger(__name__)

SERVICE = "windlass.ps.v1.Coordinator"

_Queue = queue.SimpleQueue[pb.SessionResponse | None]


class Sessions:
    """The open sessions: one queue of messages for each life, whatever seat it has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[int, _Queue] = {}
        #: The lives that have opened one.
        self._met: set[int] = set()
        self._goodbye: pb.End | None = None

    def open(self, life: int) -> _Queue:
        """Open a queue; an earlier session of the same life ends."""
        mine: _Queue = queue.SimpleQueue()
        with self._lock:
            self._met.add(life)
            before = self._queues.get(life)
            self._queues[life] = mine
            if self._goodbye is not None:
                mine.put(pb.SessionResponse(end=self._goodbye))
        if before is not None:
            before.put(None)
        return mine

    def close(self, life: int, mine: _Queue) -> bool:
        """Forget a queue; False when another session has taken its place."""
        with self._lock:
            if self._queues.get(life) is not mine:
                return False
            del self._queues[life]
        return True

    def tell(self, life: int, **event: Any) -> None:
        """Send a message to a member; without a session it is lost, and told again at the next one."""
        with self._lock:
            found = self._queues.get(life)
        if found is not None:
            found.put(pb.SessionResponse(**event))

    def end_all(self, ok: bool, reason: str) -> None:
        """Tell every member that the run is over, and from now on whoever opens a session."""
        with self._lock:
            self._goodbye = pb.End(ok=ok, reason=reason)
            queues = list(self._queues.values())
        for found in queues:
            found.put(pb.SessionResponse(end=self._goodbye))

    def have_met(self, lives: Set[int]) -> bool:
        """Whether each of these has opened a queue."""
        with self._lock:
            return lives <= self._met

    def __len__(self) -> int:
        with self._lock:
            return len(self._queues)


class CoordinatorServicer(pb_grpc.CoordinatorServicer):
    """Thin handlers: every fact goes to the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        machine: Machine,
        sessions: Sessions,
        run: str,
        job_json: str,
        myself: common_pb2.Member,
        timeline: Timeline,
    ) -> None:
        self._loop = loop
        self._machine = machine
        self._sessions = sessions
        self._run = run
        self._job_json = job_json
        self._myself = myself
        self._timeline = timeline

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.RegisterResponse:
        try:
            if request.run not in ("", self._run):
                raise MismatchError(f"this coordinator runs {self._run}, not {request.run}")
            check_claim(context, request.member.role)
            member = _member(request.member)
            rank = self._loop.call(lambda now: self._machine.register(member, now))
        except PsError as error:
            abort(context, error)
            raise
        return pb.RegisterResponse(
            run=self._run, job=self._job_json, rank=rank, lease_s=self._machine.config.membership.lease_s
        )

    def Status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.StatusResponse:
        return self._loop.call(lambda now: status(self._machine, self._myself, now, time.time()))

    def Clock(self, _request: pb.ClockRequest, _context: grpc.ServicerContext) -> pb.ClockResponse:
        return pb.ClockResponse(name=clock_name(), now_ns=time.monotonic_ns())

    def Trace(self, request: pb.TraceRequest, context: grpc.ServicerContext) -> pb.TraceResponse:
        try:
            if request.run != self._run:
                raise MismatchError(f"this coordinator runs {self._run}, not {request.run}")
            check_claim(context, request.member.role)
            who, part = _member(request.member), part_of(request)
            if self._loop.call(lambda _: self._take_part(who, part)):
                self._timeline.write()
        except PsError as error:
            abort(context, error)
            raise
        return pb.TraceResponse()

    def _take_part(self, who: MemberState, part: Part) -> bool:
        if self._machine.members.find(who.role, who.rank, who.incarnation) is None:
            raise PeerUnavailable(f"{who.name} is not registered in this life")
        return self._timeline.take(who, part, self._machine.members)

    def Session(
        self, requests: Iterator[pb.SessionRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SessionResponse]:
        first = next(requests, None)
        if first is None or first.WhichOneof("event") != "hello":
            abort(context, MismatchError("the first message of a session is hello"))
            return
        try:
            check_claim(context, first.hello.member.role)
            who = _member(first.hello.member)
        except PsError as error:
            abort(context, error)
            return
        found = self._loop.call(lambda _: self._open(who))
        if found is None:
            # Registered with an earlier coordinator, or replaced: registering again sorts it out.
            abort(context, PeerUnavailable(f"{who.name} is not registered in this life"))
            return
        member, mine = found
        context.add_callback(lambda: mine.put(None))
        try:
            # The first answer says that the session stands; the member then tells what it knows.
            yield pb.SessionResponse()
            self._loop.post(lambda now: self._connect(member, first.hello.starting, now))
            reader = threading.Thread(
                target=self._read, args=(requests, member, mine), name=f"session {member.name}", daemon=True
            )
            reader.start()
            while (response := mine.get()) is not None:
                yield response
        finally:
            if self._sessions.close(member.incarnation, mine):
                self._loop.post(lambda now: self._machine.disconnect(member, now))

    def _open(self, who: MemberState) -> tuple[MemberState, _Queue] | None:
        """Open a session; on the loop's thread, so that whoever replaces the member ends it."""
        member = self._machine.members.find(who.role, who.rank, who.incarnation)
        return (member, self._sessions.open(member.incarnation)) if member is not None else None

    def _connect(self, member: MemberState, starting: bool, now: float) -> None:
        if self._machine.members.find(member.role, member.rank, member.incarnation) is member:
            self._machine.connect(member, now, starting)

    def _read(self, requests: Iterator[pb.SessionRequest], member: MemberState, mine: _Queue) -> None:
        try:
            for request in requests:
                self._loop.post(partial(self._event, member, request, mine))
        except grpc.RpcError:
            pass
        finally:
            mine.put(None)

    def _event(self, member: MemberState, request: pb.SessionRequest, mine: _Queue, now: float) -> None:
        """Hand one fact to the state machine, unless the member has been replaced meanwhile."""
        machine = self._machine
        if not machine.is_seated(member):
            mine.put(pb.SessionResponse(end=pb.End(ok=False, reason=f"{member.name} was replaced by a newer life")))
            return
        kind = request.WhichOneof("event")
        machine.seen(member, now, _printable(request.heartbeat.doing) if kind == "heartbeat" else None)
        try:
            if kind is not None and kind in _HANDLERS:
                _HANDLERS[kind](machine, member, getattr(request, kind), now)
        except PsError as error:
            log.error("%s: %s", member.name, error.message)
            mine.put(pb.SessionResponse(end=pb.End(ok=False, reason=error.message)))


def _member(message: common_pb2.Member) -> MemberState:
    try:
        role = Role(message.role)
    except ValueError:
        raise MismatchError(f"role {message.role!r} is not shard or worker") from None
    return MemberState(
        role,
        message.rank,
        message.incarnation,
        message.pid,
        _printable(message.host),
        _printable(message.address),
        _printable(message.metrics_address),
        _printable(message.machine),
        ready=role is Role.SHARD,
    )


def _model(machine: Machine, member: MemberState, event: pb.Model, now: float) -> None:
    machine.model(member, now, ParameterTable.unpack(event.table), event.data_digest, event.evaluation_parts)


def _prepared(machine: Machine, _member: MemberState, event: common_pb2.Prepared, _now: float) -> None:
    machine.steps.prepared(from_proto(Prepared, event))


def _applied(machine: Machine, member: MemberState, event: common_pb2.Applied, _now: float) -> None:
    takes = machine.standbys.applied if member.role is Role.STANDBY else machine.steps.applied
    takes(from_proto(Applied, event))


def _initialized(machine: Machine, _member: MemberState, event: pb.Initialized, _now: float) -> None:
    machine.serving.initialized(event.shard, from_proto(Fence, event.fence))


def _snapshot_written(machine: Machine, _member: MemberState, event: pb.SnapshotWritten, _now: float) -> None:
    fence = from_proto(Fence, event.fence)
    machine.snapshot_written(fence, event.shard, event.version, (event.file, event.sha256, event.size), event.error)


def _evaluated(machine: Machine, _member: MemberState, event: pb.Evaluated, _now: float) -> None:
    machine.steps.evaluated(event.version, event.part, event.loss_sum, event.tokens, event.bytes)


def _contributed(machine: Machine, member: MemberState, event: pb.Contributed, now: float) -> None:
    seconds = [_seconds(value) for value in (event.compute_s, event.push_s, event.pull_s, event.wait_s)]
    spent = Spent(event.step, event.contribution, *seconds)
    if machine.steps.contributed(member.rank, from_proto(Fence, event.fence), spent, now):
        count_contribution(member.rank, spent)


def _printable(text: str) -> str:
    """What a member says ends up on people's terminals: no control characters, and not without end."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:500])


def _seconds(value: float) -> float:
    """What a message says that something took; nonsense in it must not reach sums and files."""
    return value if 0 <= value < math.inf else 0.0


def _leave(machine: Machine, member: MemberState, _event: pb.Leave, now: float) -> None:
    machine.leave(member, now)


def _heartbeat(machine: Machine, member: MemberState, event: pb.Heartbeat, now: float) -> None:
    member.transport = _printable(event.transport)
    if member.role is not Role.WORKER and not member.ready and not event.starting:
        machine.started(member, now)


_HANDLERS: dict[str, Any] = {
    "heartbeat": _heartbeat,
    "model": _model,
    "prepared": _prepared,
    "applied": _applied,
    "initialized": _initialized,
    "snapshot_written": _snapshot_written,
    "evaluated": _evaluated,
    "contributed": _contributed,
    "leave": _leave,
}
