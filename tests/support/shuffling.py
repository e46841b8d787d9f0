"""A transport that a worker's pushes take detours on: out of order, late, and some of them twice.

What tells of several places in shared memory is one push for each.
"""

from __future__ import annotations

import random
import threading
from typing import Any

from ps.client.grpc_transport import GrpcTransport
from ps.client.transport import Connection, OnClose, OnFrame
from ps.wire import frame

#: A push is held back at most so long.
_HOLD_S = 0.03
#: So many are held back at most.
_HELD = 8


class ShufflingTransport:
    """Wraps gRPC. What is not a push goes at once, and so overtakes pushes.

    Args:
        seed: of the order and of the choice of those that are sent twice.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        #: How many pushes were overtaken by a later one, and how many were sent twice.
        self.overtaken = 0
        self.repeated = 0
        #: Payloads by (step, contribution, chunk).
        self.pushed: dict[tuple[int, int, int], bytes] = {}

    def connect(self, address: str, on_frame: OnFrame, on_close: OnClose) -> Connection:
        return _Shuffling(self, GrpcTransport().connect(address, on_frame, on_close))


class _Shuffling:
    """One connection; a thread of its own sends what is held back."""

    def __init__(self, transport: ShufflingTransport, inner: Connection) -> None:
        self._transport = transport
        self._inner = inner
        self._changed = threading.Condition()
        self._held: list[bytes] = []
        self._closed = False
        threading.Thread(target=self._send, name="shuffle", daemon=True).start()

    def send(self, data: bytes, timeout_s: float) -> bool:
        fields: dict[str, Any]
        fields, payload = frame.decode(data)
        if fields["kind"] not in ("push", "push_placed"):
            return self._inner.send(data, timeout_s)
        if fields["kind"] == "push":
            self._transport.pushed[fields["step"], fields["contribution"], fields["chunk"]] = bytes(payload)
            pushes = [data]
        else:
            pushes = [frame.encode({**fields, "chunks": [row]}) for row in fields["chunks"]]
        with self._changed:
            self._held += pushes
            self._changed.notify_all()
        return True

    @property
    def has_room(self) -> bool:
        return True

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._inner.close()

    def _send(self) -> None:
        rng = self._transport.random
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held or self._closed)
                self._changed.wait_for(lambda: len(self._held) >= _HELD or self._closed, rng.uniform(0, _HOLD_S))
                if self._closed:
                    return
                held, self._held = self._held, []
            twice = [data for data in held if rng.random() < 0.1]
            order = list(range(len(held)))
            rng.shuffle(order)
            self._transport.overtaken += sum(min(order[at:]) < place for at, place in enumerate(order))
            self._transport.repeated += len(twice)
            for data in (*(held[place] for place in order), *twice):
                while not self._inner.send(data, 1.0):
                    pass
