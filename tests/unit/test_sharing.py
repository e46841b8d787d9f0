"""Both ends of a stream that shares memory, with a real shard and without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.client.shared import SharedPlaces
from ps.errors import SharedMemoryError
from ps.shard.exchange import Exchange
from ps.sharding import Chunk
from ps.wire import shared_memory
from ps.wire.messages import Ack, Attach, Push, Refused, Weights, Welcome
from tests.support.shards import Rig, drain, encode_frame, make_config, rig

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


class Worker:
    """A worker's stream and what it shares."""

    def __init__(self, shard: Rig) -> None:
        self.shard = shard
        self.stream = Exchange(shard.engine, 1)
        self.greetings = 0
        self.places = self.make_places()

    def make_places(self) -> SharedPlaces:
        shard = self.shard
        self.greetings += 1
        return SharedPlaces(shard.engine.plan, 0, shard.dtype, shard.contributions, self.greetings)

    def send(self, header: Any, payload: Any = b"") -> list[Any]:
        self.stream.receive(encode_frame(header, payload))
        return [answer for answer, _ in drain(self.stream)]

    def greet(self) -> Welcome:
        (welcome,) = self.send(replace(self.shard.hello(), **self.places.offer()))
        assert isinstance(welcome, Welcome)
        return welcome

    def begin(self) -> None:
        nonce = self.places.welcomed(self.greet())
        assert nonce
        assert self.send(Attach(**self.shard.who(), nonce=nonce)) == []

    def push(self, contribution: int, chunk: Chunk, **changes: Any) -> Any:
        """Write a chunk into its place and tell the shard."""
        header, payload = self.shard.push(contribution, chunk)
        room = self.places.room(header.step, contribution, chunk)
        assert room is not None
        place, array = room
        array[:] = np.frombuffer(payload, array.dtype)
        (answer,) = self.send(
            replace(
                header, **{"place": place, "place_bytes": array.nbytes, "greeting": self.places.greeting, **changes}
            )
        )
        return answer

    def pull(self) -> list[tuple[Weights, memoryview]]:
        self.stream.receive(encode_frame(self.shard.pull(self.shard.state.version)))
        return [(header, payload) for header, payload in drain(self.stream) if isinstance(header, Weights)]


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Rig]:
    with rig(make_config(tmp_path)) as made:
        made.run_step()
        yield made


@pytest.fixture
def worker(shard: Rig) -> Iterator[Worker]:
    made = Worker(shard)
    made.begin()
    yield made
    made.places.close()
    made.stream.close()


def read(worker: Worker, header: Weights) -> np.ndarray:
    chunk = worker.shard.engine.plan.chunks[header.chunk]
    dtype = worker.shard.dtype
    return np.frombuffer(worker.places.payload(header, chunk.size * dtype.itemsize), dtype.numpy)


def test_gradients_are_reduced_from_where_the_worker_wrote_them(shard: Rig, worker: Worker) -> None:
    plain = [shard.expected_mean(chunk) for chunk in shard.chunks]
    for contribution in range(2):
        for chunk in shard.chunks:
            assert worker.push(contribution, chunk) == Ack(1, contribution, chunk.index, False)
    shard.told.next_prepared()
    for chunk, mean in zip(shard.chunks, plain, strict=True):
        np.testing.assert_array_equal(shard.engine.store.mean(chunk), mean)


def test_what_is_held_is_a_view_of_the_workers_memory(shard: Rig, worker: Worker) -> None:
    worker.push(0, shard.chunks[0])
    held = shard.engine.protocol.reduction(0)._waiting[0].gradient
    header, _ = shard.push(0, shard.chunks[0])
    assert header.contribution == 0
    start = held.__array_interface__["data"][0]
    worker.places.close()
    worker.stream.close()
    assert held.__array_interface__["data"][0] == start
    np.testing.assert_array_equal(held, shard.gradient(1, 0, shard.chunks[0]))


def test_published_weights_are_read_where_the_shard_writes_them(shard: Rig, worker: Worker) -> None:
    first = worker.pull()
    assert all(header.place == -1 for header, _ in first), "they were published before anybody shared"
    shard.run_step()
    second = worker.pull()
    assert [header.chunk for header, _ in second] == [chunk.index for chunk in shard.chunks]
    frames = Exchange(shard.engine, 2)
    frames.receive(encode_frame(shard.pull(shard.state.version)))
    for (header, payload), (plain, expected) in zip(second, drain(frames), strict=True):
        assert isinstance(plain, Weights)
        assert plain.place == -1
        assert header.place >= 0
        assert not payload
        assert read(worker, header).tobytes() == bytes(expected)
        assert worker.places.intact(header)


def test_weights_that_are_written_while_they_are_read_are_noticed(shard: Rig, worker: Worker) -> None:
    shard.run_step()
    (header, _), *_ = worker.pull()
    assert worker.places.intact(header)
    shard.run_step()
    assert not worker.places.intact(header)
    chunk = shard.chunks[0]
    draft = shard.engine.store.publication.draft(chunk, 9)
    half = replace(header, sequence=int(shard.engine.store.publication._sequences[0]))
    assert half.sequence % 2 == 1, "odd while it is written"
    shard.engine.store.publication.publish(chunk, draft, 9)
    assert not worker.places.intact(half)


