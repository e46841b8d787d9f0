"""A member's session with the coordinator: register, stay connected, send heartbeats, come back.

Messages are facts and may be sent again: whatever is lost with a broken stream is told anew by
`on_connect`, so that nothing has to be queued across connections.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import coordinator_pb2_grpc as pb_grpc
from protos.ps.v1.common_pb2 import Member
from ps.errors import AccessDenied, HandshakeFailed, MismatchError, PeerUnavailable, PsError, WaitTimeout
from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import PLAIN, Security
from ps.wire.status import error_of

log = logging.getLogger(__name__)

#: Waiting times between two attempts to connect, in seconds.
BACKOFF_S = (0.05, 0.1, 0.2)
#: A coordinator that has been away for so long is not coming back.
GONE_S = 600.0
CALL_TIMEOUT_S = 10.0
#: What a member says last may take so long to be read.
LAST_WORDS_S = 1.0
#: A wait for the coordinator is worth a line in the log after this.
SAY_AFTER_S = 3.0


class Session:
    """One member's connection to the coordinator. Thread-safe."""

    def __init__(
        self,
        address: str,
        member: Member,
        on_message: Callable[[pb.SessionResponse], None],
        on_connect: Callable[[], None],
        security: Security = PLAIN,
    ) -> None:
        self.address = address
        self.member = member
        self.run = ""
        self.failure: PsError | None = None
        #: The coordinator has answered on a stream that has not broken since.
        self.connected = False
        self._on_message = on_message
        self._on_connect = on_connect
        self._doing = ""
        self._transport = ""
        self._starting = False
        self._lease_s = 10.0
        self._outbox: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._call: grpc.Call | None = None
        self._closing = threading.Event()
        self._channel = open_channel(address, security, Role.COORDINATOR)
        self._stub = pb_grpc.CoordinatorStub(self._channel)
        self._thread = threading.Thread(target=self._keep, name="session", daemon=True)

    def register(self, timeout_s: float) -> pb.RegisterResponse:
        """Announce the member, waiting for a coordinator to be there.

        Raises:
            WaitTimeout: there was none in time.
            MismatchError: the coordinator runs something else, or does not take this member.
            HandshakeFailed, AccessDenied: the certificates are not those of this cluster, or of this role.
        """
        since = time.monotonic()
        attempt, say_after = 0, SAY_AFTER_S
        while True:
            try:
                response: pb.RegisterResponse = self._stub.Register(
                    pb.RegisterRequest(member=self.member, run=self.run), timeout=CALL_TIMEOUT_S
                )
                break
            except grpc.RpcError as failure:
                error = error_of(failure, f"registering at {self.address}")
                if not isinstance(error, PeerUnavailable) or isinstance(error, HandshakeFailed):
                    raise error from None
            waited = time.monotonic() - since
            if self._closing.is_set():
                raise WaitTimeout(f"stopped while waiting for the coordinator at {self.address}")
            if waited > timeout_s:
                raise WaitTimeout(
                    f"waited {waited:.1f} s for the coordinator at {self.address}; is it running? ({error.message})"
                )
            if waited > say_after:
                log.info("waiting for the coordinator at %s for %.0f s: %s", self.address, waited, error.message)
                say_after = 2 * waited
            self._closing.wait(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1
        self.run = response.run
        self.member.rank = response.rank
        self._lease_s = response.lease_s
        return response

    def start(self, starting: bool = False) -> None:
        """Connect in the background and stay connected; `register` comes first.

        Args:
            starting: nothing can be asked of the member before `started`.
        """
        self._starting = starting
        self._thread.start()

    def started(self) -> None:
        """The member can take part from now on."""
        self._starting = False
        # On a stream that is down it is lost, and the next Hello says it.
        self.send(heartbeat=self._heartbeat())

    def send(self, **event: Any) -> None:
        """Send one event, by its field name in SessionRequest. Lost when the stream is down."""
        self._outbox.put(pb.SessionRequest(**event))

    def doing(self, text: str, transport: str = "") -> None:
        """Say what the member is doing, with the next heartbeat, and how payloads travel, at once if that is new."""
        is_new = transport != self._transport
        self._doing, self._transport = text, transport
        if is_new:
            self.send(heartbeat=self._heartbeat())

    def _heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(doing=self._doing, starting=self._starting, transport=self._transport)

    def clock(self) -> pb.ClockResponse:
        """Read the coordinator's clock.

        Raises:
            PsError: it did not answer.
        """
        try:
            answer: pb.ClockResponse = self._stub.Clock(pb.ClockRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise error_of(failure, f"asking {self.address} for its clock") from None
        return answer

    def trace(self, part: pb.TraceRequest) -> None:
        """Hand over this member's part of a timeline; all but the member and the run is filled in.

        Raises:
            PsError: the coordinator did not take it.
        """
        part.member.CopyFrom(self.member)
        part.run = self.run
        try:
            self._stub.Trace(part, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise error_of(failure, f"handing {self.address} a part of the trace") from None

    def abandon(self) -> None:
        """Have `register` give up; safe in a signal handler."""
        self._closing.set()

    def close(self) -> None:
        """End the session, once what was sent before has gone out."""
        self._closing.set()
        self._outbox.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            # The coordinator ends the stream when it has read this side's end.
            self._thread.join(LAST_WORDS_S)
        if self._call is not None:
            self._call.cancel()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CALL_TIMEOUT_S)
        self._channel.close()

    def _keep(self) -> None:
        attempt, lost_at, say_after = 0, time.monotonic(), SAY_AFTER_S
        while not self._closing.is_set():
            connected = False
            try:
                connected = self._connect()
            except PsError as error:
                away = time.monotonic() - lost_at
                if isinstance(error, MismatchError | AccessDenied) or away > GONE_S:
                    self._fail(error)
                    return
                if away > say_after:
                    log.info("the coordinator has been away for %.0f s: %s", away, error.message)
                    say_after = 2 * away
            except Exception as error:
                log.exception("the session's thread failed")
                self._fail(PsError(f"the session failed: {error}"))
                return
            if connected and not self._closing.is_set():
                attempt, lost_at, say_after = 0, time.monotonic(), SAY_AFTER_S
                log.info("the session with the coordinator at %s broke; connecting again", self.address)
            self._closing.wait(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1

    def _fail(self, error: PsError) -> None:
        self.failure = error
        self._on_message(pb.SessionResponse(end=pb.End(ok=False, reason=error.message)))

    def _connect(self) -> bool:
        """One connection, until it breaks; True when the coordinator answered at all."""
        self.register(timeout_s=0.0)
        outbox: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._outbox = outbox
        outbox.put(pb.SessionRequest(hello=pb.Hello(member=self.member, run=self.run, starting=self._starting)))
        answered = False
        self._call = call = self._stub.Session(self._requests(outbox))
        try:
            for response in call:
                if not answered:
                    answered = self.connected = True
                    self._on_connect()
                if response.WhichOneof("event") == "end":
                    # The stream's end that follows is no loss.
                    self._closing.set()
                self._on_message(response)
        except grpc.RpcError as failure:
            error = error_of(failure, f"the session with {self.address}")
            if not answered or not isinstance(error, PeerUnavailable):
                raise error from None
        finally:
            self.connected = False
            outbox.put(None)
            call.cancel()
        return answered

    def _requests(self, outbox: queue.SimpleQueue[pb.SessionRequest | None]) -> Iterator[pb.SessionRequest]:
        # Due whatever else is sent, and after Hello at once: it alone says what the member is doing.
        heartbeat_at = time.monotonic()
        while True:
            try:
                request = outbox.get(timeout=max(0.0, heartbeat_at - time.monotonic()))
            except queue.Empty:
                heartbeat_at = time.monotonic() + self._lease_s / 4
                request = pb.SessionRequest(heartbeat=self._heartbeat())
            if request is None:
                return
            yield request
