"""A worker's client whose only shard is the test's voice: what is sent is kept, what it hears is said."""

from __future__ import annotations

from typing import Any

import numpy as np

from ps.client.client import ParameterClient
from ps.client.links import Inbox, Said
from ps.client.pusher import Contribution, Encoded
from ps.client.shared import Sharing
from ps.kernels.digest import hash_payload
from ps.sharding import Chunk, make_plan
from ps.types import Fence, ParameterTable, TensorSpec, WireDtype
from ps.wire import frame
from ps.wire.messages import Ack, Header, Weights, Welcome

#: Three chunks.
TABLE = ParameterTable((TensorSpec("w", (65_536 * 3,)),))
SLOTS, CONTRIBUTIONS = 4, 2


class Recording:
    """A transport and its connection; what the shard says comes in as from the stream's thread."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.say: Any = None
        self.lose: Any = None

    def connect(self, _address: str, on_frame: Any, on_close: Any) -> Recording:
        self.say, self.lose = on_frame, on_close
        return self

    def send(self, frame: bytes, _timeout_s: float) -> bool:
        self.frames.append(frame)
        return True

    @property
    def has_room(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Zeros:
    """A source whose gradient is zero."""

    def __init__(self) -> None:
        self.discarded = 0

    def encode(self, chunk: Chunk, _slots: int, room: np.ndarray) -> Encoded:
        room[:] = 0
        return Encoded(hash_payload(room), bytes(chunk.presence_bytes))

    def decode(self, _chunk: Chunk, _payload: np.ndarray) -> None:
        pass

    def initial(self, _chunk: Chunk, _room: np.ndarray) -> None:
        pass

    def discard(self) -> None:
        self.discarded += 1

    def forget_initial(self) -> None:
        pass


class Client:
    """A client, and the voice of its only shard."""

    def __init__(self, sharing: Sharing = Sharing.NEVER) -> None:
        self.stream, self.source, self.inbox = Recording(), Zeros(), Inbox()
        self.parameters = ParameterClient(self.stream, self.inbox, 0, 7, TABLE, self.source, sharing)

    def open(self) -> None:
        """The coordinator has told of the fence, and dealt step 5."""
        digest = make_plan(TABLE, 1).digest
        self.parameters.open("run", Fence(1, 1), digest, ["nowhere:1"], SLOTS, CONTRIBUTIONS, WireDtype.FP16)
        self.parameters.begin_step(5)

    def say(self, header: Header, payload: Any = b"") -> None:
        """The shard says something, and the owner takes it."""
        self.stream.say(frame.encode(header.pack(), payload))
        self.take()

    def take(self) -> list[Any]:
        """The owner takes what there is."""
        events = []
        while (event := self.inbox.get(0.0)) is not None:
            events.append(event)
            assert not isinstance(event, Said)
            self.parameters.handle(event)
        return events

    def welcome(self, step: int = 5, held: list[list[Any]] | None = None) -> None:
        self.say(Welcome(0, 9, 1, 1, step, step, held or []))

    def acknowledge(self, step: int, contribution: int) -> None:
        self.say(Ack(step, contribution, -1))

    def bring(self, applied: int, *chunks: int) -> None:
        for chunk in chunks:
            size = self.parameters.plan.chunks[chunk].size
            self.say(Weights(applied, chunk, "fp16"), memoryview(bytes(2 * size)))

    def push(self, step: int, contribution: int) -> Contribution:
        pushed = Contribution(step, contribution, 1.0, lambda: (0.0, 0))
        self.parameters.begin_push(pushed)
        self.parameters.push(pushed)
        self.parameters._pusher.settle()
        return pushed

    @property
    def kinds(self) -> list[str]:
        """What has been sent, by kind."""
        return [frame.decode(data)[0]["kind"] for data in self.stream.frames]

    @property
    def pushed(self) -> list[tuple[int, int]]:
        """(contribution, chunk) of what has been pushed."""
        headers = [frame.decode(data)[0] for data in self.stream.frames]
        return [(header["contribution"], header["chunk"]) for header in headers if header["kind"] == "push"]
