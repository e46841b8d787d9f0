"""What a shard shares with the worker of one stream: the worker's gradients, and the published weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from ps.errors import MalformedFrame, SharedMemoryError, StalePlace
from ps.shard import metrics
from ps.wire.messages import Attach, Hello, Push, PushPlaced
from ps.wire.shared_memory import Segment

log = logging.getLogger(__name__)


class StreamMemory:
    """The server's side of one stream's shared memory; each greeting begins it anew.

    Several threads may close a stream: the caller serializes all calls but `payloads`.
    """

    def __init__(self) -> None:
        self._gradients: Segment | None = None
        self._published: Segment | None = None
        self._greeting = -1
        #: The worker has proved that it sees what is published.
        self.ready = False

    def begin(self, header: Hello, share: Callable[[], Segment]) -> dict[str, Any]:
        """Attach what a worker offers; returns the fields of the answer, empty ones for frames only.

        Gradients that are held of an earlier greeting stay where they are.
        """
        self.close()
        if not header.shared:
            return {}
        try:
            gradients = Segment.attach(header.shared, header.shared_bytes)
            published = share()
        except SharedMemoryError as error:
            log.info("worker %d gets frames: %s", header.rank, error.message)
            return {}
        self._gradients, self._published = gradients, published
        self._greeting = header.greeting
        return {"nonce": gradients.nonce, "shared": published.name, "shared_bytes": published.size}

    def attached(self, header: Attach) -> None:
        """The worker's proof.

        Raises:
            MalformedFrame: it is not one; the stream goes on with frames.
        """
        if self._published is None or header.nonce != self._published.nonce:
            raise MalformedFrame("attach: the nonce is not that of this shard's segment")
        if not self.ready:
            self.ready = True
            metrics.SHARED_STREAMS.inc()
            log.info("worker %d shares memory with this shard", header.rank)

    def payloads(self, header: PushPlaced, num_bytes: Callable[[int], int]) -> Iterator[tuple[Push, memoryview]]:
        """The gradients of a push, from where its header says.

        Args:
            num_bytes: of a chunk, by its index.

        Raises:
            StalePlace: the places are of an earlier greeting.
            MalformedFrame: one is outside of what is shared.
        """
        gradients = self._gradients
        if gradients is None or not self.ready or header.greeting != self._greeting:
            raise StalePlace(f"the places are of greeting {header.greeting}, whose memory is not shared (any more)")
        for push, place in header.pushes():
            try:
                yield push, gradients.view(place, num_bytes(push.chunk))
            except SharedMemoryError as error:
                raise MalformedFrame(f"push: {error.message}") from None

    def close(self) -> None:
        """Let go of everything; views of gradients that are held keep their memory. Idempotent."""
        if self._gradients is not None:
            self._gradients.close()
        if self.ready:
            metrics.SHARED_STREAMS.dec()
        self._gradients = self._published = None
        self._greeting, self.ready = -1, False
