"""One tensor stream of the server: a thread that takes frames, and gRPC's own that sends the answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Protocol

import grpc

log = logging.getLogger(__name__)

#: All members hear of the end of a run within this.
END_S = 2.0


class Talk(Protocol):
    """What is said on a stream."""

    def receive(self, data: bytes) -> None:
        """Take one frame; while it blocks nothing more is read: that is the flow control."""

    def replies(self) -> Iterator[bytes]:
        """Yield frames for the peer until the stream is closed."""

    def close(self) -> None:
        """End `replies`. Idempotent, and any thread's."""


def serve(
    frames: Iterator[bytes], context: grpc.ServicerContext, talk: Talk, ending: threading.Event
) -> Iterator[bytes]:
    """Carry a talk over a stream until either side ends it.

    Args:
        frames: what the peer sends.
        ending: the run, or this process, is about to end: a stream that breaks is then no news.
    """
    context.add_callback(talk.close)
    threading.Thread(target=read, args=(frames, talk, ending), name="exchange", daemon=True).start()
    try:
        yield from talk.replies()
    finally:
        talk.close()


def read(frames: Iterator[bytes], talk: Talk, ending: threading.Event) -> None:
    """Hand every frame to the talk, one after the other."""
    try:
        for data in frames:
            talk.receive(data)
    except grpc.RpcError:
        talk.close()
        # A worker may hear before this shard does that the run is over.
        if not ending.wait(END_S):
            log.info("a stream broke, or who called has left")
    except Exception:
        log.exception("a stream's reader failed; the stream is closed")
    finally:
        talk.close()
