"""How long a run stands still when a process dies: from the signal to the first step that was begun after it.

A small GPT (126,016 parameters, steps of some 20 ms) on this host, 2 shards and 2 workers, all processes real and
started again by the launcher. A step that was open when the signal was sent does not count: the one after it does.

    worker          SIGKILL of a worker; its contribution is dealt to the other one
    worker-stop     SIGSTOP of a worker for longer than its lease (membership.lease_s=2)
    shard           SIGKILL of a shard with a standby (cluster.standbys=1)
    shard-cold      SIGKILL of a shard that comes back with its journal (durability=journal), 10M parameters
    coordinator     SIGKILL of the coordinator
    soak            10 minutes with SIGKILL of a process of any role every 15 s, and every 60 s, with standbys: steps
                    made in terms of those of the calm minutes before and after; memory and open files at both ends

    python benchmarks/bench_recovery.py [--parts worker,shard,...] [--kills 30] [--soak-s 600] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.report import Check, Report
from benchmarks.support.soak import KEPT, Soak
from benchmarks.support.watched_run import LARGE, LEASE_S, WatchedRun, await_that, job
from workers.launch.local_cluster import LocalCluster

COLUMNS = ["part", "kills", "median s", "most s", "compute s", "steps again"]
SOAK = "soak"


@dataclass(frozen=True)
class Part:
    """What is struck, and what may pass."""

    role: str
    bound_median_s: float
    bound_most_s: float
    job: tuple[str, ...] = ()
    number: signal.Signals = signal.SIGKILL
    #: After the run goes on, what else has to be there before the next one is struck.
    settled: Callable[[WatchedRun], bool] = lambda _: True


PARTS = {
    "worker": Part("worker", 1.0, 1.0, settled=lambda c: c.everybody("worker", 2)),
    "worker-stop": Part("worker", 1.0 + LEASE_S, 1.0 + LEASE_S, number=signal.SIGSTOP),
    "shard": Part("shard", 0.5, 1.0, ("cluster.standbys=1",), settled=lambda c: c.standbys_in_sync() == 2),
    "shard-cold": Part("shard", 5.0, 5.0, ("durability=journal", *LARGE), settled=lambda c: c.everybody("shard", 2)),
    "coordinator": Part("coordinator", 2.0, 2.0),
}


def strike(cluster: WatchedRun, part: Part, rank: int) -> float:
    """Send the signal; returns the seconds until a step is recorded that was begun after it."""
    pid = cluster.pid_of(part.role, rank)
    open_step = cluster.look() + 1
    began = time.monotonic()
    os.kill(pid, part.number)
    try:
        cluster.await_step(open_step + 1)
        return time.monotonic() - began
    finally:
        if part.number is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)


def measure(part: Part, kills: int, folder: Path) -> tuple[list[float], WatchedRun]:
    """A run in which one process after the other is struck."""
    with LocalCluster(*job(folder, *part.job), shards=2, workers=2, run_dir=folder / "run") as running:
        cluster = WatchedRun(running.run_dir)
        cluster.await_step(20)
        seconds = []
        for number in range(kills):
            await_that(lambda: part.settled(cluster), "everybody to be back")
            cluster.await_step(cluster.look() + 10)
            rank = 0 if part.role == "coordinator" else number % 2
            seconds.append(strike(cluster, part, rank))
        return seconds, cluster


def deaths(name: str, kills: int, folder: Path, report: Report) -> None:
    """One part's figures."""
    part = PARTS[name]
    seconds, cluster = measure(part, kills, folder)
    middle, most = statistics.median(seconds), max(seconds)
    report.row(name, len(seconds), middle, most, cluster.compute_s, cluster.went_back)
    lost = cluster.compute_s if part.role == "worker" else 0.0
    for what, value, bound in (("median", middle, part.bound_median_s), ("most", most, part.bound_most_s)):
        report.check(Check(f"{name}, {what}", value, bound + lost, value <= bound + lost))


def soak(seconds: float, folder: Path, report: Report) -> None:
    """Throughput that is kept under faults; what the processes hold in the end, in terms of the beginning."""
    overrides = job(folder, "cluster.standbys=1")
    with LocalCluster(*overrides, shards=2, workers=2, run_dir=folder / "run") as running:
        run = WatchedRun(running.run_dir)
        await_that(lambda: run.standbys_in_sync() == 2, "the standbys")
        result = Soak(run).measure(seconds)
    for every_s, bound in KEPT.items():
        kept = result.kept[every_s]
        report.check(Check(f"soak, a fault every {every_s:.0f} s, steps kept", kept, bound, kept >= bound))
    report.check(Check("soak, resident memory, end over beginning", result.memory, 1.1, result.memory <= 1.1))
    report.check(Check("soak, open files, end over beginning", result.files, 1.1, result.files <= 1.1))
    report.note("soak: steps/s, calm and under faults in turn", [round(rate, 1) for rate in result.rates])
    report.note("soak: struck", result.struck)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join([*PARTS, SOAK]), help="which, separated by commas")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--soak-s", type=float, default=600.0, help="seconds of a soak with one rate of faults")
    parser.add_argument("--short", action="store_true", help="3 kills, soaks of a minute")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/recovery.json"))
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in (*PARTS, SOAK)]:
        parser.error(f"--parts {','.join(unknown)}: there are {', '.join([*PARTS, SOAK])}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("recovery", COLUMNS)
    for name in names:
        # A LocalCluster prints its logs to stderr when a role has died: here that is the point.
        with tempfile.TemporaryDirectory(prefix="windlass-recovery-") as folder, redirect_stderr(io.StringIO()):
            if name == SOAK:
                soak(60.0 if arguments.short else arguments.soak_s, Path(folder), report)
            else:
                deaths(name, 3 if arguments.short else arguments.kills, Path(folder), report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
