"""Frames over one bidirectional gRPC stream per (worker, shard), as raw bytes."""

from __future__ import annotations

from ps.client.transport import OnClose, OnFrame
from ps.wire.connection import FrameStream
from ps.wire.security import PLAIN, Security

METHOD = "/windlass.ps.v1.Shard/Exchange"


class GrpcTransport:
    """Opens one channel per connection."""

    def __init__(self, security: Security = PLAIN) -> None:
        self._security = security

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> FrameStream:
        return FrameStream(address, METHOD, on_frame, on_close, self._security)
