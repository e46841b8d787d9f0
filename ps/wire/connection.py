"""The calling side of a bidirectional gRPC stream of frames, as raw bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import grpc

from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import PLAIN, Security
from ps.wire.status import error_of

#: Frames that wait to be sent on one connection, at most; `send` waits beyond that.
SEND_WINDOW = 1

OnFrame = Callable[[bytes], None]
OnClose = Callable[[str], None]


class FrameStream:
    """One open stream to a shard; two threads: gRPC's own for sending, ours for receiving.

    What is sent arrives in this order, or not at all; after `on_close` nothing more arrives.
    """

    def __init__(
        self, address: str, method: str, on_frame: OnFrame, on_close: OnClose, security: Security = PLAIN
    ) -> None:
        self._address = address
        self._on_frame = on_frame
        self._on_close = on_close
        self._closed = False
        #: Frames to send, and room for them. A `queue.Queue` would do both, in Python: its waiting threads cost more.
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(SEND_WINDOW):
            self._room.put(None)
        self._channel = open_channel(address, security, Role.SHARD)
        self._call = self._channel.stream_stream(method)(self._frames())
        self._thread = threading.Thread(target=self._receive, name=f"stream {address}", daemon=True)
        self._thread.start()

    def send(self, frame: bytes, timeout_s: float) -> bool:
        try:
            self._room.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if self._closed:
            # For whoever sends next.
            self._room.put(None)
        else:
            self._outgoing.put(frame)
        return True

    @property
    def has_room(self) -> bool:
        return not self._room.empty()

    def close(self) -> None:
        self._end()
        self._call.cancel()

    def _end(self) -> None:
        """Nothing is sent any more: whoever waits to send, or for something to send, waits no longer."""
        self._closed = True
        self._outgoing.put(None)
        self._room.put(None)

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._outgoing.get()) is not None and not self._closed:
            self._room.put(None)
            yield frame
            # Not kept while waiting for the next one: 2 MiB in the middle of the heap.
            del frame

    def _receive(self) -> None:
        reason = "the shard ended the stream"
        try:
            while (frame := next(self._call, None)) is not None:
                self._on_frame(frame)
                del frame
        except grpc.RpcError as failure:
            reason = error_of(failure, f"the stream to {self._address}").message
        finally:
            self._end()
            self._channel.close()
            self._on_close(reason)
