"""What every transport must do, the same for all of them: a shard is served, and a worker's frames travel.

`inprocess` calls the shard's exchange directly; `grpc` goes through a real server on this host.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import pytest

from ps.client.grpc_transport import GrpcTransport
from ps.client.inprocess_transport import InProcessTransport
from ps.client.transport import SEND_WINDOW, Connection, Transport
from ps.errors import PeerUnavailable
from ps.shard import exchange as exchange_module
from ps.shard import metrics
from ps.shard.exchange import Exchange
from ps.shard.protocol import Accepted
from ps.shard.service import ShardHost, ShardServicer
from ps.sharding import make_plan
from ps.types import MAX_CHUNK
from ps.wire import frame
from ps.wire.messages import Ack, Header, Push, Refused, Weights, Welcome, parse_to_worker
from ps.wire.options import bind, make_server
from tests.support.eventually import eventually
from tests.support.plans import table_of
from tests.support.shards import TABLE, Rig, encode_frame, make_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]

TIMEOUT_S = 20.0
#: 22 chunks of 3 MiB: more than any transport may have under way to a worker that does not read.
BIG = table_of([MAX_CHUNK] * 16)
BIG_CHUNKS = 22
#: Frames that may have left the shard while the worker holds one: gRPC's window and buffers, in 3 MiB.
MOST_UNDER_WAY = 14


class Server(Protocol):
    """A shard that can die and come back at the same address."""

    address: str
    transport: Transport

    def start(self) -> None: ...

    def kill(self) -> None: ...


class InProcessServer:
    def __init__(self, shard: Rig) -> None:
        self.address = "shard"
        self.transport = InProcessTransport(self._open)
        self._shard = shard
        self._streams: list[Exchange] = []
        self._up = False

    def _open(self, address: str) -> Exchange:
        if not self._up or address != self.address:
            raise PeerUnavailable(f"nobody listens at {address}")
        self._streams.append(Exchange(self._shard.engine, 7))
        return self._streams[-1]

    def start(self) -> None:
        self._up = True

    def kill(self) -> None:
        self._up = False
        for stream in self._streams:
            stream.close()


class GrpcServer:
    def __init__(self, shard: Rig) -> None:
        self.address = "127.0.0.1:0"
        self.transport = GrpcTransport()
        self._host = ShardHost(0, 7, lambda _: None)
        self._host.seat = shard.seat
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self._server = make_server(16)
        self._server.add_generic_rpc_handlers((ShardServicer(self._host).handler(),))
        self.address = f"127.0.0.1:{bind(self._server, self.address)}"
        self._server.start()

    def kill(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait(TIMEOUT_S)
            self._server = None


SERVERS = {"inprocess": InProcessServer, "grpc": GrpcServer}


class Client:
    """A worker's end of one connection."""

    def __init__(self, server: Server, address: str | None = None) -> None:
        self.frames: queue.Queue[tuple[Header, memoryview]] = queue.Queue()
        self.closed: queue.Queue[str] = queue.Queue()
        #: Cleared, it makes the reader block.
        self.reading = threading.Event()
        self.reading.set()
        self.blocked = threading.Event()
        self.late = 0
        self.connection: Connection = server.transport.connect(
            address or server.address, self._on_frame, self.closed.put
        )

    def _on_frame(self, data: bytes) -> None:
        if not self.closed.empty():
            self.late += 1
        if not self.reading.is_set():
            self.blocked.set()
            assert self.reading.wait(TIMEOUT_S)
        fields, payload = frame.decode(data)
        self.frames.put((parse_to_worker(fields), payload))

    def send(self, header: Header, payload: memoryview | bytes = b"") -> None:
        self.send_bytes(encode_frame(header, payload))

    def send_bytes(self, data: bytes) -> None:
        while not self.connection.send(data, 0.1):
            pass

    def next(self) -> tuple[Header, memoryview]:
        return self.frames.get(timeout=TIMEOUT_S)

    def headers(self, count: int) -> list[Header]:
        return [self.next()[0] for _ in range(count)]


def pushed(outcome: str) -> float:
    """How many chunks were `held`, or were a `duplicate`, in all tests until now."""
    return metrics.PUSHED_FRAMES.labels(outcome)._value.get()


@pytest.fixture(params=SERVERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Rig]:
    shard = Rig(make_config(tmp_path))
    yield shard
    shard.close()


@pytest.fixture
def server(kind: str, shard: Rig) -> Iterator[Server]:
    yield from serving(kind, shard)


