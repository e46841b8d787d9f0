"""How frames travel between a worker and a shard: one interface, several ways.

Ordering: frames of one connection arrive in the order in which they were sent, in both directions.
Delivery: at most once; after `on_close` nothing more arrives, and what was sent may be lost.
"""

from __future__ import annotations

from typing import Protocol

from ps.wire.connection import SEND_WINDOW, OnClose, OnFrame

__all__ = ["SEND_WINDOW", "Connection", "OnClose", "OnFrame", "Transport"]


class Connection(Protocol):
    """One open stream to one shard."""

    def send(self, frame: bytes, timeout_s: float) -> bool:
        """Queue a frame, waiting while too many are queued; it is silently dropped once the stream is closed.

        Returns:
            False when there was no room in time: the frame is not queued.
        """

    @property
    def has_room(self) -> bool:
        """Whether `send` would not wait."""

    def close(self) -> None:
        """End the stream; `on_close` is called if it was not yet. Idempotent."""


class Transport(Protocol):
    """Opens connections."""

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> Connection:
        """Open a stream. Never blocks for the peer: what fails is told by `on_close`.

        Args:
            address: host:port of the shard.
            on_frame: called with each frame, in order, from a thread of the transport. While it
                blocks, nothing more is read: that is the flow control.
            on_close: called once, with the reason, after the last frame.
        """
