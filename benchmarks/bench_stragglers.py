"""What one slow worker among four costs: eight contributions a step, three workers alike and one four times slower.

Workers sleep for what they compute; they wait for weights, leave what nobody wants and push as a model of some layers
does. All else is real: sessions, pushes, decisions, updates, pulls. So the machine's cores hardly matter, and what is
dealt to whom does.

    alike      four fast workers
    waited     the slow one is waited for (membership.duplicate_late=false)
    late       evenly dealt; what is late is given to another worker as well (the default)
    speed      dealt by measured speed, and late ones as above (membership.balance=speed)

The ideal is that of work which can be cut at will: C / (3 + 1/4) times a fast worker's contribution. Contributions are
whole, and three fast workers need three rounds for eight of them: 1.22 times the ideal.

    python benchmarks/bench_stragglers.py [--rounds 5] [--steps 6] [--compute-s 0.4] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.load_cluster import Layout, Load, run_load, step_seconds
from benchmarks.support.processes import unwind_when_asked_to_go
from benchmarks.support.report import Check, Report

CONTRIBUTIONS = 8
WORKERS = 4
#: How much slower the slow one is.
SLOWER = 4
BOUND = 1.25
PARAMETERS = 1_000_000


@dataclass(frozen=True)
class Case:
    """How a step is dealt, to whom."""

    name: str
    slow: bool
    overrides: tuple[str, ...]
    bounded: bool = False

    def seconds(self, compute_s: float, steps: int) -> list[float]:
        """The seconds of each step."""
        seconds = [compute_s] * (WORKERS - 1) + [compute_s * (SLOWER if self.slow else 1)]
        shape = (
            f"batch.micro_batches_per_step={CONTRIBUTIONS}",
            f"batch.contributions_per_step={CONTRIBUTIONS}",
        )
        load = Load(PARAMETERS, compute_s=seconds)
        return step_seconds(run_load(Layout.here(1, WORKERS), load, steps, *shape, *self.overrides))

    def ideal_s(self, compute_s: float) -> float:
        """The seconds of a step whose work could be cut at will."""
        speed = WORKERS - 1 + (1 / SLOWER if self.slow else 1)
        return CONTRIBUTIONS * compute_s / speed


CASES = (
    Case("alike", False, ()),
    Case("waited", True, ("membership.duplicate_late=false",)),
    Case("late", True, (), bounded=True),
    Case("speed", True, ("membership.balance=speed",), bounded=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compute-s", type=float, default=0.4, help="seconds of a fast worker's contribution")
    parser.add_argument("--short", action="store_true", help="1 round of 4 steps")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/stragglers.json"))
    arguments = parser.parse_args()
    rounds, steps = (1, 4) if arguments.short else (arguments.rounds, arguments.steps)
    unwind_when_asked_to_go()
    times: dict[str, list[float]] = {case.name: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            times[case.name] += case.seconds(arguments.compute_s, steps)
    report = Report("stragglers", ["case", "median s", "min s", "max s", "ideal s", "over ideal"])
    report.note("seconds of a fast worker's contribution", arguments.compute_s)
    for case in CASES:
        seconds, ideal_s = times[case.name], case.ideal_s(arguments.compute_s)
        over = statistics.median(seconds) / ideal_s
        report.row(case.name, statistics.median(seconds), min(seconds), max(seconds), ideal_s, over)
        if case.bounded:
            report.check(Check(f"{case.name}: a step against the ideal one", over, BOUND, over <= BOUND))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