def serving(kind: str, shard: Rig) -> Iterator[Server]:
    server = SERVERS[kind](shard)
    server.start()
    yield server
    server.kill()


def test_frames_arrive_in_order_in_both_directions(server: Server, shard: Rig) -> None:
    client = Client(server)
    client.send(shard.hello())
    pushes = shard.pushes() * 5
    held, again = pushed("held"), pushed("duplicate")
    for push in pushes:
        client.send(*push)
    client.send(shard.pull(0))
    assert isinstance(client.next()[0], Welcome)
    # Each contribution has two chunks: the second makes it whole, and what comes again is acknowledged at once.
    expected = [Ack(0, h.contribution, -1) for index, (h, _) in enumerate(pushes) if index >= 4 or h.chunk == 1]
    assert client.headers(len(expected)) == expected
    assert (pushed("held"), pushed("duplicate")) == (held + 4, again + 16)
    assert client.headers(2) == [Weights(0, 0, "fp16"), Weights(0, 1, "fp16")]
    client.connection.close()


def test_every_bit_arrives(server: Server, shard: Rig) -> None:
    client = Client(server)
    for push in shard.pushes():
        client.send(*push)
    assert client.headers(2) == [Ack(0, contribution, -1) for contribution in range(2)]
    shard.told.prepared.get(timeout=TIMEOUT_S)
    for chunk in shard.chunks:
        np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))
    client.send(shard.pull(0))
    weights = np.concatenate([np.frombuffer(client.next()[1], np.float16) for _ in shard.chunks])
    np.testing.assert_array_equal(weights, shard.weights().astype(np.float16))
    client.connection.close()


def test_what_is_no_frame_is_refused_and_the_stream_goes_on(server: Server, shard: Rig) -> None:
    client = Client(server)
    client.send_bytes(b"this is not a frame")
    refused = client.next()[0]
    assert isinstance(refused, Refused)
    assert refused.code == "MALFORMED_FRAME"
    client.send(shard.hello())
    assert isinstance(client.next()[0], Welcome)
    client.connection.close()


