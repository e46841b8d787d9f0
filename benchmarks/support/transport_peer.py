"""The other side of bench_transport, a process of its own: it takes what is pushed and gives what is pulled.

    python -m benchmarks.support.transport_peer tcp|grpc TOTAL_BYTES CHUNK_BYTES [CERTIFICATES]

prints the port it listens on, and ends with its standard input. It runs in a shard's environment. Over gRPC the
server, its options, its stream threads and the frames are a shard's; over TCP it is two threads and nothing else.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from ps.shard import stream
from ps.shard.service import SERVICE
from ps.types import Role
from ps.wire import frame
from ps.wire.options import bind, make_server
from ps.wire.security import PLAIN, load_security
from ps.wire.shared_memory import Segment
from workers.launch.environment import enter

#: What is asked of a peer: both bits for both directions at once.
PUSH, PULL = 1, 2
#: Of one sendall and one recv_into: the best size for plain sockets.
TCP_PIECE = 1 << 20
BYTES = np.dtype(np.uint8)


def payload(total: int) -> np.ndarray:
    """Bytes to send, in memory that exists."""
    return np.frombuffer(np.random.default_rng(0).bytes(total), BYTES)


def chunks(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


def header(kind: str, index: int = 0, last: bool = False, place: int = -1) -> dict[str, Any]:
    """About as much as the header of a push or of published weights carries.

    Args:
        kind: what it is.
        index: of the chunk.
        last: whether it is the last chunk.
        place: where the payload is in shared memory; -1: in the frame.
    """
    return {
        "kind": kind, "run": "benchmark", "term": 1, "epoch": 1, "rank": 0, "incarnation": 1 << 61, "step": 7,
        "contribution": 1, "chunk": index, "slots": 8, "loss_scale": 65536.0, "dtype": "fp16", "hash": bytes(8),
        "present": b"\xff", "last": last, "place": place,
    }  # fmt: skip


def prepared(kind: str, source: np.ndarray, places: list[slice]) -> list[bytes]:
    """Every chunk as a frame."""
    last = len(places) - 1
    return [frame.encode(header(kind, index, index == last), source[place]) for index, place in enumerate(places)]


def notices(kind: str, source: np.ndarray, room: np.ndarray, places: list[slice]) -> Iterator[bytes]:
    """Copy chunk by chunk into shared memory; the frames say where."""
    last = len(places) - 1
    for index, place in enumerate(places):
        np.copyto(room[place], source[place])
        yield frame.encode(header(kind, index, index == last, place.start))


def new_segment(total: int) -> tuple[Segment, np.ndarray]:
    """A segment whose memory exists, and its bytes."""
    segment = Segment.create(total)
    segment.claim(0, total)
    return segment, segment.array(BYTES, 0, total)


def send_all(connection: socket.socket, source: np.ndarray) -> None:
    view = memoryview(source)
    for piece in chunks(len(view), TCP_PIECE):
        connection.sendall(view[piece])


def receive_all(connection: socket.socket, total: int) -> None:
    room = memoryview(bytearray(TCP_PIECE))
    while total:
        received = connection.recv_into(room[: min(total, TCP_PIECE)])
        if not received:
            raise ConnectionError(f"the connection ended {total:,} bytes too early")
        total -= received


class Bulk:
    """What is said on one stream: pushes are taken, and a pull is answered with every chunk."""

    def __init__(self, source: np.ndarray, places: list[slice], frames: list[bytes]) -> None:
        self._source = source
        self._places = places
        self._frames = frames
        #: Where the client writes, and where this side does, once memory is shared.
        self._pushed: np.ndarray | None = None
        self._published: tuple[Segment, np.ndarray] | None = None
        self._room = np.zeros_like(source)
        self._answers: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()

    def receive(self, data: bytes) -> None:
        fields, view = frame.decode(data)
        if fields["kind"] == "push":
            self._take(fields, view)
        elif fields["kind"] == "pull":
            self._answers.put(self._give())
        elif fields["kind"] == "share":
            total = len(self._source)
            self._pushed = Segment.attach(fields["name"], total).array(BYTES, 0, total)
            self._published = new_segment(total)
            self._answers.put(iter([frame.encode({"kind": "shared", "name": self._published[0].name})]))

    def _take(self, fields: dict[str, Any], view: memoryview) -> None:
        if view:
            np.frombuffer(view, np.uint16)
        elif self._pushed is not None and fields["place"] >= 0:
            place = self._places[fields["chunk"]]
            np.copyto(self._room[place], self._pushed[place])
        if fields["last"]:
            self._answers.put(iter([frame.encode({"kind": "held"})]))

    def _give(self) -> Iterator[bytes]:
        if self._published is None:
            return iter(self._frames)
        return notices("weights", self._source, self._published[1], self._places)

    def replies(self) -> Iterator[bytes]:
        while (answers := self._answers.get()) is not None:
            yield from answers

    def close(self) -> None:
        self._answers.put(None)


def serve_tcp(source: np.ndarray) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    with connection:
        while asked := connection.recv(1):
            sender = threading.Thread(target=send_all, args=(connection, source))
            if asked[0] & PULL:
                sender.start()
            if asked[0] & PUSH:
                receive_all(connection, len(source))
            if asked[0] & PULL:
                sender.join()
            connection.sendall(b".")


def serve_grpc(source: np.ndarray, chunk: int, certificates: str) -> None:
    places = chunks(len(source), chunk)
    frames = prepared("weights", source, places)
    ending = threading.Event()

    def exchange(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return stream.serve(requests, context, Bulk(source, places, frames), ending)

    server = make_server(16)
    methods = {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    security = load_security(Path(certificates), False, Role.SHARD) if certificates else PLAIN
    print(bind(server, "127.0.0.1:0", security), flush=True)
    server.start()
    sys.stdin.read()
    ending.set()
    server.stop(0).wait(10.0)


def main(mode: str, total: str, chunk: str, certificates: str = "") -> None:
    enter(Role.SHARD)
    source = payload(int(total))
    if mode == "tcp":
        serve_tcp(source)
    else:
        serve_grpc(source, int(chunk), certificates)


if __name__ == "__main__":
    main(*sys.argv[1:])
