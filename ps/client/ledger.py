"""What a worker has contributed to the open step, and what the shards hold of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps.sharding import Plan


@dataclass
class Ledger:
    """The contributions of one step that this worker has computed."""

    plan: Plan
    step: int = -1
    #: Chunks that no shard has acknowledged yet, by contribution.
    unacknowledged: dict[int, set[int]] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Forget the last step: its decision is proof that all of it arrived."""
        self.step = step
        self.unacknowledged = {}

    def computed(self, contribution: int) -> None:
        """A contribution is about to be pushed."""
        self.unacknowledged[contribution] = {chunk.index for chunk in self.plan.chunks}

    def acknowledged(self, step: int, contribution: int, chunk: int) -> bool:
        """A shard holds a chunk; True when it was the contribution's last."""
        missing = self.unacknowledged.get(contribution)
        if step != self.step or missing is None or chunk not in missing:
            return False
        missing.discard(chunk)
        return not missing

    def complete(self, contribution: int) -> bool:
        """Whether every shard holds all of a contribution."""
        return self.unacknowledged.get(contribution, {-1}) == set()

    def missing_at(self, shard: int, held: dict[int, set[int]]) -> dict[int, list[int]]:
        """After a reconnect: the chunks of each computed contribution that a shard lacks.

        What it holds counts as acknowledged from now on; what it does not hold, does not.
        """
        lacking = {}
        for contribution, missing in self.unacknowledged.items():
            there = held.get(contribution, set())
            owned = {chunk.index for chunk in self.plan.chunks_of(shard)}
            missing -= owned & there
            missing |= owned - there
            absent = sorted(owned - there)
            if absent:
                lacking[contribution] = absent
        return lacking


@dataclass
class Pulling:
    """One version on its way into the model."""

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
    #: How many they are: asked for with every chunk.
    _missing: int = 0

    def __post_init__(self) -> None:
        self.remaining = {
            shard: {chunk.index for chunk in self.plan.chunks_of(shard)} for shard in range(self.plan.num_shards)
        }
        self._missing = len(self.plan.chunks)

    @property
    def complete(self) -> bool:
        return self._missing == 0

    @property
    def untouched(self) -> bool:
        """No shard has answered."""
        return not self.started and self._missing == len(self.plan.chunks)

    @property
    def torn(self) -> bool:
        """Some chunks are new and some are not: the model must not be used."""
        return self.started and not self.complete

    def chunk(self, shard: int, chunk: int, applied: int) -> bool:
        """A chunk has come; False when it is not of the version that was asked for."""
        if applied != self.applied:
            return False
        self.started = True
        if chunk in self.remaining[shard]:
            self.remaining[shard].remove(chunk)
            self._missing -= 1
        return True

    def same(self, shard: int, applied: int) -> bool:
        """A shard says that nothing changed; False when another one sent new weights."""
        if applied != self.held or self.started:
            return False
        self._missing -= len(self.remaining[shard])
        self.remaining[shard] = set()
        return True
