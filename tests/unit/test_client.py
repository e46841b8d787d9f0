"""The worker's side of push and pull, with a transport that only records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from ps.client import links as links_module
from ps.client.links import Arrived, Failed, Inbox, Said, ShardLinks
from ps.client.pusher import Contribution
from ps.client.shared import Sharing
from ps.errors import MalformedFrame
from ps.sharding import Chunk
from ps.types import Fence
from ps.wire import frame
from ps.wire.messages import Placed, Refused, Weights, Welcome
from ps.wire.shared_memory import Segment
from tests.support.eventually import eventually
from tests.support.voice import Client, Recording


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    made.open()
    yield made
    made.parameters.close()


def test_nothing_is_asked_of_a_shard_that_has_not_answered(client: Client) -> None:
    """Otherwise everything would be sent twice: at once, and again when the answer comes."""
    client.parameters.pull(5, 5)
    client.parameters.initialize()
    assert client.kinds == ["hello"]
    client.welcome()
    assert client.kinds == ["hello", *["initialize"] * 3, "pull"]


def test_a_shard_that_was_lost_is_asked_again_when_it_answers(client: Client) -> None:
    client.welcome()
    client.parameters.pull(5, 5)
    client.stream.lose("gone")
    client.take()
    client.parameters.pull(6, 6)
    links = client.parameters.links
    eventually(lambda: links.tick() >= 0 and links._links[0].connection, 5.0, "a new connection")
    assert client.kinds == ["hello", "pull", "hello"]
    client.welcome()
    assert client.kinds == ["hello", "pull", "hello", "pull"]


def test_a_contribution_is_complete_when_its_shards_have_acknowledged_it(client: Client) -> None:
    client.push(5, 1)
    assert client.pushed == [(1, 0), (1, 1), (1, 2)]
    assert client.parameters.completed == []
    client.acknowledge(5, 0)
    client.acknowledge(4, 1)
    assert client.parameters.completed == []
    client.acknowledge(5, 1)
    client.acknowledge(5, 1)
    assert client.parameters.completed == [1]


def test_what_was_completed_for_a_step_is_never_told_of_the_next(client: Client) -> None:
    """The acknowledgements of step 5 and the deal of step 6 may be taken together."""
    client.push(5, 1)
    client.acknowledge(5, 1)
    client.parameters.begin_step(6)
    assert client.parameters.completed == []
    client.acknowledge(5, 1)
    assert client.parameters.completed == []


def test_a_chunk_is_pushed_once_however_often_it_is_ready(client: Client) -> None:
    chunks = client.parameters.plan.chunks
    begun = Contribution(5, 1, 1.0, lambda: (0.0, 0))
    client.parameters.begin_push(begun)
    client.parameters.push_chunk(begun, chunks[2])
    client.parameters.push_chunk(begun, chunks[2])
    client.parameters.push(begun)
    client.parameters.push(begun)
    client.parameters._pusher.settle()
    assert client.pushed == [(1, 2), (1, 0), (1, 1)]


def test_what_a_shard_lost_is_pushed_again_while_the_gradient_is_there(client: Client) -> None:
    client.push(5, 1)
    client.welcome(held=[[1, b"\x05"]])
    client.parameters._pusher.settle()
    assert client.pushed[3:] == [(1, 1)]
    client.parameters.forget_gradient()
    client.welcome(held=[[1, b"\x05"]])
    assert client.pushed[4:] == []
    assert client.parameters.recompute == {1}
    # Only what is missing goes again.
    client.push(5, 1)
    assert client.pushed[4:] == [(1, 1)]
    assert client.parameters.recompute == set()
    client.acknowledge(5, 1)
    assert client.parameters.completed == [1]


def test_a_chunk_that_is_not_ready_is_not_pushed_again(client: Client) -> None:
    """The shard lacks it as well; it will come with the rest."""
    begun = Contribution(5, 1, 1.0, lambda: (0.0, 0))
    client.parameters.begin_push(begun)
    client.parameters.push_chunk(begun, client.parameters.plan.chunks[2])
    client.welcome()
    client.parameters._pusher.settle()
    assert client.pushed == [(1, 2), (1, 2)]


def test_a_gradient_is_held_until_the_first_weights_after_it(client: Client) -> None:
    """They prove that the step is decided; until then a shard that lost it may ask for it."""
    client.welcome()
    client.push(5, 0)
    client.parameters.pull(6, 6)
    client.acknowledge(5, 0)
    assert client.source.discarded == 0
    client.bring(6, 0)
    assert client.source.discarded == 1
    client.parameters.begin_step(6)
    assert client.source.discarded == 1


def test_where_steps_are_eager_a_gradient_is_held_until_the_next_deal() -> None:
    """Weights prove no decision: other chunks of it may still be on their way, to a shard that may die."""
    client = Client()
    client.open()
    client.parameters.pulled.eager = True
    client.welcome()
    client.push(5, 0)
    client.parameters.pull(6, 6)
    client.bring(6, 0, 1)
    assert client.source.discarded == 0
    client.bring(6, 2)
    assert client.source.discarded == 0
    client.parameters.begin_step(6)
    assert client.source.discarded == 1
    client.parameters.close()


def test_a_gradient_that_is_decided_before_all_of_it_is_pushed_is_not_pushed_any_more(client: Client) -> None:
    """It was dealt twice, and the other worker was faster; what is in its memory now is nobody's gradient."""
    client.welcome()
    begun = Contribution(5, 0, 1.0, lambda: (0.0, 0))
    client.parameters.begin_push(begun)
    client.parameters.push_chunk(begun, client.parameters.plan.chunks[2])
    client.parameters._pusher.settle()
    client.parameters.pull(6, 6)
    client.bring(6, 0)
    client.parameters.push(begun)
    client.parameters._pusher.settle()
    assert client.pushed == [(0, 2)]


