"""What a shard does for its standby: it sends what it would write down, at first the state, and reports what both hold.

The stream is the replicator's; what it may carry, and what follows from its answers, is decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from ps import failpoints
from ps.shard.protocol import StepProtocol
from ps.shard.records import Decided
from ps.shard.replicator import Link, Opener, Replicator, draft_state
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.types import Decision, Prepared
from ps.wire.messages import Mirror, Mirrored

#: Frames with a chunk's state, and the link that they are for.
Copy = tuple[Link, list[bytes]]


class Mirroring:
    """One shard's side of its standby, or of none.

    Args:
        lock: the shard's; held by whoever calls, but for `copy` and what the replicator calls.
        tell: tells the coordinator a report.
    """

    def __init__(
        self, protocol: StepProtocol, store: Store, lock: threading.RLock, tell: Callable[[Prepared], None]
    ) -> None:
        self._protocol = protocol
        self._chunks = protocol.plan.chunks_of(protocol.shard)
        self._store = store
        self._lock = lock
        self._tell = tell
        self._replicator: Replicator | None = None
        #: The report of the open step, while it waits for the standby to hold the step too; and as it was told last.
        self._waiting: Prepared | None = None
        self.told: Prepared | None = None

    @property
    def link(self) -> Link | None:
        """The present stream to the standby."""
        return self._replicator.link if self._replicator is not None else None

    def begin(self, greeting: Mirror, address: str, opener: Opener) -> None:
        """Send to this standby; an empty address: to none any more."""
        now = self._replicator
        if now is not None and (now.greeting, now.address) == (greeting, address):
            return
        self.stop()
        if address:
            self._replicator = Replicator(self, address, greeting, opener)
            self._replicator.start()

    def stop(self) -> None:
        """Nothing is sent to a standby any more."""
        if self._replicator is not None:
            self._replicator.close()
            self._replicator = None
        self._tell_waiting()

    # -- The report of the open step ------------------------------------------------------------

    @property
    def has_report(self) -> bool:
        """Whether the open step is reported, or waits for the standby to be."""
        return self._waiting is not None or self.told is not None

    def report(self, report: Prepared) -> None:
        """Tell the coordinator that everything is reduced; if the standby is about to hold it, once it does.

        A standby that is being filled is not waited for, unless it is too far behind.
        """
        link = self.link
        if link is None or not (link.will_cover(len(self._chunks)) or link.is_behind):
            self._tell_now(report)
        elif link.covered == report.step:
            self._tell_now(replace(report, standby=link.standby))
        else:
            failpoints.hit("mirror.before")
            self._waiting = report
            link.moved()
            link.is_awaited = True
            failpoints.hit("mirror.after")

    def forget_report(self) -> None:
        """Another step is open, or another fence: what was reported does not count any more."""
        self._waiting = self.told = None
        self._release()

    def _tell_now(self, report: Prepared) -> None:
        self.told, self._waiting = report, None
        self._release()
        about = "covered" if report.standby else ""
        failpoints.hit("prepare.before", about)
        self._tell(report)
        failpoints.hit("prepare.after", about)

    def _release(self) -> None:
        link = self.link
        if link is not None:
            link.is_awaited = False

    def _tell_waiting(self) -> None:
        if self._waiting is not None:
            self._tell_now(self._waiting)

    # -- What is sent ---------------------------------------------------------------------------

    def reduced(self, chunk: Chunk) -> None:
        """Send what is reduced of a chunk, if the standby holds its state."""
        link = self.link
        if link is not None:
            self._send_reduced(link, chunk)

    def decided(self, decision: Decision) -> None:
        """Send what was decided: whatever of its step the standby lacks now will not come any more."""
        link = self.link
        if link is not None:
            link.send_decided(Decided(decision))

    def copy(self, chunk: Chunk, decision: Decision) -> Copy | None:
        """Copy the state of a chunk right after an update, if it is to be sent."""
        link = self.link
        if link is None or not link.wants_state(chunk):
            return None
        return link, draft_state(chunk, self._store.arrays(chunk), decision.version, decision.applied)

    def send(self, chunk: Chunk, copy: Copy | None) -> None:
        """Send what was copied, unless its link is not the present one any more."""
        if copy is not None and copy[0] is self.link:
            copy[0].send_state(chunk, copy[1])

    def _send_reduced(self, link: Link, chunk: Chunk) -> None:
        if link.wants_reduced(chunk):
            square_sums = tuple(map(float, self._store.square_sums(chunk)))
            link.send_reduced(self._protocol.record(chunk, square_sums), self._store.mean(chunk))

    # -- From the replicator --------------------------------------------------------------------

    def resume(self, link: Link, held: Mirrored) -> None:
        """Send the standby what it lacks of the open step, and the decision if it has not heard that."""
        with self._lock:
            if link is not self.link:
                return
            protocol = self._protocol
            step, last, deciding = protocol.step, protocol.last_decision, protocol.deciding
            if held.step > step:
                # It has heard a decision that this shard has not: again, when it has.
                link.cut()
                return
            # One decision behind is not too late: what it holds becomes what this shard has.
            filled = _named(held.filled, self._chunks) if held.step >= step - 1 else set()
            reduced = _named(held.reduced, self._chunks) if held.step == step else set()
            link.joined(filled, reduced, len(self._chunks))
            if link.will_cover(len(self._chunks)):
                self.covered(link, step)
            if held.step < step and last is not None:
                link.send_decided(Decided(last))
            for chunk in self._chunks:
                if protocol.reduction(chunk.index).reduced:
                    self._send_reduced(link, chunk)
            if deciding is not None:
                link.send_decided(Decided(deciding))

    def covered(self, link: Link, step: int) -> None:
        """The standby could take over, with what is reduced of a step: the report says so."""
        with self._lock:
            link.covers(step)
            report = self._waiting or self.told
            if link is self.link and report is not None and report.step == step:
                self._tell_now(replace(report, standby=link.standby))

    def caught_up(self, link: Link) -> None:
        """What has been sent is not too much any more: the next step goes on, unless the standby is to hold it."""
        with self._lock:
            if link is self.link and not link.will_cover(len(self._chunks)):
                self._tell_waiting()

    def uncovered(self, replicator: Replicator) -> None:
        """Nothing is known of what the standby holds; the coordinator decides what follows."""
        with self._lock:
            if replicator is self._replicator:
                self._tell_waiting()


def _named(bitmap: bytes, chunks: Sequence[Chunk]) -> set[int]:
    """The chunks that a bitmap over a shard's chunks names."""
    bits = int.from_bytes(bitmap, "little")
    return {chunk.index for position, chunk in enumerate(chunks) if bits >> position & 1}