def test_frames_are_not_made_of_a_chunk_that_is_being_written(shard: Rig, worker: Worker) -> None:
    del worker
    shard.run_step()
    stream = Exchange(shard.engine, 2)
    shard.engine.store.retract(shard.chunks[0])
    stream.receive(encode_frame(shard.pull(shard.state.version)))
    assert drain(stream) == []


def test_a_place_is_written_once_per_step(shard: Rig, worker: Worker) -> None:
    chunk = shard.chunks[0]
    worker.push(0, chunk)
    assert worker.places.room(1, 0, chunk) is None, "the shard may be reading it"
    assert worker.places.room(1, 0, shard.chunks[1]) is not None
    other = worker.places.room(1, 1, chunk)
    again = worker.places.room(2, 1, chunk)
    assert other is not None
    assert again is not None
    assert again[0] == 0
    assert other[0] > 0, "the second contribution of a step has places of its own"


def test_a_greeting_brings_new_places_and_leaves_what_is_held_alone(shard: Rig, worker: Worker) -> None:
    """After a new fence the same worker may compute another contribution first."""
    for chunk in shard.chunks:
        worker.push(0, chunk)
    worker.places.close()
    worker.places = worker.make_places()
    worker.begin()
    for chunk in shard.chunks:
        worker.push(1, chunk)
    shard.told.next_prepared()
    for chunk in shard.chunks:
        np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))


def test_the_answer_to_an_earlier_greeting_changes_nothing(shard: Rig, worker: Worker) -> None:
    early, late = worker.make_places(), worker.make_places()
    worker.places = early
    first = worker.greet()
    worker.places = late
    second = worker.greet()
    assert late.welcomed(first) is None
    assert not late.ready
    nonce = late.welcomed(second)
    assert nonce
    assert worker.send(Attach(**shard.who(), nonce=nonce)) == []
    worker.push(0, shard.chunks[0])
    early.close()


BAD_PLACES: dict[str, dict[str, Any]] = {
    "behind the end": {"place": 1 << 40},
    "partly behind the end": {"place_bytes": 1 << 40},
    "not aligned": {"place": 2},
}


@pytest.mark.parametrize("changes", BAD_PLACES.values(), ids=BAD_PLACES)
def test_a_place_that_is_none_is_refused(shard: Rig, worker: Worker, changes: dict[str, Any]) -> None:
    answer = worker.push(0, shard.chunks[0], **changes)
    assert isinstance(answer, Refused)
    assert answer.code == "MALFORMED_FRAME"
    assert shard.engine.protocol.held() == []


def test_a_place_of_a_wrong_length_is_refused(shard: Rig, worker: Worker) -> None:
    answer = worker.push(0, shard.chunks[0], place_bytes=64)
    assert isinstance(answer, Refused)
    assert answer.code == "WRONG_LENGTH"


def test_only_who_can_read_the_nonce_may_use_places(shard: Rig) -> None:
    worker = Worker(shard)
    header, _ = shard.push(0, shard.chunks[0])
    placed = replace(header, place=0, place_bytes=64, greeting=1)
    (refused,) = worker.send(placed)
    assert refused.code == "STALE_PLACE"
    welcome = worker.greet()
    assert welcome.nonce
    (refused,) = worker.send(Attach(**shard.who(), nonce=bytes(16)))
    assert refused.code == "MALFORMED_FRAME"
    (refused,) = worker.send(placed)
    assert refused.code == "STALE_PLACE"
    worker.places.close()
    worker.stream.close()


def fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_available", lambda: 4096)


def test_without_room_there_are_frames(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_memory(monkeypatch)
    worker = Worker(shard)
    welcome = worker.greet()
    assert welcome.shared == ""
    with pytest.raises(SharedMemoryError, match="has not attached"):
        worker.places.welcomed(welcome)
    assert worker.places.room(1, 0, shard.chunks[0]) is None
    assert worker.send(*shard.push(0, shard.chunks[0])) == [Ack(1, 0, 0, False)]
    assert isinstance(worker.pull()[0][0], Weights)


def test_a_worker_that_runs_out_of_room_goes_on_with_frames(
    shard: Rig, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_memory(monkeypatch)
    assert worker.places.room(1, 0, shard.chunks[0]) is None
    assert worker.send(*shard.push(0, shard.chunks[0])) == [Ack(1, 0, 0, False)]


def test_a_push_keeps_its_place_out_of_the_key(shard: Rig, worker: Worker) -> None:
    """The same chunk again, as a frame: a duplicate, whatever way it came."""
    worker.push(0, shard.chunks[0])
    header, payload = shard.push(0, shard.chunks[0])
    assert isinstance(header, Push)
    assert worker.send(header, payload) == [Ack(1, 0, 0, True)]


def test_a_place_of_an_earlier_greeting_is_not_one_of_this(shard: Rig, worker: Worker) -> None:
    """A frame that was late would name memory that holds something else now."""
    worker.places = worker.make_places()
    worker.begin()
    refused = worker.push(0, shard.chunks[0], greeting=1)
    assert isinstance(refused, Refused)
    assert refused.code == "STALE_PLACE"
    assert shard.engine.protocol.held() == []
