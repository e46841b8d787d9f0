"""What it costs a step that a shard may die: nothing written down, a journal, a standby, both.

A GPT of 10M parameters on this host, 2 shards and 2 workers, all processes real. Standbys are processes of the same
host, so that they take its cores too; on hosts of their own they cost what the network takes. Each round has a run of
each case.

    none       durability=checkpoint, no standbys
    journal    durability=journal: each step's reduced gradient is written, 4 bytes for each parameter
    standby    cluster.standbys=1: it is sent, and the step waits for the standby to hold it
    both

    python benchmarks/bench_durability.py [--rounds 5] [--steps 30] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.support.report import Report
from benchmarks.support.watched_run import LARGE, WatchedRun, await_that, job
from workers.launch.local_cluster import LocalCluster

CASES: dict[str, tuple[str, ...]] = {
    "none": (),
    "journal": ("durability=journal",),
    "standby": ("cluster.standbys=1",),
    "both": ("durability=journal", "cluster.standbys=1"),
}
#: Before the steps that count; standbys are filled by then.
WARM_UP_STEPS = 10


def step_seconds(overrides: tuple[str, ...], steps: int) -> list[float]:
    """The seconds of each step of a run."""
    with tempfile.TemporaryDirectory(prefix="windlass-durability-") as name:
        folder = Path(name)
        with LocalCluster(*job(folder, *LARGE, *overrides), shards=2, workers=2, run_dir=folder / "run") as running:
            run = WatchedRun(running.run_dir)
            if "cluster.standbys=1" in overrides:
                await_that(lambda: run.standbys_in_sync() == 2, "the standbys")
            first = run.look() + WARM_UP_STEPS
            run.await_step(first + steps)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line["step_seconds"] for line in lines if line["kind"] == "step"}
        return [found[step] for step in range(first, first + steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="1 round of 10 steps")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/durability.json"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds, steps = (1, 10) if arguments.short else (arguments.rounds, arguments.steps)
    medians: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, overrides in CASES.items():
            medians[name].append(statistics.median(step_seconds(overrides, steps)))
    report = Report("durability", ["case", "median s of a step", "in terms of none"])
    for name, each in medians.items():
        ratios = [mine / none for mine, none in zip(each, medians["none"], strict=True)]
        report.row(name, statistics.median(each), statistics.median(ratios))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
