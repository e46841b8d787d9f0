"""What an exchange costs as parameters, tensors, workers and shards grow: nothing may grow faster than its bytes.

From gradients present to weights updated, conversions included, over gRPC on this machine, with torch-free workers
whose gradients are there already unless it says otherwise. Each part holds one thing against another in the same round:

    parameters  2 workers, 1 shard: seconds per parameter at 50M against those at 10M
    tensors     the same, 50M in 10,000 tensors against 50M in 100
    hooks       the same with a torch module, whose gradients come through the hooks of a backward that computes nothing
    workers     16 workers with C = 16 against 2 with C = 2: 8 times the bytes
    shards      2 and 4 against 1: the work is the same, on a machine with fewer cores than processes
    threads     2 kernel threads of a shard against 1, 50M; threads-shm: through shared memory

    python benchmarks/bench_scaling.py [--parts parameters,tensors,...] [--rounds 5] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.load_cluster import Layout, Load, run_load, step_seconds
from benchmarks.support.report import Check, Report

MILLION = 1_000_000


@dataclass(frozen=True)
class Case:
    """A cluster and what it carries."""

    parameters: int
    tensors: int | None = None
    workers: int = 2
    shards: int = 1
    #: Kernel threads of each shard.
    threads: int = 1
    transport: str = "grpc"
    hooks: bool = False

    def seconds(self, steps: int) -> float:
        """The median step."""
        layout, load = Layout.here(self.shards, self.workers), Load(self.parameters, self.tensors, self.hooks)
        how = (f"cluster.threads_per_shard={self.threads}", f"launch.transport={self.transport}")
        return statistics.median(step_seconds(run_load(layout, load, steps, *how)))


@dataclass(frozen=True)
class Part:
    """Cases of which each is held against the first."""

    cases: tuple[Case, ...]
    #: How much more than the first the last may cost; None: it is only reported.
    bound: float | None
    what: str
    #: The cost is counted per parameter.
    per_parameter: bool = False


PARTS = {
    "parameters": Part(
        tuple(Case(size * MILLION) for size in (10, 25, 50)), 1.1, "a parameter of 50M against one of 10M", True
    ),
    "tensors": Part(
        tuple(Case(50 * MILLION, tensors) for tensors in (100, 10_000)), 1.2, "10,000 tensors against 100, 50M"
    ),
    "hooks": Part(
        tuple(Case(50 * MILLION, tensors, hooks=True) for tensors in (100, 10_000)),
        1.5,
        "10,000 tensors against 100, 50M, through gradient hooks",
    ),
    "workers": Part(
        tuple(Case(10 * MILLION, workers=workers) for workers in (2, 16)), 8.8, "16 workers against 2, 10M"
    ),
    "shards": Part(tuple(Case(10 * MILLION, shards=shards) for shards in (1, 2, 4)), None, "4 shards against 1, 10M"),
    "threads": Part(tuple(Case(50 * MILLION, threads=threads) for threads in (1, 2)), None, "2 threads against 1, 50M"),
    "threads-shm": Part(
        tuple(Case(50 * MILLION, threads=threads, transport="shm") for threads in (1, 2)),
        None,
        "2 threads against 1, 50M, shared memory",
    ),
}


def measure(name: str, part: Part, rounds: int, steps: int, report: Report) -> None:
    """Rounds over all cases of a part."""
    times: list[list[float]] = [[] for _ in part.cases]
    for _ in range(rounds):
        for case, seconds in zip(part.cases, times, strict=True):
            seconds.append(case.seconds(steps))
    for case, seconds in zip(part.cases, times, strict=True):
        middle = statistics.median(seconds)
        cost = _cost(part, times, case)
        report.row(
            name,
            case.parameters / MILLION,
            case.tensors or "-",
            case.workers,
            case.shards,
            case.threads,
            middle,
            min(seconds),
            max(seconds),
            1e9 * middle / case.parameters,
            cost,
        )
    if part.bound is not None:
        cost = _cost(part, times, part.cases[-1])
        report.check(Check(part.what, cost, part.bound, cost <= part.bound))


def _cost(part: Part, times: Sequence[Sequence[float]], case: Case) -> float:
    """How much more a case costs than the first one: the median of the rounds' ratios."""
    first, index = part.cases[0], part.cases.index(case)
    scale = first.parameters / case.parameters if part.per_parameter else 1.0
    return statistics.median(scale * b / a for a, b in zip(times[0], times[index], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="2 rounds of 5 steps")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/scaling.json"))
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    rounds, steps = (2, 5) if arguments.short else (arguments.rounds, arguments.steps)
    # So that the clusters are taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    columns = ["part", "parameters, M", "tensors", "workers", "shards", "threads", "median s", "min s", "max s"]
    report = Report("scaling", [*columns, "ns/param", "against the first"])
    for name in names:
        measure(name, PARTS[name], rounds, steps, report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
