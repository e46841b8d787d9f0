"""The thread that encodes and sends chunks: in order, some of them together, and never of another gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ps.client import pusher as pusher_module
from ps.client.pusher import Contribution, Encoded, Pusher
from ps.errors import WaitTimeout
from ps.kernels.digest import hash_payload
from ps.sharding import Chunk, Run, make_plan
from ps.types import SEGMENT
from ps.wire import frame
from ps.wire.messages import Push, PushPlaced, parse_to_shard
from tests.support.eventually import eventually
from tests.support.plans import table_of_chunks

#: Shard 0 has chunks 0, 2, 4; shard 1 has 1, 3.
PLAN = make_plan(table_of_chunks(5), 2)
TIMEOUT_S = 10.0


def contribution(index: int = 1, step: int = 5) -> Contribution:
    return Contribution(step, index, 1024.0, lambda: (0.5 + index, 10 + index))


class Links:
    """Streams that take frames when a test lets them."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Push | PushPlaced, bytes, int]] = []
        self.open = threading.Event()
        self.open.set()
        #: A frame is being sent that waits for room.
        self.waiting = threading.Event()
        self.error: Exception | None = None
        self.fence_moves = False

    def identity(self) -> dict[str, Any]:
        return {"run": "r", "term": 1, "epoch": 2, "rank": 0, "incarnation": 9}

    def has_room(self, _shard: int) -> bool:
        return self.open.is_set()

    def send(self, shard: int, encoded: bytes, shared_bytes: int = 0) -> None:
        if self.error is not None:
            raise self.error
        self.waiting.set()
        assert self.open.wait(TIMEOUT_S)
        self.waiting.clear()
        fields, payload = frame.decode(encoded)
        header = parse_to_shard(fields)
        assert isinstance(header, Push | PushPlaced)
        self.sent.append((shard, header, bytes(payload), shared_bytes))


class Encoder:
    """A gradient that is one number everywhere."""

    def __init__(self) -> None:
        self.value = 1
        self.discarded = 0
        self.read: list[int] = []
        self.allowed = threading.Event()
        self.allowed.set()
        self.reading = threading.Event()
        self.error: Exception | None = None
        self.presence = b"\x01"

    def encode(self, chunk: Chunk, slots: int, room: np.ndarray) -> Encoded:
        before = self.value
        self.reading.set()
        assert self.allowed.wait(TIMEOUT_S)
        self.reading.clear()
        if self.error is not None:
            raise self.error
        assert self.value == before, "the gradient was changed while it was read"
        room[:] = before * slots
        self.read.append(chunk.index)
        return Encoded(hash_payload(room), self.presence)

    def discard(self) -> None:
        self.discarded += 1
        self.value = 0


class Places:
    """Shared memory with one shard."""

    def __init__(self, greeting: int = 1) -> None:
        self.greeting = greeting
        self.memory: dict[int, np.ndarray] = {}

    def room(self, _step: int, _contribution: int, chunk: Chunk) -> tuple[int, np.ndarray]:
        array = self.memory[chunk.index] = np.zeros(chunk.size, np.uint16)
        return 64 * chunk.index, array


class Bench:
    def __init__(self) -> None:
        self.links, self.encoder = Links(), Encoder()
        self.places: dict[int, Places] = {}
        self.failures: list[BaseException] = []
        links: Any = self.links
        places_of: Any = self.places.get
        self.pusher = Pusher(links, self.encoder, places_of, self.failures.append)

    def begin(self, index: int = 1, step: int = 5) -> Contribution:
        begun = contribution(index, step)
        self.pusher.hold(begun)
        return begun

    def put(self, begun: Contribution, *chunks: int) -> None:
        for index in chunks:
            self.pusher.put(begun, 2, PLAN.chunks[index])

    @property
    def told(self) -> list[tuple[int, list[int]]]:
        """(shard, chunks) of each frame."""
        return [
            (shard, [header.chunk] if isinstance(header, Push) else [row[0] for row in header.chunks])
            for shard, header, _, _ in self.links.sent
        ]

    def await_told(self, count: int) -> None:
        eventually(lambda: sum(len(chunks) for _, chunks in self.told) == count, TIMEOUT_S, f"{count} chunks")


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.links.open.set()
    made.encoder.allowed.set()
    made.pusher.close()
    thread = made.pusher._thread
    if thread is not None:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert made.failures == []


def test_chunks_go_in_the_order_in_which_they_are_ready(bench: Bench) -> None:
    begun = bench.begin()
    bench.put(begun, 4, 1, 0, 3, 2)
    bench.pusher.settle()
    assert bench.told == [(0, [4]), (1, [1]), (0, [0]), (1, [3]), (0, [2])]
    for _, header, payload, _ in bench.links.sent:
        assert isinstance(header, Push)
        assert header == Push(
            **bench.links.identity(),
            step=5,
            contribution=1,
            chunk=header.chunk,
            slots=2,
            loss_scale=1024.0,
            dtype="fp16",
            hash=hash_payload(payload),
            present=b"\x01",
            loss_sum=1.5,
            tokens=11,
        )
        assert payload == np.full(SEGMENT, 2, np.uint16).tobytes()


