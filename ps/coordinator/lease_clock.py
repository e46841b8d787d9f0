"""The time that counts for leases and all other patience: none passes while the coordinator itself is away."""

from __future__ import annotations


class LeaseClock:
    """Follows a clock, but from one look to the next by `most_s` at most. Time is handed in.

    Whoever was stopped, or waited for its disk, has heard nobody meanwhile, and what was said to it comes only now.
    """

    def __init__(self, now: float, most_s: float) -> None:
        self._most_s = most_s
        self._looked_at = self._time = now
        #: For how long it was away before the last look.
        self.away_s = 0.0

    def look(self, now: float) -> float:
        """Say what time it is for leases."""
        passed = now - self._looked_at
        self.away_s = max(0.0, passed - self._most_s)
        self._looked_at = now
        self._time += passed - self.away_s
        return self._time
