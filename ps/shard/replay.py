"""Carry out what a shard has written down: the same update, by the same code, to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from ps.errors import JournalDamaged, MismatchError
from ps.shard.protocol import StepProtocol
from ps.shard.records import Base, Decided, Record, Reduced, Reopened
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.types import Decision

#: Does something with each chunk, in any order, perhaps on several threads; returns when all is done.
ForEach = Callable[[Callable[[Chunk], None], Iterable[Chunk]], None]


def hold(store: Store, protocol: StepProtocol, record: Reduced, mean: memoryview) -> bool:
    """Hold a chunk as it was reduced; False: it is not of the step that is open.

    Args:
        mean: m, float32 [chunk.size].
    """
    finite = bool(np.isfinite(record.square_sums).all())
    if not protocol.restore(record, finite=finite):
        return False
    chunk = protocol.owned(record.chunk)
    np.copyto(store.mean(chunk), np.frombuffer(mean, np.float32))
    store.square_sums(chunk)[:] = record.square_sums
    return True


class Replay:
    """A state, and the records that lead on from it.

    Records of before the state are passed over. What the last ones have reduced of the open step is held, as it was.

    Concurrency: one thread at a time; nobody else touches store and protocol meanwhile.
    """

    def __init__(self, store: Store, protocol: StepProtocol, for_each: ForEach) -> None:
        """
        Args:
            store: holds the state of the version that is open in `protocol`.
        """
        self._store = store
        self._protocol = protocol
        self._for_each = for_each
        #: The version that the records lead to.
        self.reached = 0
        #: Steps that were made again.
        self.steps = 0

    def take(self, record: Record, mean: memoryview) -> None:
        """Carry out one record.

        Args:
            mean: m, of `Reduced`.

        Raises:
            JournalDamaged: it does not follow on the one before it.
            MismatchError: the state has other bits than the one that the record was made of.
            DecisionRejected: a decision of a step of which not all is reduced.
        """
        if isinstance(record, Base):
            self._follows(record.version)
            self._check(record.version, record.state_hash)
        elif isinstance(record, Decided):
            self._follows(record.decision.step)
            self._check(record.decision.step, record.state_hash)
            self.reached = record.decision.version
            if record.decision.step == self._protocol.step:
                self._decide(record.decision)
        elif isinstance(record, Reopened):
            if record.step == self._protocol.step:
                self._protocol.reopen(record.loss_scale)
        else:
            hold(self._store, self._protocol, record, mean)

    def finish(self) -> None:
        """Publish what was reached."""
        protocol, store = self._protocol, self._store
        for chunk in store.chunks:
            store.publish(chunk, store.encode(chunk, protocol.step, protocol.applied))
        store.close_step()

    def _follows(self, version: int) -> None:
        self.reached = max(self.reached, version)
        if version > self._protocol.step:
            raise JournalDamaged(f"the records go on with version {version}, behind version {self._protocol.step}")

    def _check(self, version: int, state_hash: int) -> None:
        if version == self._protocol.step and self._store.state_hash != state_hash:
            raise MismatchError(
                f"version {version} has the state hash {self._store.state_hash:016x} where {state_hash:016x} was "
                "written down: this machine does not repeat its own bits, or the checkpoint is another one"
            )

    def _decide(self, decision: Decision) -> None:
        decision = replace(decision, fence=self._protocol.fence)
        chunks = self._protocol.decide(decision)
        self._for_each(partial(self._apply, decision), chunks)
        for chunk in chunks:
            self._protocol.published(chunk)
        self.steps += 1

    def _apply(self, decision: Decision, chunk: Chunk) -> None:
        self._store.apply(chunk, self._protocol.present(chunk), decision)
