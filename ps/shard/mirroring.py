"""What a shard does for its standby: it sends what is reduced, at first the state, and reports what is held by both.

The stream is the replicator's; what it may carry, and what follows from its answers, is decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from ps import failpoints
from ps.shard.protocol import StepProtocol
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
        """Tell the coordinator that everything is reduced, once the standby holds it too."""
        link = self.link
        if link is None or not link.is_joined:
            self._tell_now(report)
            return
        self._waiting = report
        failpoints.hit("mirror.before")
        link.send_step(report)
        failpoints.hit("mirror.after")

    def forget_report(self) -> None:
        """Another step is open, or another fence: what was reported does not count any more."""
        self._waiting = self.told = None

    def _tell_now(self, report: Prepared) -> None:
        self.told, self._waiting = report, None
        about = "covered" if report.standby else ""
        failpoints.hit("prepare.before", about)
        self._tell(report)
        failpoints.hit("prepare.after", about)

    def _tell_waiting(self) -> None:
        if self._waiting is not None:
            self._tell_now(self._waiting)

    # -- What is sent ---------------------------------------------------------------------------

    def reduced(self, chunk: Chunk) -> None:
        """Send what is reduced of a chunk, if the standby holds its state."""
        link = self.link
        if link is not None:
            self._send_reduced(link, chunk)

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
        present = self._protocol.reduction(chunk.index).present.to_bytes(chunk.presence_bytes, "little")
        squares, mean = self._store.square_sums(chunk), self._store.mean(chunk)
        link.send_reduced(self._protocol.step, chunk, present, squares, mean)

    # -- From the replicator --------------------------------------------------------------------

    def resume(self, link: Link, held: Mirrored) -> None:
        """Send the standby what it lacks of the open step."""
        with self._lock:
            if link is not self.link:
                return
            step, chunks = self._protocol.step, self._chunks
            # One decision behind: it hears that one from the coordinator.
            counts = held.step in (step, step - 1)
            link.joined(_named(held.filled, chunks) if counts else set())
            there = _named(held.reduced, chunks) if held.step == step else set()
            for chunk in chunks:
                if self._protocol.reduction(chunk.index).reduced and chunk.index not in there:
                    self._send_reduced(link, chunk)
            report = self._waiting or self.told
            if report is not None and report.step == step:
                link.send_step(report)

    def covered(self, link: Link, step: int, whole: bool) -> None:
        """The standby holds what was sent of a step: the report goes, and says whether that is everything."""
        with self._lock:
            report = self._waiting or self.told
            if link is self.link and report is not None and report.step == step:
                self._tell_now(replace(report, standby=link.standby if whole else 0))

    def uncovered(self, replicator: Replicator) -> None:
        """Nothing is known of what the standby holds; the coordinator decides what follows."""
        with self._lock:
            if replicator is self._replicator:
                self._tell_waiting()


def _named(bitmap: bytes, chunks: Sequence[Chunk]) -> set[int]:
    """The chunks that a bitmap over a shard's chunks names."""
    bits = int.from_bytes(bitmap, "little")
    return {chunk.index for position, chunk in enumerate(chunks) if bits >> position & 1}
