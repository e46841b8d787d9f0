"""Frames over one bidirectional gRPC stream per (worker, shard), as raw bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc

from ps.client.transport import SEND_WINDOW, OnClose, OnFrame
from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import PLAIN, Security
from ps.wire.status import error_of

METHOD = "/windlass.ps.v1.Shard/Exchange"
#: How often the sender looks whether the stream is still there.
_POLL_S = 0.1


class GrpcTransport:
    """Opens one channel per connection."""

    def __init__(self, security: Security = PLAIN) -> None:
        self._security = security

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> GrpcConnection:
        return GrpcConnection(address, on_frame, on_close, self._security)


class GrpcConnection:
    """One open stream; two threads: gRPC's own for sending, ours for receiving."""

    def __init__(self, address: str, on_frame: OnFrame, on_close: OnClose, security: Security = PLAIN) -> None:
        self._address = address
        self._on_frame = on_frame
        self._on_close = on_close
        self._closed = threading.Event()
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(SEND_WINDOW)
        self._channel = open_channel(address, security, Role.SHARD)
        self._call = self._channel.stream_stream(METHOD)(self._frames())
        self._thread = threading.Thread(target=self._receive, name=f"stream {address}", daemon=True)
        self._thread.start()

    def send(self, frame: bytes, timeout_s: float) -> bool:
        if self._closed.is_set():
            return True
        try:
            self._outgoing.put(frame, timeout=timeout_s)
        except queue.Full:
            return self._closed.is_set()
        return True

    @property
    def has_room(self) -> bool:
        return not self._outgoing.full()

    def close(self) -> None:
        self._closed.set()
        self._call.cancel()

    def _frames(self) -> Iterator[bytes]:
        while not self._closed.is_set():
            try:
                frame = self._outgoing.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if frame is None:
                return
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
            self._closed.set()
            self._channel.close()
            self._on_close(reason)
