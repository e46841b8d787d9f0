"""What simulations came to: a failure in words, and the means over many seeds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.simulation import SHARDS, WORKERS, Outcome

#: Lines of a trace that are shown of a failure.
LINES = 120
#: What a seed has on average, at least.
STEPS, EVENTS, FAULTS = 20, 500, 5


def describe(outcome: Outcome, lines: int | None = LINES) -> str:
    """A failure, how to see it again, and what led to it.

    Args:
        lines: of the trace's end; None: all.
    """
    how = " --rough" * outcome.rough + " --standbys 0" * (not outcome.standbys)
    what, shown = (
        f"{outcome.kind}, {outcome.durability}",
        outcome.trace[-lines:] if lines is not None else outcome.trace,
    )
    return "\n".join(
        [
            f"seed {outcome.seed} ({what}): {'; '.join(outcome.wrong) or 'nothing is wrong'}",
            f"again: python -m tests.simulation --trace {outcome.seed}{how}",
            f"faults: {', '.join(outcome.faults)}",
            "     seconds process        what",
            *shown,
        ]
    )


@dataclass
class Summary:
    """Counts over seeds."""

    seeds: int = 0
    failed: list[int] = field(default_factory=list)
    steps: int = 0
    messages: int = 0
    events: int = 0
    faults: int = 0
    rollbacks: int = 0
    takeovers: int = 0
    standbys: int = 0
    simulated_s: float = 0.0
    happened: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        if outcome.wrong:
            self.failed.append(outcome.seed)
        self.steps += outcome.committed
        self.messages += outcome.messages
        self.events += outcome.events
        self.faults += len(outcome.faults)
        self.rollbacks += outcome.rollbacks
        self.takeovers += outcome.takeovers
        self.standbys += outcome.standbys * SHARDS
        self.simulated_s += outcome.simulated_s
        self.happened.update(outcome.happened)

    def check(self) -> None:
        """A simulation in which little happens shows little.

        Raises:
            AssertionError: the means are less than what is promised.
        """
        passed = self.seeds - len(self.failed)
        assert self.steps >= STEPS * passed, f"{self.steps} committed steps in {passed} runs"
        assert self.messages >= EVENTS * self.seeds, f"{self.messages} messages in {self.seeds} runs"
        assert self.faults >= FAULTS * passed, f"{self.faults} faults in {passed} runs"

    def __str__(self) -> str:
        seeds = max(1, self.seeds)
        means = {
            "committed steps": self.steps,
            "messages": self.messages,
            "scheduled events": self.events,
            "faults": self.faults,
            "rollbacks": self.rollbacks,
            "standbys": self.standbys,
            "takeovers": self.takeovers,
            **{f"messages {how}": count for how, count in sorted(self.happened.items())},
        }
        text = ", ".join(f"{count / seeds:.1f} {what}" for what, count in means.items())
        return (
            f"{self.seeds} seeds of {SHARDS} shards and {WORKERS} workers or more, {len(self.failed)} failed "
            f"{self.failed[:20] or ''}\nmeans: {text}, {self.simulated_s / seeds:.1f} simulated seconds"
        )