def test_senders_at_once(server: Server, shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one's frames stay in order, and none is lost."""
    client = Client(server)
    received: list[list[int]] = [[], []]
    push = shard.engine.push

    def recording(header: Push, payload: memoryview, *, shared: bool = False) -> Accepted:
        received[header.contribution].append(header.chunk)
        return push(header, payload, shared=shared)

    monkeypatch.setattr(shard.engine, "push", recording)

    def send(contribution: int) -> None:
        for _ in range(20):
            for chunk in shard.chunks:
                client.send(*shard.push(contribution, chunk))

    threads = [threading.Thread(target=send, args=(c,), daemon=True) for c in range(2)]
    for thread in threads:
        thread.start()
    # All but the very first chunk of each find the contribution whole.
    acks = client.headers(2 * 39)
    for contribution in range(2):
        assert received[contribution] == [0, 1] * 20
        assert acks.count(Ack(0, contribution, -1)) == 39
    client.connection.close()


def test_a_reader_that_blocks_stops_the_shard_and_loses_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out = 0

    class Counting(Exchange):
        def replies(self) -> Iterator[bytes]:
            nonlocal handed_out
            for reply in super().replies():
                handed_out += 1
                yield reply

    monkeypatch.setattr("ps.shard.service.Exchange", Counting)
    monkeypatch.setitem(globals(), "Exchange", Counting)
    assert exchange_module.Exchange is not Counting
    config = make_config(tmp_path, wire="fp32", optimizer="sgd", batch={"micro_batches_per_step": 1})
    assert len(make_plan(BIG, 1).chunks) == BIG_CHUNKS
    shard = Rig(config, 1, table=BIG)
    for server in serving(kind, shard):
        client = Client(server)
        client.reading.clear()
        client.send(shard.pull(0))
        assert client.blocked.wait(TIMEOUT_S)
        seen: list[int] = []

        def settled(seen: list[int] = seen) -> bool:
            seen.append(handed_out)
            return len(seen) > 25 and len(set(seen[-25:])) == 1

        eventually(settled, TIMEOUT_S, "the shard to stop sending")
        assert 1 <= handed_out <= MOST_UNDER_WAY
        client.reading.set()
        assert client.headers(BIG_CHUNKS) == [Weights(0, chunk, "fp32") for chunk in range(BIG_CHUNKS)]
        client.connection.close()
        client.closed.get(timeout=TIMEOUT_S)
    shard.close()


def test_a_shard_that_blocks_stops_the_sender(server: Server, shard: Rig) -> None:
    """`send` waits instead of queueing without end."""
    client = Client(server)
    client.send(shard.hello())
    client.next()
    # 128 KiB each; the server's and gRPC's windows take some.
    data = encode_frame(*shard.push(0, shard.chunks[0]))
    held, again = pushed("held"), pushed("duplicate")
    sent = 0
    done = threading.Event()

    def send() -> None:
        nonlocal sent
        for _ in range(1000):
            client.send_bytes(data)
            sent += 1
        done.set()

    with shard.engine.lock:
        # Nothing can be received while the engine's lock is held.
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        seen: list[int] = []

        def settled() -> bool:
            seen.append(sent)
            return len(seen) > 25 and len(set(seen[-25:])) == 1

        eventually(settled, TIMEOUT_S, "the sender to wait")
        assert sent * len(data) <= 48 << 20
        assert not done.is_set()
    assert done.wait(TIMEOUT_S)
    client.send(*shard.push(0, shard.chunks[1]))
    assert client.next()[0] == Ack(0, 0, -1)
    assert (pushed("held"), pushed("duplicate")) == (held + 2, again + 999)
    client.connection.close()


def test_closing_is_told_once_and_sending_after_it_is_silent(server: Server, shard: Rig) -> None:
    client = Client(server)
    client.send(shard.hello())
    client.next()
    client.connection.close()
    assert client.closed.get(timeout=TIMEOUT_S)
    client.connection.close()
    for _ in range(3 * SEND_WINDOW):
        client.send(*shard.push(0, shard.chunks[0]))
    client.connection.close()
    assert client.frames.empty()
    assert client.closed.empty()
    assert shard.engine.protocol.held() == []


def test_closing_from_the_readers_thread(server: Server, shard: Rig) -> None:
    closed: queue.Queue[str] = queue.Queue()
    opened: queue.Queue[Connection] = queue.Queue()

    def on_frame(_data: bytes) -> None:
        opened.get(timeout=TIMEOUT_S).close()

    connection = server.transport.connect(server.address, on_frame, closed.put)
    opened.put(connection)
    assert connection.send(encode_frame(shard.hello()), TIMEOUT_S)
    assert closed.get(timeout=TIMEOUT_S)


def test_the_servers_death_is_told_once(server: Server, shard: Rig) -> None:
    client = Client(server)
    client.send(shard.hello())
    client.next()
    server.kill()
    reason = client.closed.get(timeout=TIMEOUT_S)
    assert reason
    assert "\n" not in reason
    client.send(shard.hello())
    client.connection.close()
    assert client.closed.empty()
    assert client.late == 0


def test_nobody_listens(server: Server) -> None:
    nowhere: Any = "127.0.0.1:1"
    client = Client(server, nowhere)
    assert nowhere in client.closed.get(timeout=TIMEOUT_S)
    client.send_bytes(b"x")
    client.connection.close()
    assert client.closed.empty()


def test_a_new_connection_after_the_servers_death(server: Server, shard: Rig) -> None:
    first = Client(server)
    first.send(*shard.push(0, shard.chunks[0]))
    eventually(shard.engine.protocol.held, TIMEOUT_S, "the chunk")
    server.kill()
    first.closed.get(timeout=TIMEOUT_S)
    while_down = Client(server)
    while_down.closed.get(timeout=TIMEOUT_S)
    server.start()
    second = Client(server)
    second.send(shard.hello())
    welcome = second.next()[0]
    # What had come before is still held: only the rest is to be sent.
    assert isinstance(welcome, Welcome)
    assert welcome.held == [[0, b"\x01"]]
    held, again = pushed("held"), pushed("duplicate")
    for push in shard.pushes():
        second.send(*push)
    assert second.headers(2) == [Ack(0, contribution, -1) for contribution in range(2)]
    assert (pushed("held"), pushed("duplicate")) == (held + 3, again + 1)
    assert first.frames.empty()
    second.connection.close()


def test_streams_are_independent(server: Server, shard: Rig) -> None:
    slow, quick = Client(server), Client(server)
    slow.reading.clear()
    for client in (slow, quick):
        client.send(shard.hello())
    assert slow.blocked.wait(TIMEOUT_S)
    assert isinstance(quick.next()[0], Welcome)
    for push in shard.pushes():
        quick.send(*push)
    assert len(quick.headers(2)) == 2
    slow.reading.set()
    assert isinstance(slow.next()[0], Welcome)
    slow.connection.close()
    quick.connection.close()


def test_the_rig_is_small() -> None:
    """So that the other tests say what they seem to say: two chunks, two contributions."""
    assert len(make_plan(TABLE, 1).chunks) == 2
