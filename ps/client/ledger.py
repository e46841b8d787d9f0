"""What a worker has contributed to the open step, and what the shards hold of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps.sharding import Plan


@dataclass
class Ledger:
    """The contributions of one step that this worker has computed."""

    plan: Plan
    step: int = -1
    #: Chunks whose shard has not acknowledged the contribution, by contribution.
    unacknowledged: dict[int, set[int]] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Forget the last step: its decision is proof that all of it arrived."""
        self.step = step
        self.unacknowledged = {}

    def computed(self, contribution: int) -> None:
        """A contribution is about to be pushed."""
        self.unacknowledged[contribution] = {chunk.index for chunk in self.plan.chunks}

    def drop(self, contribution: int) -> None:
        """Every shard holds a contribution by somebody else: nothing of this worker's is missing."""
        self.unacknowledged.pop(contribution, None)

    def acknowledged(self, step: int, contribution: int, shard: int) -> bool:
        """A shard holds all of its chunks; True when it was the last shard."""
        missing = self.unacknowledged.get(contribution)
        if step != self.step or not missing:
            return False
        missing.difference_update(chunk.index for chunk in self.plan.chunks_of(shard))
        return not missing

    def complete(self, contribution: int) -> bool:
        """Whether every shard holds all of a contribution."""
        return self.unacknowledged.get(contribution, {-1}) == set()

    def lacks(self, shard: int) -> bool:
        """Whether a shard has not acknowledged all that was computed."""
        owned = {chunk.index for chunk in self.plan.chunks_of(shard)}
        return any(owned & missing for missing in self.unacknowledged.values())

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
