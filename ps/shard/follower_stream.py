"""The standby's side of the stream from its shard: records and state in, and what is held out."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator

from ps import failpoints
from ps.errors import JournalDamaged, MalformedFrame, Refusal, StaleFence
from ps.shard.records import Decided, Record, Reduced, unpack
from ps.shard.seat import Seat
from ps.wire import frame
from ps.wire.messages import Covered, Header, Mirror, Mirrored, Noted, Refused, State, parse_to_standby

log = logging.getLogger(__name__)

#: The next record waits so long until a decision is carried out.
APPLY_S = 60.0


class FollowerStream:
    """One stream; what comes over the last one that was opened counts."""

    def __init__(self, seat: Seat, incarnation: int) -> None:
        self._seat = seat
        self._engine = seat.engine
        self._incarnation = incarnation
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False

    def close(self) -> None:
        """Take nothing more, and end `replies` with what is answered already."""
        with self._engine.lock:
            if not self._closed:
                self._closed = True
                self._answers.put(None)
            self._engine.opened.notify_all()

    def replies(self) -> Iterator[bytes]:
        while (answer := self._answers.get()) is not None:
            yield answer

    def receive(self, data: bytes) -> None:
        """Take one frame. A refusal is answered, and ends the stream."""
        try:
            with self._engine.lock:
                if self._closed:
                    return
                fields, payload = frame.decode(data)
                answer = self._handle(parse_to_standby(fields), payload)
        except Refusal as refusal:
            log.warning("refused what the shard sent: %s", refusal.message)
            refused = Refused(refusal.code, refusal.message, -1, -1, -1)
            self._answers.put(frame.encode(refused.pack()))
            self.close()
            return
        if isinstance(answer, Covered):
            failpoints.hit("cover.before")
            self._answers.put(frame.encode(answer.pack()))
            failpoints.hit("cover.after")
        elif answer is not None:
            self._answers.put(frame.encode(answer.pack()))

    def _handle(self, header: Header, payload: memoryview) -> Header | None:
        if isinstance(header, Mirror):
            return self._begin(header)
        follower = self._seat.follower
        if follower is None or self._seat.stream is not self:
            raise StaleFence("this stream is not that of the present shard")
        if isinstance(header, State):
            follower.take_state(header, payload)
            return None
        assert isinstance(header, Noted), "there are no other kinds"
        record = _unpacked(header)
        protocol = self._engine.protocol
        self._engine.opened.wait_for(lambda: self._closed or protocol.deciding is None, APPLY_S)
        if self._closed:
            return None
        if isinstance(record, Decided):
            follower.take_decided(record)
        elif isinstance(record, Reduced):
            return Covered(record.step) if follower.take_reduced(record, payload) else None
        return None

    def _begin(self, header: Mirror) -> Mirrored:
        engine, follower = self._engine, self._seat.follower
        if follower is None or header.fence != engine.protocol.fence or header.run != engine.run:
            raise StaleFence(f"shard {header.shard} under {header.fence}: this process does not follow it")
        if (header.shard, header.plan, header.standby) != (engine.shard, engine.plan.digest, self._incarnation):
            raise StaleFence(f"this process is not the standby that shard {header.shard} means")
        self._seat.end_stream()
        self._seat.stream = self
        return follower.held()


def _unpacked(header: Noted) -> Record:
    try:
        return unpack(header.record)
    except JournalDamaged as error:
        raise MalformedFrame(f"noted: {error.message}") from None