def test_the_fence_is_that_of_the_moment_in_which_a_chunk_was_put(bench: Bench) -> None:
    """A gradient of the past must never look like one of the present."""
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 2)
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "the first frame")
    bench.links.identity = lambda: {"run": "r", "term": 1, "epoch": 3, "rank": 0, "incarnation": 9}  # type: ignore[method-assign]
    bench.put(begun, 4)
    bench.links.open.set()
    bench.pusher.settle()
    assert [header.epoch for _, header, _, _ in bench.links.sent] == [2, 2, 3]


def test_a_chunk_is_encoded_when_its_stream_has_room(bench: Bench) -> None:
    """One waits in memory, not all of them."""
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 1, 2, 3, 4)
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "the first frame")
    assert bench.encoder.read == [0]


def test_places_are_told_of_together_while_the_stream_is_busy(bench: Bench) -> None:
    bench.places.update({0: Places(), 1: Places(7)})
    begun = bench.begin()
    bench.put(begun, 0)
    bench.await_told(1)
    bench.links.open.clear()
    bench.encoder.allowed.clear()
    bench.put(begun, 2, 4, 1, 3)
    bench.encoder.allowed.set()
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "what is left to be told")
    assert bench.encoder.read == [0, 2, 4, 1, 3], "writing into shared memory needs no room in the stream"
    bench.pusher.settle()
    bench.links.open.set()
    bench.await_told(5)
    assert bench.told == [(0, [0]), (0, [2, 4]), (1, [1, 3])]
    for shard, header, payload, shared_bytes in bench.links.sent:
        assert isinstance(header, PushPlaced)
        assert (header.greeting, header.loss_sum, header.tokens) == (7 if shard else 1, 1.5, 11)
        assert payload == b""
        assert shared_bytes == 2 * SEGMENT * len(header.chunks)
        for push, place in header.pushes():
            written = bench.places[shard].memory[push.chunk]
            assert place == 64 * push.chunk
            assert push.hash == hash_payload(written)
            assert written[0] == 2


@pytest.mark.parametrize("what", ["contribution", "step", "greeting"])
def test_places_of_two_kinds_are_not_told_of_together(bench: Bench, what: str) -> None:
    """What is said of one is not true of the other."""
    bench.places[0] = Places()
    bench.links.open.clear()
    bench.encoder.allowed.clear()
    first = bench.begin()
    bench.put(first, 0, 2)
    eventually(bench.encoder.reading.is_set, TIMEOUT_S, "the first chunk to be read")
    second = first if what == "greeting" else contribution(2 if what == "contribution" else 1, 6)
    bench.encoder.allowed.set()
    bench.pusher.settle()
    if what == "greeting":
        bench.places[0] = Places(2)
    bench.pusher.hold(second)
    bench.put(second, 4)
    bench.links.open.set()
    bench.await_told(3)
    assert bench.told == [(0, [0, 2]), (0, [4])]
    headers: list[Any] = [header for _, header, _, _ in bench.links.sent]
    assert [(header.step, header.contribution, header.greeting) for header in headers] == [
        (5, 1, 1),
        (second.step, second.index, bench.places[0].greeting),
    ]


def test_what_is_told_together_fits_a_header(bench: Bench) -> None:
    """The map of a chunk of 16,384 small tensors takes 2 KiB."""
    bench.places[0] = Places()
    runs = tuple(Run(64 * index, 64 * index + 1, index, 0) for index in range(16_384))
    many = [replace(PLAN.chunks[0], index=index, runs=runs) for index in range(100)]
    bench.encoder.presence = bytes(many[0].presence_bytes)
    bench.links.open.clear()
    begun = bench.begin()
    bench.encoder.allowed.clear()
    for chunk in many:
        bench.pusher.put(begun, 2, chunk)
    bench.encoder.allowed.set()
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "a header that is full")
    bench.links.open.set()
    bench.await_told(100)
    assert [index for _, chunks in bench.told for index in chunks] == list(range(100))
    assert len(bench.told[0][1]) > 4


# -- A gradient that is not there any more ------------------------------------------------------


def test_a_gradient_is_not_given_back_while_it_is_read(bench: Bench) -> None:
    begun = bench.begin()
    bench.encoder.allowed.clear()
    bench.put(begun, 0, 1)
    eventually(bench.encoder.reading.is_set, TIMEOUT_S, "the first chunk to be read")
    discarding = threading.Thread(target=bench.pusher.discard, daemon=True)
    discarding.start()
    discarding.join(0.1)
    assert discarding.is_alive()
    assert bench.encoder.discarded == 0
    bench.encoder.allowed.set()
    discarding.join(TIMEOUT_S)
    assert not discarding.is_alive()
    bench.pusher.settle()
    assert bench.encoder.discarded == 1
    # Whichever of the two came next to the lock; what was sent is whole.
    assert bench.told in ([(0, [0])], [(0, [0]), (1, [1])])
    assert bench.pusher.buffered is None
    bench.pusher.discard()
    assert bench.encoder.discarded == 1


