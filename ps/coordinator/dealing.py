"""Who computes which contribution. Only a plan of work: it never enters the accounting.

Works for contributions of a step and for parts of an evaluation alike: numbered units of work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Dealing:
    """Units 0..count-1 of one piece of work, their owners, and which are done."""

    count: int
    owner: dict[int, int] = field(default_factory=dict)
    dealt_at: dict[int, float] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    #: Workers from whom work was taken back because it made no progress: the last to be dealt any.
    late: set[int] = field(default_factory=set)

    def deal(self, ranks: Sequence[int], now: float) -> dict[int, list[int]]:
        """Give every unit that nobody has to the least busy worker; returns what is new, by rank.

        With nothing dealt yet, neighbours go to the same worker and shares differ by at most one.
        """
        free = [unit for unit in range(self.count) if unit not in self.owner and unit not in self.done]
        if not ranks or not free:
            return {}
        load = dict.fromkeys(ranks, 0)
        for unit, rank in self.owner.items():
            if rank in load and unit not in self.done:
                load[rank] += 1
        shares = dict.fromkeys(ranks, 0)
        for _ in free:
            rank = min(ranks, key=lambda one: (one in self.late, load[one] + shares[one], one))
            shares[rank] += 1
        dealt: dict[int, list[int]] = {}
        remaining = iter(free)
        for rank in sorted(ranks):
            units = [next(remaining) for _ in range(shares[rank])]
            for unit in units:
                self.owner[unit] = rank
                self.dealt_at[unit] = now
            if units:
                dealt[rank] = units
        return dealt

    def finish(self, unit: int) -> bool:
        """Note that a unit is done, by whoever did it; False: it was, or there is none of that number."""
        if unit in self.done or not 0 <= unit < self.count:
            return False
        self.done.add(unit)
        return True

    def lose(self, rank: int) -> list[int]:
        """Take back what a worker had not finished."""
        return self._release(unit for unit, owner in self.owner.items() if owner == rank)

    def overdue(self, now: float, timeout_s: float) -> list[int]:
        """Take back what has made no progress for too long.

        When all of it is said to be done and what it is for still has not come about, somebody was
        wrong: then everything is taken back, and computing it again cannot do harm.
        """
        late = [unit for unit, at in self.dealt_at.items() if now - at > timeout_s]
        if self.complete and len(late) == self.count:
            self.done.clear()
        self.late |= {self.owner[unit] for unit in late if unit not in self.done}
        return self._release(late)

    def outstanding(self, rank: int) -> list[int]:
        """What a worker has been dealt and has not finished, in order."""
        return sorted(unit for unit, owner in self.owner.items() if owner == rank and unit not in self.done)

    @property
    def complete(self) -> bool:
        return len(self.done) == self.count

    def _release(self, units: Iterable[int]) -> list[int]:
        released = sorted(unit for unit in units if unit not in self.done)
        for unit in released:
            self.owner.pop(unit, None)
            self.dealt_at.pop(unit, None)
        return released