def test_weights_wake_the_owner(client: Client) -> None:
    client.parameters.pull(6, 6)
    client.welcome()
    size = client.parameters.plan.chunks[0].size
    events = []
    for chunk in range(3):
        client.stream.say(frame.encode(Weights(6, chunk, "fp16").pack(), bytes(2 * size)))
        events.append([type(event) for event in client.take()])
    # The first, by which a forward may begin, and the last.
    assert events == [[Arrived], [], [Arrived]]


def test_a_failure_of_a_streams_thread_is_raised_in_the_owners(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_chunk: Chunk, _payload: np.ndarray) -> None:
        raise ValueError("no such device")

    monkeypatch.setattr(client.source, "decode", fail)
    client.parameters.pull(6, 6)
    with pytest.raises(ValueError, match="no such device"):
        client.bring(6, 0)


def test_a_failure_of_the_pusher_is_raised_in_the_owners_thread(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_chunk: Chunk, _slots: int, _room: np.ndarray) -> bytes:
        raise ValueError("no such device")

    monkeypatch.setattr(client.source, "encode", fail)
    client.push(5, 0)
    event = client.inbox.get(1.0)
    assert isinstance(event, Failed)
    with pytest.raises(ValueError, match="no such device"):
        client.parameters.handle(event)


def test_weights_of_a_chunk_that_is_not_the_shards_are_an_error(client: Client) -> None:
    client.parameters.pull(6, 6)
    with pytest.raises(MalformedFrame, match="chunk 3, which is not its own"):
        client.say(Weights(6, 3, "fp16"))


@pytest.mark.parametrize("num_bytes", [0, 7, 8])
def test_weights_of_another_length_are_an_error(client: Client, num_bytes: int) -> None:
    client.parameters.pull(6, 6)
    with pytest.raises(MalformedFrame, match=f"sent {num_bytes} bytes of weights for chunk 0 of "):
        client.say(Weights(6, 0, "fp16"), memoryview(bytes(num_bytes)))


def test_a_pull_that_is_gone_is_forgotten_and_no_other(client: Client) -> None:
    client.welcome()
    client.parameters.pull(6, 6)
    client.parameters.pull(7, 7)
    client.say(Refused("VERSION_GONE", "version 6 is no longer published", 6, -1, -1))
    assert client.parameters.pulled.comes(7)
    client.say(Refused("VERSION_GONE", "version 7 is no longer published", 7, -1, -1))
    assert not client.parameters.pulled.comes(7)


