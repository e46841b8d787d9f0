"""Where a step's time went, from what the workers say."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from ps.types import Decision

#: Speed is measured over this many steps.
SPEED_WINDOW = 20


@dataclass(frozen=True)
class Spent:
    """One contribution, and where its time went."""

    step: int
    contribution: int
    compute_s: float
    push_s: float
    pull_s: float
    #: The part of `pull_s` before the first of the weights came.
    wait_s: float = 0.0


_SECONDS = ("step_seconds", "compute_seconds", "push_seconds", "pull_seconds", "wait_seconds")


class Speed:
    """How fast the last steps were, and what each part of a step took last."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
        #: By the names in metrics.jsonl, each of the last step that has it: a worker may report after its step is over.
        self.seconds: dict[str, float] = {}

    def note(self, line: dict[str, Any]) -> None:
        """A step was closed, with this line."""
        self.seconds |= {name: line[name] for name in _SECONDS if line[name] is not None}
        if line["step_seconds"] is not None:
            self._recent.append((line["step_seconds"], line["tokens"]))

    @property
    def tokens_per_s(self) -> float | None:
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds > 0 else None

    def left_s(self, steps: int) -> float | None:
        """Seconds that so many steps will take."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return max(0, steps) * seconds / len(self._recent) if seconds > 0 else None


class Timings:
    """One step's seconds, summed per worker; the slowest worker is what the step waited for."""

    def __init__(self) -> None:
        self._by_rank: dict[int, list[float]] = {}

    def add(self, rank: int, compute_s: float, push_s: float, pull_s: float, wait_s: float = 0.0) -> None:
        sums = self._by_rank.setdefault(rank, [0.0, 0.0, 0.0, 0.0])
        for index, seconds in enumerate((compute_s, push_s, pull_s, wait_s)):
            sums[index] += seconds

    def _slowest(self, index: int) -> float | None:
        return max((round(sums[index], 6) for sums in self._by_rank.values()), default=None)

    def line(self, decision: Decision, step_s: float | None) -> dict[str, Any]:
        """The step's line of metrics.jsonl; what is not known is null, and so is what is not finite."""
        return {
            "kind": "step",
            "step": decision.step,
            "loss": finite(decision.loss),
            "learning_rate": decision.groups[0].lr,
            "gradient_norm": finite(decision.gradient_norm),
            "loss_scale": decision.loss_scale,
            "skipped": decision.skip,
            "tokens": decision.tokens,
            "step_seconds": round(step_s, 6) if step_s is not None else None,
            "push_seconds": self._slowest(1),
            "pull_seconds": self._slowest(2),
            "wait_seconds": self._slowest(3),
            "compute_seconds": self._slowest(0),
        }


def finite(value: float) -> float | None:
    """The value, or null: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
