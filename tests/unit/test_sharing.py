"""Both ends of a stream that shares memory, with a real shard and without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.client.shared import Published, SharedPlaces
from ps.errors import SharedMemoryError
from ps.shard import exchange
from ps.shard.exchange import Exchange
from ps.sharding import Chunk
from ps.wire import shared_memory
from ps.wire.messages import Ack, Attach, Placed, Push, PushPlaced, Refused, Unchanged, Weights, Welcome
from tests.support.eager import eager_config, foregone_of
from tests.support.plans import table_of_chunks
from tests.support.shards import Reader, Rig, drain, encode_frame, make_config, rig

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
        self.places.begin()

    def write(self, contribution: int, *chunks: Chunk, **changes: Any) -> PushPlaced:
        """Write chunks into their places; returns what tells the shard of them, with some fields changed."""
        rows = []
        for chunk in chunks:
            header, payload = self.shard.push(contribution, chunk)
            room = self.places.room(header.step, contribution, chunk)
            assert room is not None
            place, array = room
            array[:] = np.frombuffer(payload, array.dtype)
            rows.append([chunk.index, place, header.hash, header.present])
        return placed(header, rows, **{"greeting": self.places.greeting, **changes})

    def push(self, contribution: int, *chunks: Chunk, **changes: Any) -> list[Any]:
        """Write chunks into their places and tell the shard; returns its answers."""
        return self.send(self.write(contribution, *chunks, **changes))

    def pull(self) -> list[tuple[Weights | Placed, memoryview]]:
        self.stream.receive(encode_frame(self.shard.pull(self.shard.state.version)))
        return [(header, payload) for header, payload in drain(self.stream) if isinstance(header, Weights | Placed)]

    def pull_placed(self) -> dict[int, list[int]]:
        """Pull; returns where each chunk is."""
        ((header, payload),) = self.pull()
        assert isinstance(header, Placed)
        assert not payload
        assert (header.applied, header.dtype) == (self.shard.state.applied, str(self.shard.dtype))
        return {chunk: where for chunk, *where in header.chunks}


def placed(header: Push, rows: list[list[Any]], **changes: Any) -> PushPlaced:
    """What tells of places of a contribution, of which a push of any chunk is given."""
    fields = {name: value for name, value in vars(header).items() if name not in ("chunk", "hash", "present")}
    return PushPlaced(**{"greeting": 1, **fields, "chunks": rows, **changes})


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


def published(worker: Worker, chunk: int, where: list[int]) -> Published:
    found = worker.places.published(worker.shard.engine.plan.chunks[chunk], *where)
    assert found is not None
    return found


def test_gradients_are_reduced_from_where_the_worker_wrote_them(shard: Rig, worker: Worker) -> None:
    plain = [shard.expected_mean(chunk) for chunk in shard.chunks]
    first, second = shard.chunks
    assert worker.push(0, first, second) == [Ack(1, 0, -1)], "of several places that were told of together"
    assert worker.push(1, second) == []
    assert worker.push(1, first) == [Ack(1, 1, -1)]
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
    assert all(isinstance(header, Weights) for header, _ in first), "they were published before anybody shared"
    shard.run_step()
    second = worker.pull_placed()
    assert list(second) == [chunk.index for chunk in shard.chunks]
    frames = Exchange(shard.engine, 2)
    frames.receive(encode_frame(shard.pull(shard.state.version)))
    for (chunk, where), (plain, expected) in zip(second.items(), drain(frames), strict=True):
        assert isinstance(plain, Weights)
        assert plain.chunk == chunk
        found = published(worker, chunk, where)
        assert found.weights.tobytes() == bytes(expected)
        assert found.intact


def test_chunks_are_told_of_as_they_are_published(shard: Rig, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame holds so many places; what is not published yet comes in the next."""
    shard.run_step()
    monkeypatch.setattr(exchange, "MAX_PLACES", 1)
    told = [header.chunks for header, _ in worker.pull() if isinstance(header, Placed)]
    assert [[chunk for chunk, *_ in chunks] for chunks in told] == [[0], [1]]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("chunks", [1, exchange.TOGETHER, exchange.TOGETHER + 1, 11])
def test_no_stream_sleeps_through_the_end_of_a_step(tmp_path: Path, eager: bool, chunks: int) -> None:
    """Whoever shares is woken for several chunks at once, however many the last ones are; frames come one by one."""
    config = eager_config(tmp_path, threads=2) if eager else make_config(tmp_path, threads=2)
    with rig(config, table=table_of_chunks(chunks)) as shard:
        worker, frames = Worker(shard), Exchange(shard.engine, 2)
        worker.begin()
        readers = [Reader(worker.stream), Reader(frames)]
        for skip in (False, True, False, False):
            held = shard.state.applied
            for reader in readers:
                reader.exchange.receive(encode_frame(shard.pull(shard.state.version + 1, held)))
            if eager:
                shard.engine.foresee(foregone_of(shard))
            report = shard.push_step()
            if skip and not eager:
                shard.skip_step()
                assert all(isinstance(reader.next()[0], Unchanged) for reader in readers)
                continue
            if not eager:
                shard.tell(shard.decision(report))
            for reader in readers:
                assert sorted(pulled_by(reader, chunks)) == list(range(chunks)), "none waits for the step to be closed"
            if eager:
                shard.tell(shard.decision(report))
        for reader in readers:
            reader.close()
        assert shard.engine.waiting == {}
        worker.places.close()


