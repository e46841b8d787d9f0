"""Since when something has been missing. Time is handed in."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class Since:
    """Remembers when each of the things that are missing now was first found missing.

    The facts need not say when they came: looking often enough says it as well, and no fact can be forgotten.
    """

    def __init__(self) -> None:
        self._found_at: dict[Hashable, float] = {}

    def look(self, missing: Iterable[Hashable], now: float) -> None:
        """These are missing now; what is not among them any more is forgotten."""
        self._found_at = {key: self._found_at.get(key, now) for key in missing}

    def seconds(self, key: Hashable, now: float) -> float:
        """For how long it has been missing; 0 for what is not."""
        return now - self._found_at.get(key, now)
