"""Frames inside one process, without sockets: for tests and simulation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from ps.client.transport import OnClose, OnFrame
from ps.errors import PsError


class Stream(Protocol):
    """The server's side of one connection."""

    def receive(self, data: bytes) -> None:
        """Take one frame."""

    def replies(self) -> Iterator[bytes]:
        """Yield frames for the worker, waiting for each; ends when the stream is closed."""

    def close(self) -> None:
        """End `replies`. Idempotent."""


class InProcessTransport:
    """Opens streams by a function call.

    Args:
        open_stream: the server's side for an address. A PsError that it raises is told by `on_close`,
            as that of a server which cannot be reached.
    """

    def __init__(self, open_stream: Callable[[str], Stream]) -> None:
        self._open_stream = open_stream

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> InProcessConnection:
        return InProcessConnection(self._open_stream, address, on_frame, on_close)


class InProcessConnection:
    """One open stream: `send` calls the other side in the sender's thread, one thread reads its replies."""

    def __init__(
        self, open_stream: Callable[[str], Stream], address: str, on_frame: OnFrame, on_close: OnClose
    ) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._closed = threading.Event()
        #: Keeps the order when several threads send.
        self._sending = threading.Lock()
        self._stream: Stream | None = None
        self._reason = "the shard ended the stream"
        try:
            self._stream = open_stream(address)
        except PsError as error:
            self._reason = f"the stream to {address}: {error.message}"
            self._closed.set()
        threading.Thread(target=self._receive, name=f"stream {address}", daemon=True).start()

    def send(self, frame: bytes, timeout_s: float) -> bool:
        del timeout_s
        with self._sending:
            if self._stream is not None and not self._closed.is_set():
                self._stream.receive(frame)
        return True

    @property
    def has_room(self) -> bool:
        return True

    def close(self) -> None:
        if not self._closed.is_set():
            self._reason = "the stream was closed on this side"
            self._closed.set()
        if self._stream is not None:
            self._stream.close()

    def _receive(self) -> None:
        try:
            if self._stream is not None:
                for frame in self._stream.replies():
                    if self._closed.is_set():
                        break
                    self._on_frame(frame)
        finally:
            self._closed.set()
            if self._stream is not None:
                self._stream.close()
            self._on_close(self._reason)
