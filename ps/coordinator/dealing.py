"""Who computes which contribution. Only a plan of work: it never enters the accounting.

Works for contributions of a step and for parts of an evaluation alike: numbered units of work. A unit has one owner;
when that one is late another worker is given it as well, and whoever is first has done it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: A unit is late when somebody else would probably be through with it so many seconds before all who have it: a second
#: computation is not worth a moment, and a process that got no time for a moment is not slow.
LATE_S = 0.1

#: Everybody is as fast as everybody else.
EVEN: Mapping[int, float] = {}


@dataclass(frozen=True)
class Finish:
    """A unit was finished, for the first time."""

    #: What it took whoever did it; None: it was not theirs to do.
    took_s: float | None
    #: Who else had it, and for how long they have been at it; 0 if they had not begun.
    others: dict[int, float]


@dataclass
class Dealing:
    """Units 0..count-1 of one piece of work, who has them, and which are done."""

    count: int
    owner: dict[int, int] = field(default_factory=dict)
    dealt_at: dict[int, float] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    #: Workers from whom work was taken back because it made no progress: the last to be dealt any.
    late: set[int] = field(default_factory=set)
    #: What each worker has to do, in the order in which it does it: what it owns, and what it was given as well.
    _held: dict[int, dict[int, None]] = field(default_factory=dict)
    #: Since when each of them has been at the first of these.
    _since: dict[int, float] = field(default_factory=dict)

    def deal(self, ranks: Sequence[int], now: float, pace: Mapping[int, float] = EVEN) -> dict[int, list[int]]:
        """Give every unit that nobody has to whoever will be through with it first; returns what is new, by rank.

        With nothing dealt yet neighbours go to the same worker and, at an even pace, shares differ by at most one.

        Args:
            pace: seconds per unit, of each of `ranks`, or `EVEN`.
        """
        free = [unit for unit in range(self.count) if unit not in self.owner and unit not in self.done]
        if not ranks or not free:
            return {}
        shares = dict.fromkeys(ranks, 0)
        # (was late, when it will be through with one more, seconds for one, rank)
        through = [
            (rank in self.late, (1 + len(self._held.get(rank, ()))) * one, one, rank)
            for rank in ranks
            for one in [pace.get(rank, 1.0)]
        ]
        heapq.heapify(through)
        for _ in free:
            was_late, at, one, rank = through[0]
            shares[rank] += 1
            heapq.heapreplace(through, (was_late, at + one, one, rank))
        dealt: dict[int, list[int]] = {}
        remaining = iter(free)
        for rank in sorted(ranks):
            units = [next(remaining) for _ in range(shares[rank])]
            for unit in units:
                self.owner[unit] = rank
                self._give(unit, rank, now)
            if units:
                dealt[rank] = units
        return dealt

    def duplicate(self, ranks: Sequence[int], now: float, pace: Mapping[int, float]) -> dict[int, list[int]]:
        """Give what is late to workers who are idle, or soon will be, one unit each; returns what is new, by rank.

        Who is at its last unit gets it already, so that it need not wait for it then.

        Args:
            pace: seconds per unit, of everybody who has any and of `ranks`; empty: nobody knows, and nothing is late.
        """
        through = {
            rank: self._first_left(rank, now, pace) + pace[rank]
            for rank in ranks
            if len(self._held.get(rank, ())) <= 1 and rank in pace and rank not in self.late
        }
        if not through:
            return {}
        left = self._left(now, pace)
        given: dict[int, list[int]] = {}
        for rank in sorted(through, key=lambda rank: (through[rank], rank)):
            others = left.keys() - self._held.get(rank, {}).keys()
            unit = max(others, key=lambda unit: (left[unit], unit), default=None)
            if unit is None or left[unit] <= through[rank] + LATE_S:
                continue
            self._give(unit, rank, now)
            left[unit] = through[rank]
            given[rank] = [unit]
        return given

    def begin(self, now: float) -> None:
        """What the units are computed from is there only now: what they take is counted from here."""
        self._since = dict.fromkeys(self._since, now)

    def finish(self, unit: int, rank: int = -1, now: float = 0.0) -> Finish | None:
        """Note that a unit is done, by whoever did it; None: it was, or there is none of that number."""
        if unit in self.done or not 0 <= unit < self.count:
            return None
        self.done.add(unit)
        spent = {}
        for holder in self.holders(unit):
            at_it = holder == rank or next(iter(self._held[holder])) == unit
            spent[holder] = now - self._since[holder] if at_it else 0.0
            del self._held[holder][unit]
            if at_it:
                self._since[holder] = now
        return Finish(spent.pop(rank, None), spent)

    def lose(self, rank: int) -> list[int]:
        """Take back what a worker had not finished; returns what nobody has any more."""
        units = self._held.pop(rank, {})
        released = []
        for unit in sorted(units):
            others = self.holders(unit)
            if not others:
                del self.owner[unit], self.dealt_at[unit]
                released.append(unit)
            elif self.owner[unit] == rank:
                self.owner[unit] = others[0]
        return released

    def overdue(self, now: float, timeout_s: float) -> list[int]:
        """Take back what has made no progress for too long, from all who have it.

        When all of it is said to be done and what it is for still has not come about, somebody was
        wrong: then everything is taken back, and computing it again cannot do harm.
        """
        late = [unit for unit, at in self.dealt_at.items() if now - at > timeout_s]
        if self.complete and len(late) == self.count:
            self.done.clear()
        released = sorted(unit for unit in late if unit not in self.done)
        for unit in released:
            holders = self.holders(unit)
            for holder in holders:
                del self._held[holder][unit]
            self.late |= {self.owner.pop(unit), *holders}
            del self.dealt_at[unit]
        return released

    def outstanding(self, rank: int) -> list[int]:
        """What a worker has to do and nobody has finished, in the order in which it does it."""
        return list(self._held.get(rank, ()))

    def holders(self, unit: int) -> list[int]:
        """Who has to do a unit that is not finished."""
        return sorted(rank for rank, units in self._held.items() if unit in units)

    @property
    def complete(self) -> bool:
        return len(self.done) == self.count

    def _give(self, unit: int, rank: int, now: float) -> None:
        held = self._held.setdefault(rank, {})
        if not held:
            self._since[rank] = now
        held[unit] = None
        self.dealt_at[unit] = now

    def _left(self, now: float, pace: Mapping[int, float]) -> dict[int, float]:
        """The seconds until each unit that somebody has is probably finished."""
        left: dict[int, float] = {}
        for rank, units in self._held.items():
            if rank not in pace:
                continue
            first = self._first_left(rank, now, pace)
            for position, unit in enumerate(units):
                at = first + position * pace[rank]
                left[unit] = min(at, left.get(unit, at))
        return left

    def _first_left(self, rank: int, now: float, pace: Mapping[int, float]) -> float:
        """The seconds until a worker is probably through with what it is at.

        Who is late already is expected to be late by as much again.
        """
        return abs(pace[rank] - (now - self._since[rank])) if self._held.get(rank) else 0.0
