"""A set of steps, of which nearly all follow each other: it takes no room for them. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class StepSet:
    """Steps, kept as runs of neighbours."""

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        """
        Args:
            runs: first and last of each run, as `runs` gives them.
        """
        #: First and last of each run, in order; there is a gap between two of them.
        self._runs: list[tuple[int, int]] = [(first, last) for first, last in runs]

    def add(self, step: int) -> None:
        at = bisect_right(self._runs, step, key=lambda run: run[0])
        if at and step <= self._runs[at - 1][1]:
            return
        first = last = step
        if at < len(self._runs) and self._runs[at][0] == step + 1:
            last = self._runs.pop(at)[1]
        if at and self._runs[at - 1][1] == step - 1:
            at -= 1
            first = self._runs.pop(at)[0]
        self._runs.insert(at, (first, last))

    def drop_from(self, step: int) -> None:
        """Take out this step, and all after it."""
        while self._runs and self._runs[-1][1] >= step:
            first, _ = self._runs.pop()
            if first < step:
                self._runs.append((first, step - 1))

    def runs(self) -> list[tuple[int, int]]:
        """First and last of each run."""
        return list(self._runs)

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int):
            return False
        at = bisect_right(self._runs, step, key=lambda run: run[0])
        return at > 0 and step <= self._runs[at - 1][1]

    def __iter__(self) -> Iterator[int]:
        for first, last in self._runs:
            yield from range(first, last + 1)
