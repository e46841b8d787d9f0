"""Run seeds.

python -m tests.simulation [--seeds N] [--first SEED] [--jobs N] [--rough] [--standbys 0] [--trace SEED [--messages]]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from tests.simulation.report import Summary, describe
from tests.simulation.seeds import outcomes
from tests.simulation.simulation import simulate


def main(arguments: list[str]) -> int:
    """Run seeds, print what fails, and how much happened on average."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Run simulated clusters.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes")
    parser.add_argument("--rough", action="store_true", help="four times as many faults, in bad weather")
    parser.add_argument("--standbys", type=int, choices=(0, 1), default=1, help="of each shard")
    parser.add_argument("--trace", type=int, metavar="SEED", help="run this one alone, and print all that happens")
    parser.add_argument("--messages", action="store_true", help="with --trace: every message, too")
    asked = parser.parse_args(arguments)
    if asked.trace is not None:
        outcome = simulate(asked.trace, rough=asked.rough, standbys=asked.standbys, trace=True, messages=asked.messages)
        sys.stdout.write(describe(outcome, lines=None) + "\n")
        return int(bool(outcome.wrong))
    began, summary = time.monotonic(), Summary()
    seeds = range(asked.first, asked.first + asked.seeds)
    for outcome in outcomes(seeds, asked.rough, asked.jobs, asked.standbys):
        summary.add(outcome)
        if outcome.wrong:
            sys.stdout.write(
                describe(simulate(outcome.seed, rough=asked.rough, standbys=asked.standbys, trace=True)) + "\n"
            )
            sys.stdout.flush()
    seconds = time.monotonic() - began
    sys.stdout.write(f"{summary}\n{summary.seeds / seconds:.1f} seeds/s\n")
    summary.check()
    return int(bool(summary.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
