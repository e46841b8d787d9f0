"""The weights in a worker's model: which version they are, and one that is on its way into them.

What the streams receive they decode in their own threads, straight into the model. The owner's
thread says which version it asks for, and which one it computes with meanwhile: a thread that would
overwrite that one waits, and with it whatever comes after on its stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ps.sharding import Plan

#: How often a thread that may not write yet looks whether its stream is still the present one.
_POLL_S = 0.1


@dataclass(frozen=True)
class Model:
    """Which weights a worker holds; -1: none, or a mixture."""

    version: int = -1
    applied: int = -1


@dataclass
class Pulling:
    """One version on its way into the model. Pure."""

    plan: Plan
    version: int
    #: Committed steps in the weights that the model had before.
    held: int
    #: Committed steps in new weights; chunks of an earlier pull, still on their way, have others.
    applied: int
    #: Some chunks are new already.
    started: bool = False
    #: Chunks that have not come, by shard.
    remaining: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.remaining = {
            shard: {chunk.index for chunk in self.plan.chunks_of(shard)} for shard in range(self.plan.num_shards)
        }

    @property
    def complete(self) -> bool:
        return not any(self.remaining.values())

    @property
    def untouched(self) -> bool:
        """No shard has answered."""
        return not self.started and sum(map(len, self.remaining.values())) == len(self.plan.chunks)

    @property
    def torn(self) -> bool:
        """Some chunks are new and some are not: the model must not be used."""
        return self.started and not self.complete

    def wants(self, shard: int, chunk: int, applied: int) -> bool:
        """Whether a chunk is of the version that was asked for, and has not come before."""
        return applied == self.applied and chunk in self.remaining.get(shard, ())

    def came(self, shard: int, chunk: int) -> None:
        self.remaining[shard].discard(chunk)

    def same(self, shard: int, applied: int) -> bool:
        """A shard says that nothing changed; False when another one sent new weights."""
        if applied != self.held or self.started:
            return False
        self.remaining[shard] = set()
        return True


class PulledModel:
    """Versions of the model. Thread-safe: `take` and `unchanged` are the streams', the rest is the owner's."""

    def __init__(self, on_decided: Callable[[int], None], on_progress: Callable[[], None]) -> None:
        """
        Args:
            on_decided: called in a stream's thread, with their version, before the first new weights are written,
                where they prove that the steps before it are decided.
            on_progress: called in a stream's thread when the first weights of a version are there, and the last.
        """
        #: Weights may come before the step is decided: they prove nothing, and only the next deal does.
        self.eager = False
        self._on_decided = on_decided
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._model = Model()
        self._pulling: Pulling | None = None
        #: The version that is computed with.
        self._in_use: int | None = None
        self._writing = 0

    # -- The owner's ----------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        with self._changed:
            return self._model

    @property
    def step(self) -> int:
        """The step that makes the version which was asked for; without one some step that never is."""
        pulling = self._pulling
        return pulling.version - 1 if pulling is not None else -2

    def reset(self) -> None:
        """The model holds nothing, and nothing is asked for."""
        with self._changed:
            self._settle()
            self._model = Model()
            self._pulling = None
            self._in_use = None
            self._changed.notify_all()

    def ask(self, plan: Plan, version: int, applied: int) -> bool:
        """Ask for a version from now on; False when it is there or was asked for already."""
        with self._changed:
            if self._model.version == version or (self._pulling is not None and self._pulling.version == version):
                return False
            self._settle()
            self._pulling = Pulling(plan, version, self._model.applied, applied)
            self._changed.notify_all()
            return True

    def forget_pull(self, version: int) -> None:
        """A version that was asked for does not come."""
        with self._changed:
            if self._pulling is not None and self._pulling.version == version:
                self._pulling = None
                self._changed.notify_all()

    def pulling_of(self, shard: int) -> tuple[int, int] | None:
        """What a shard has still to answer: (version, committed steps in the weights held); None: nothing."""
        with self._changed:
            pulling = self._pulling
            return (pulling.version, pulling.held) if pulling is not None and pulling.remaining[shard] else None

    def use(self, version: int, *, early: bool) -> bool:
        """Begin to compute with a version; False: its weights are not there.

        Args:
            early: some of them are enough; whoever computes waits for the others (`has`).
        """
        with self._changed:
            pulling = self._pulling
            torn = pulling is not None and pulling.torn
            arriving = early and pulling is not None and pulling.version == version and pulling.started
            if not arriving and (torn or self._model.version != version):
                return False
            self._in_use = version
            self._changed.notify_all()
            return True

    def done(self) -> None:
        """What was computed is computed: the weights may be overwritten."""
        with self._changed:
            self._in_use = None
            self._changed.notify_all()

    def has(self, version: int, chunks: Iterable[tuple[int, int]] | None, timeout_s: float = 0.0) -> bool:
        """Whether weights of a version are there, waiting for them at most so long.

        Args:
            chunks: (shard, chunk) of the chunks that are needed; None: all.
        """
        needed = None if chunks is None else list(chunks)
        with self._changed:
            return self._changed.wait_for(lambda: self._there(version, needed), timeout_s)

    def _there(self, version: int, chunks: list[tuple[int, int]] | None) -> bool:
        if self._model.version == version:
            return True
        pulling = self._pulling
        if pulling is None or pulling.version != version or chunks is None or not pulling.started:
            return False
        return not any(chunk in pulling.remaining[shard] for shard, chunk in chunks)

    def comes(self, version: int) -> bool:
        """Whether a version is there, or was asked for."""
        with self._changed:
            pulling = self._pulling
            return self._model.version == version or (pulling is not None and pulling.version == version)

    @property
    def is_torn(self) -> bool:
        """Weights of the next version are arriving: the model as a whole cannot be used."""
        with self._changed:
            return self._pulling is not None and self._pulling.torn

    @property
    def is_waiting(self) -> bool:
        """A version was asked for and nothing of it has come."""
        with self._changed:
            return self._pulling is not None and self._pulling.untouched

    def _settle(self) -> None:
        """Wait until no thread writes: it takes one chunk's conversion, never a peer."""
        self._changed.wait_for(lambda: not self._writing)

    # -- The streams' ---------------------------------------------------------------------------

    def take(
        self, shard: int, chunk: int, applied: int, is_alive: Callable[[], bool], write: Callable[[], bool]
    ) -> None:
        """Write one chunk of new weights into the model, if it is wanted.

        Args:
            is_alive: whether the stream that brought it is still the present one.
            write: carries it out; False: the weights were not what they were announced as.
        """
        with self._changed:
            pulling = self._wanting(shard, chunk, applied, is_alive)
            if pulling is None:
                return
            first, last, intact = not pulling.started, False, False
            pulling.started = True
            self._model = Model()
            self._writing += 1
        try:
            if first and not self.eager:
                self._on_decided(pulling.version)
            intact = write()
            if intact:
                last = self._came(pulling, shard, chunk)
        finally:
            with self._changed:
                self._writing -= 1
                if not intact:
                    self._pulling = None
                elif last and self._pulling is pulling:
                    self._note(pulling)
                self._changed.notify_all()
        if first or last or not intact:
            self._on_progress()

    def _wanting(self, shard: int, chunk: int, applied: int, is_alive: Callable[[], bool]) -> Pulling | None:
        """The pull that a chunk is of, once it may be written; None: of none. Called with the lock held."""
        while is_alive():
            pulling = self._pulling
            if pulling is None or not pulling.wants(shard, chunk, applied):
                return None
            if self._in_use in (None, pulling.version):
                return pulling
            self._changed.wait(_POLL_S)
        return None

    def _came(self, pulling: Pulling, shard: int, chunk: int) -> bool:
        """Note that a chunk is written; True: it was the last."""
        with self._changed:
            pulling.came(shard, chunk)
            self._changed.notify_all()
            return pulling.complete

    def unchanged(self, shard: int, version: int, applied: int) -> None:
        """A shard says that a version is what the model holds already."""
        with self._changed:
            pulling = self._pulling
            if pulling is not None and pulling.version == version and pulling.same(shard, applied):
                if pulling.complete:
                    self._note(pulling)
                self._changed.notify_all()
        self._on_progress()

    def _note(self, pulling: Pulling) -> None:
        """The model is what was asked for."""
        self._model = Model(pulling.version, pulling.applied if pulling.started else pulling.held)
        self._pulling = None
