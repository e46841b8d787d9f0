"""A transport on which weights are late, one chunk after the other, so that layers have to wait for theirs."""

from __future__ import annotations

import random
import threading

from ps.client.transport import Connection, OnClose, OnFrame, Transport
from ps.wire import frame

#: A chunk is late by at most so long.
_LATE_S = 0.02


class DelayingTransport:
    """Wraps another transport. The order of frames stays.

    Args:
        inner: what carries the frames.
        seed: of how late each chunk is.
    """

    def __init__(self, inner: Transport, seed: int) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self._pause = threading.Event()
        #: How many chunks were late.
        self.delayed = 0

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> Connection:
        def late(data: bytes) -> None:
            for part in _chunk_by_chunk(data):
                if part is not data or frame.decode(part)[0]["kind"] == "weights":
                    self.delayed += 1
                    self._pause.wait(self._random.uniform(0, _LATE_S))
                on_frame(part)

        return self._inner.connect(address, late, on_close)


def _chunk_by_chunk(data: bytes) -> list[bytes]:
    """A frame that tells of several places, as one frame for each."""
    fields, _ = frame.decode(data)
    if fields["kind"] != "placed":
        return [data]
    return [frame.encode({**fields, "chunks": [row]}) for row in fields["chunks"]]
