"""The worker's side of push and pull, with a transport that only records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from ps.client import links as links_module
from ps.client.client import Contribution, ParameterClient
from ps.client.links import Inbox, Lost, Received, Said, ShardLinks
from ps.client.shared import Sharing
from ps.sharding import Chunk, make_plan
from ps.types import Fence, ParameterTable, TensorSpec, WireDtype
from ps.wire import frame
from ps.wire.messages import Ack, Weights, Welcome
from tests.support.eventually import eventually

TABLE = ParameterTable((TensorSpec("w", (65_536 * 3,)),))


class _Recording:
    """A transport and its connection."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def connect(self, _address: str, _on_frame: Any, _on_close: Any) -> _Recording:
        return self

    def send(self, frame: bytes, _timeout_s: float) -> bool:
        self.frames.append(frame)
        return True

    def close(self) -> None:
        pass


class _Zeros:
    """A source whose gradient is zero."""

    def __init__(self) -> None:
        self.discarded = 0

    def encode(self, chunk: Chunk, _slots: int, room: np.ndarray) -> bytes:
        room[:] = 0
        return bytes(chunk.presence_bytes)

    def decode(self, _chunk: Chunk, _payload: np.ndarray) -> None:
        pass

    def initial(self, _chunk: Chunk, _room: np.ndarray) -> None:
        pass

    def discard(self) -> None:
        self.discarded += 1

    def forget_initial(self) -> None:
        pass


def opened() -> ParameterClient:
    client = ParameterClient(_Recording(), Inbox(), 0, 7, TABLE, _Zeros())
    digest = make_plan(TABLE, 1).digest
    client.open("run", Fence(1, 1), digest, ["nowhere:1"], 4, 2, WireDtype.FP16)
    return client


def acknowledge(client: ParameterClient, step: int, contribution: int) -> None:
    for chunk in client.plan.chunks:
        client.handle(Received(0, Ack(step, contribution, chunk.index, False), memoryview(b"")))


def kinds(client: ParameterClient) -> list[str]:
    """What has been sent, by kind."""
    recording: Any = client.links._links[0].connection
    return [frame.decode(data)[0]["kind"] for data in recording.frames]


def welcome(client: ParameterClient) -> None:
    client.handle(Received(0, Welcome(0, 9, 1, 1, 5, 5, []), memoryview(b"")))


def test_nothing_is_asked_of_a_shard_that_has_not_answered() -> None:
    """Otherwise everything would be sent twice: at once, and again when the answer comes."""
    client = opened()
    client.begin_step(5)
    client.pull(5, 5)
    client.initialize()
    assert kinds(client) == ["hello"]
    welcome(client)
    assert kinds(client) == ["hello", *["initialize"] * 3, "pull"]


def test_a_shard_that_was_lost_is_asked_again_when_it_answers() -> None:
    client = opened()
    client.begin_step(5)
    welcome(client)
    client.pull(5, 5)
    client.handle(Lost(0, "gone", client.links._links[0].life))
    client.pull(6, 6)
    assert kinds_after_reconnect(client) == ["hello", "pull", "hello"]
    welcome(client)
    assert kinds_after_reconnect(client) == ["hello", "pull", "hello", "pull"]


def kinds_after_reconnect(client: ParameterClient) -> list[str]:
    eventually(lambda: client.links.tick() >= 0 and client.links._links[0].connection, 5.0, "a new connection")
    return kinds(client)


def test_a_contribution_is_complete_when_every_chunk_is_acknowledged() -> None:
    client = opened()
    client.begin_step(5)
    client.push(Contribution(5, 1, 1.0, 0.0, 0))
    assert client.completed == []
    acknowledge(client, 5, 1)
    assert client.completed == [1]


def test_what_was_completed_for_a_step_is_never_told_of_the_next() -> None:
    """The acknowledgements of step 5 and the deal of step 6 may be taken together."""
    client = opened()
    client.begin_step(5)
    client.push(Contribution(5, 1, 1.0, 0.0, 0))
    acknowledge(client, 5, 1)
    client.begin_step(6)
    assert client.completed == []
    acknowledge(client, 5, 1)
    assert client.completed == []


def test_a_gradient_is_held_until_the_first_weights_after_it() -> None:
    """They prove that the step is decided; until then a shard that lost it may ask for it."""
    client = opened()
    source: Any = client.source
    client.begin_step(5)
    welcome(client)
    client.push(Contribution(5, 0, 1.0, 0.0, 0))
    client.pull(6, 6)
    acknowledge(client, 5, 0)
    assert source.discarded == 0
    payload = memoryview(bytes(2 * client.plan.chunks[0].size))
    client.handle(Received(0, Weights(applied=6, chunk=0, dtype="fp16"), payload))
    assert source.discarded == 1
    client.begin_step(6)
    assert source.discarded == 1


class _Full(_Recording):
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
    client = ParameterClient(_Recording(), Inbox(), 0, 7, TABLE, _Zeros(), Sharing.AUTO)
    client.open("run", Fence(1, 1), make_plan(TABLE, 1).digest, ["nowhere:1"], 4, 2, WireDtype.FP16)
    client.begin_step(5)
    client.pull(6, 6)
    late = Weights(applied=6, chunk=0, dtype="fp16", place=64, sequence=2)
    client.handle(Received(0, late, memoryview(b"")))
    assert client.model.version == -1
    asked = kinds(client).count("pull")
    welcome(client)
    assert kinds(client).count("pull") == asked + 1
    size = client.plan.chunks[0].size
    for chunk in client.plan.chunks:
        client.handle(Received(0, Weights(applied=6, chunk=chunk.index, dtype="fp16"), memoryview(bytes(2 * size))))
    assert client.model.version == 6
    client.close()