def test_what_is_not_there_any_more_is_not_sent(bench: Bench) -> None:
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 1, 2)
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "the first frame")
    bench.pusher.discard()
    bench.links.open.set()
    bench.pusher.settle()
    assert bench.told == [(0, [0])]
    again = bench.begin(step=6)
    bench.put(begun, 3)
    bench.put(again, 4)
    bench.pusher.settle()
    assert bench.told == [(0, [0]), (0, [4])]


def test_weights_prove_only_the_steps_before_them(bench: Bench) -> None:
    """They may arrive late: when a gradient of their own step is there already, it stays."""
    begun = bench.begin(step=5)
    for version in (4, 5):
        bench.pusher.discard(version)
        assert bench.pusher.buffered is begun
    assert bench.encoder.discarded == 0
    bench.pusher.discard(6)
    assert bench.pusher.buffered is None
    assert bench.encoder.discarded == 1


def test_settling_makes_the_gradients_memory_free(bench: Bench) -> None:
    """The next contribution overwrites it: `Encoder` would see that it changes while it is read."""
    for value in range(1, 40):
        begun = bench.begin(index=value)
        bench.put(begun, 0, 1, 2, 3, 4)
        bench.pusher.settle()
        bench.pusher.forget()
        bench.encoder.value = value + 1
    assert [payload[:2] for _, _, payload, _ in bench.links.sent] == [
        np.uint16(2 * value).tobytes() for value in range(1, 40) for _ in range(5)
    ]
    assert bench.encoder.discarded == 0, "it is needed again at once"


def test_settling_does_not_wait_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pusher_module, "SETTLE_S", 0.05)
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 1)
    with pytest.raises(WaitTimeout, match="2 chunks of a gradient"):
        bench.pusher.settle()
    bench.links.open.set()
    eventually(lambda: len(bench.told) == 2, TIMEOUT_S, "both chunks")
    bench.pusher.settle()


def test_nothing_is_put_nothing_is_waited_for(bench: Bench) -> None:
    bench.pusher.settle()
    assert bench.pusher._thread is None


def test_it_is_known_when_a_contribution_was_sent(bench: Bench) -> None:
    begun = bench.begin(index=1)
    bench.put(begun, 0, 1)
    bench.pusher.settle()
    first = bench.pusher.sent_at(5, 1)
    assert first is not None
    assert bench.pusher.sent_at(5, 2) is None
    bench.put(begun, 2)
    bench.pusher.settle()
    last = bench.pusher.sent_at(5, 1)
    assert last is not None
    assert last > first
    bench.put(bench.begin(index=2), 0)
    bench.pusher.settle()
    assert bench.pusher.sent_at(5, 1) == last
    bench.put(bench.begin(step=6), 0)
    bench.pusher.settle()
    assert bench.pusher.sent_at(5, 1) is None, "nothing is kept of the steps of a whole run"


def test_when_the_fence_moves_the_rest_is_dropped(bench: Bench) -> None:
    """The owner may be waiting for it, and has to hear of the fence."""
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 1, 2, 3, 4)
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "the first frame")
    bench.links.fence_moves = True
    bench.links.open.set()
    bench.pusher.settle()
    assert bench.told == [(0, [0])]
    assert bench.encoder.read == [0]


# -- Failures -----------------------------------------------------------------------------------


def fail_in_encode(bench: Bench) -> None:
    bench.encoder.error = ValueError("out of memory")


def fail_in_send(bench: Bench) -> None:
    bench.links.error = ValueError("out of memory")


def fail_in_tell(bench: Bench) -> None:
    """What is left over is told of when there is nothing else to do."""
    bench.places.update({0: Places(), 1: Places()})
    bench.links.open.clear()
    fail_in_send(bench)


@pytest.mark.parametrize("fail", [fail_in_encode, fail_in_send, fail_in_tell])
def test_a_failure_reaches_the_owner_and_the_thread_goes_on(bench: Bench, fail: Callable[[Bench], None]) -> None:
    fail(bench)
    begun = bench.begin()
    bench.put(begun, 0, 1)
    bench.pusher.settle()
    eventually(lambda: len(bench.failures) == 2, TIMEOUT_S, "both failures")
    assert {str(failure) for failure in bench.failures} == {"out of memory"}
    bench.failures.clear()
    bench.encoder.error = bench.links.error = None
    bench.links.open.set()
    bench.put(begun, 2)
    bench.await_told(1)


def test_closing_ends_the_thread_and_sends_no_more(bench: Bench) -> None:
    begun = bench.begin()
    bench.links.open.clear()
    bench.put(begun, 0, 1, 2)
    eventually(bench.links.waiting.is_set, TIMEOUT_S, "the first frame")
    bench.pusher.close()
    bench.pusher.close()
    bench.links.open.set()
    thread = bench.pusher._thread
    assert thread is not None
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert bench.told == [(0, [0])]