def pulled_by(reader: Reader, count: int) -> list[int]:
    """So many chunks that a stream brings, as they come."""
    came: list[int] = []
    while len(came) < count:
        header, _ = reader.next()
        assert isinstance(header, Weights | Placed)
        came += [header.chunk] if isinstance(header, Weights) else [chunk for chunk, *_ in header.chunks]
    return came


def test_weights_that_are_written_while_they_are_read_are_noticed(shard: Rig, worker: Worker) -> None:
    shard.run_step()
    where = worker.pull_placed()[0]
    assert published(worker, 0, where).intact
    shard.run_step()
    assert not published(worker, 0, where).intact
    publication, chunk = shard.engine.store.publication, shard.chunks[0]
    draft = publication.draft(chunk, 9)
    place, slot, _ = where
    half = [place, slot, int(publication._sequences[slot])]
    assert half[-1] % 2 == 1, "odd while it is written"
    publication.publish(draft, 9)
    assert not published(worker, 0, half).intact


def test_frames_are_not_made_of_a_chunk_that_is_being_written(shard: Rig, worker: Worker) -> None:
    del worker
    shard.run_step()
    stream = Exchange(shard.engine, 2)
    shard.engine.store.retract(shard.chunks[0])
    stream.receive(encode_frame(shard.pull(shard.state.version)))
    headers = [header for header, _ in drain(stream)]
    assert [header.chunk for header in headers if isinstance(header, Weights)] == [1]


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
    late.begin()
    assert late.ready
    worker.push(0, shard.chunks[0])
    early.close()


def test_that_an_earlier_greeting_came_too_late_says_nothing_about_this_one(shard: Rig, worker: Worker) -> None:
    """A shard that is busy reads it when the worker has greeted again, and let go of what it offered first."""
    early, late = worker.make_places(), worker.make_places()
    worker.places = early
    offered = early.offer()
    early.close()
    (first,) = worker.send(replace(shard.hello(), **offered))
    assert first.shared == ""
    assert late.welcomed(first) is None
    worker.places = late
    worker.begin()
    assert late.ready


@pytest.mark.parametrize("place", [1 << 40, 64 * 1000, 2], ids=["behind the end", "partly", "not aligned"])
def test_a_place_that_is_none_is_refused(shard: Rig, worker: Worker, place: int) -> None:
    if place == 64 * 1000:
        gradients = worker.places._gradients
        assert gradients is not None
        place = gradients.size - 64
    told = worker.write(0, shard.chunks[0])
    told.chunks[0][1] = place
    (answer,) = worker.send(told)
    assert isinstance(answer, Refused)
    assert answer.code == "MALFORMED_FRAME"
    assert shard.engine.protocol.held() == []


def test_of_several_places_those_before_a_wrong_one_are_held(shard: Rig, worker: Worker) -> None:
    """And the worker hears of the wrong one."""
    told = worker.write(0, *shard.chunks)
    told.chunks[1][0] = 99
    (answer,) = worker.send(told)
    assert (answer.code, answer.contribution) == ("UNKNOWN_CHUNK", 0)
    assert shard.engine.protocol.held() == [(0, [0])]


def test_only_who_can_read_the_nonce_may_use_places(shard: Rig) -> None:
    worker = Worker(shard)
    header, _ = shard.push(0, shard.chunks[0])
    told = placed(header, [[0, 0, header.hash, header.present]])
    (refused,) = worker.send(told)
    assert refused.code == "STALE_PLACE"
    welcome = worker.greet()
    assert welcome.nonce
    (refused,) = worker.send(Attach(**shard.who(), nonce=bytes(16)))
    assert refused.code == "MALFORMED_FRAME"
    (refused,) = worker.send(told)
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
    assert [worker.send(*shard.push(0, chunk)) for chunk in shard.chunks] == [[], [Ack(1, 0, -1)]]
    assert isinstance(worker.pull()[0][0], Weights)


def test_a_worker_that_runs_out_of_room_goes_on_with_frames(
    shard: Rig, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_memory(monkeypatch)
    assert worker.places.room(1, 0, shard.chunks[0]) is None
    assert [worker.send(*shard.push(0, chunk)) for chunk in shard.chunks] == [[], [Ack(1, 0, -1)]]


def test_a_push_keeps_its_place_out_of_the_key(shard: Rig, worker: Worker) -> None:
    """The same chunk again, as a frame: a duplicate, whatever way it came."""
    worker.push(0, *shard.chunks)
    assert [worker.send(*shard.push(0, chunk)) for chunk in shard.chunks] == [[Ack(1, 0, -1)]] * 2
    assert shard.engine.protocol.held() == [(0, [0, 1])]


def test_a_place_of_an_earlier_greeting_is_not_one_of_this(shard: Rig, worker: Worker) -> None:
    """A frame that was late would name memory that holds something else now."""
    worker.places = worker.make_places()
    worker.begin()
    (refused,) = worker.push(0, shard.chunks[0], greeting=1)
    assert isinstance(refused, Refused)
    assert refused.code == "STALE_PLACE"
    assert shard.engine.protocol.held() == []