class _Full(Recording):
    """A shard that hangs: there is never room."""

    def send(self, frame: bytes, _timeout_s: float) -> bool:
        super().send(frame, _timeout_s)
        return False


def test_a_push_to_a_shard_that_hangs_ends_when_the_fence_moves() -> None:
    inbox = Inbox()
    links = ShardLinks(_Full(), inbox, 0, 7)
    inbox.put(Said(pb.SessionResponse(deal=pb.Deal(step=5))))
    inbox.put(Said(pb.SessionResponse(cluster=pb.Cluster(step=5))))
    links.open("run", "plan", Fence(1, 1), ["nowhere:1"])
    assert inbox.fence_moves
    assert inbox.get(0.0) is not None
    assert inbox.fence_moves, "only the deal was taken"
    assert inbox.get(0.0) is not None
    assert not inbox.fence_moves


def test_a_shard_that_takes_nothing_for_long_is_greeted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else serves in its place, so no fence will ever come."""
    monkeypatch.setattr(links_module, "STALL_S", 0.05)
    closed: list[bool] = []
    full = _Full()
    monkeypatch.setattr(full, "close", lambda: closed.append(True))
    ShardLinks(full, Inbox(), 0, 7).open("run", "plan", Fence(1, 1), ["nowhere:1"])
    assert closed == [True]


def test_weights_in_memory_of_an_earlier_greeting_are_asked_for_again() -> None:
    """They were on their way when the worker greeted the shard anew, and name what it no longer maps."""
    client = Client(Sharing.AUTO)
    client.open()
    client.parameters.pull(6, 6)
    client.say(Placed(6, "fp16", [[0, 64, 0, 2]]))
    assert client.parameters.model.version == -1
    asked = client.kinds.count("pull")
    client.welcome()
    assert client.parameters.transport == "grpc"
    assert client.kinds.count("pull") == asked + 1
    client.bring(6, 0, 1, 2)
    assert client.parameters.model.version == 6
    client.parameters.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_place_is_not_told_of_before_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard would refuse it, and nobody would send it again. The pusher runs beside the owner."""
    client = Client(Sharing.AUTO)
    client.open()
    places: Any = client.parameters._places[0]
    chunk = client.parameters.plan.chunks[0]
    rooms: list[Any] = []
    send = ShardLinks.send

    def looking(self: ShardLinks, shard: int, encoded: bytes, shared_bytes: int = 0) -> None:
        if frame.decode(encoded)[0]["kind"] == "attach":
            rooms.append(places.room(5, 0, chunk))
        send(self, shard, encoded, shared_bytes)

    monkeypatch.setattr(ShardLinks, "send", looking)
    segment = Segment.create(1024)
    nonce = places._gradients.nonce
    client.say(Welcome(0, 9, 1, 1, 5, 5, [], nonce=nonce, shared=segment.name, shared_bytes=1024, greeting=1))
    assert "attach" in client.kinds
    assert rooms == [None]
    assert places.room(5, 0, chunk) is not None
    assert client.parameters.transport == "shm"
    client.parameters.close()


def test_who_is_asked_to_go_while_it_takes_in_a_fence_goes() -> None:
    """A worker says so to itself in the handler of the signal, on the thread that reads its inbox."""
    inbox = Inbox()
    ended = Said(pb.SessionResponse(end=pb.End(ok=True, reason="asked to stop")))

    class Interrupted:
        """The inbox's lock; the signal comes while it is held."""

        def __init__(self, lock: Any) -> None:
            self._lock = lock

        def __enter__(self) -> None:
            self._lock.__enter__()
            inbox._lock = self._lock
            inbox.put(ended)

        def __exit__(self, *error: Any) -> None:
            self._lock.__exit__(*error)

    inbox.put(Said(pb.SessionResponse(cluster=pb.Cluster())))
    inbox._lock = Interrupted(inbox._lock)  # type: ignore[assignment]
    assert inbox.get(0.0) is not None
    assert inbox.get(0.0) is ended
