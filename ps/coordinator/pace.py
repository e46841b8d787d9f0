"""How fast each worker is: seconds from one finished contribution to the next, as the coordinator sees it. Pure.

What the coordinator sees includes what the worker's own clock does not: a process that was stopped, a slow link.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

#: Of the last contribution, in the estimate: what a worker took two contributions ago hardly matters.
_NEWEST = 0.5
#: A worker that has not been measured for so many steps counts as one like the others: it is dealt work, and measured.
FORGET_STEPS = 20


class Pace:
    """Estimates, by rank."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        #: Steps since the last measurement.
        self._age: dict[int, int] = {}

    def took(self, rank: int, seconds: float) -> None:
        """A worker has finished a contribution."""
        before = self._seconds.get(rank, seconds)
        self._set(rank, before + _NEWEST * (seconds - before))

    def at_least(self, rank: int, seconds: float) -> None:
        """A worker was at a contribution for so long when somebody else finished it: it may take as long again."""
        if 2 * seconds > self._seconds.get(rank, 0.0):
            self._set(rank, 2 * seconds)

    def next_step(self) -> None:
        """A step begins: estimates age."""
        for rank in list(self._age):
            self._age[rank] += 1
            if self._age[rank] > FORGET_STEPS:
                self.forget(rank)

    def forget(self, rank: int) -> None:
        """A worker is gone: its number may come back as another process on another machine."""
        self._seconds.pop(rank, None)
        self._age.pop(rank, None)

    def of(self, ranks: Iterable[int]) -> dict[int, float]:
        """Seconds per contribution of each of these workers; empty before anybody was measured.

        One that was not measured is taken to be like the others.
        """
        if not self._seconds:
            return {}
        usual = median(self._seconds.values())
        return {rank: self._seconds.get(rank, usual) for rank in ranks}

    def _set(self, rank: int, seconds: float) -> None:
        self._seconds[rank] = seconds
        self._age[rank] = 0
