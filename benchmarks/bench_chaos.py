"""Faults at random over all roles of one long run: what each costs, and whether the result is that of a run without.

A small GPT on this host, 2 shards with a standby each and their journals, 2 workers, mutual TLS: what `windlass train`
starts. Processes are killed, stopped for up to 1.5 leases and cut off, each kind and each role as likely. After the
last fault the run is asked to end where it is; the same job is then trained to the same step with nothing happening
to it. For each kind and role: the seconds from the fault until a step is recorded that was begun after it (of a stopped
process: that and the time for which it was stopped).

    python benchmarks/bench_chaos.py [--faults 50] [--every 5] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.support.report import Check, Report
from benchmarks.support.watched_run import LEASE_S, WatchedRun, await_that, job
from ps.coordinator.audit import audit
from ps.storage.digest import digest
from ps.storage.journal_files import read
from workers.launch import faults
from workers.launch.chaos import strike_all
from workers.launch.faults import Kind
from workers.launch.folder import RunFolder, find_checkpoint

WINDLASS = (sys.executable, "-m", "workers.cli.main")
#: A run that is asked to end saves its state first.
END_S = 120.0
ASKED_TO_GO = 128 + signal.SIGTERM
TRAINED = ("cluster.shards=2", "cluster.workers=2", "checkpoint.every_steps=1000")
UNDER_FAULTS = ("cluster.standbys=1", "durability=journal")


@contextmanager
def trained(run: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `windlass train`, which is gone at the end."""
    with run.with_suffix(".out").open("wb") as output:
        command = [*WINDLASS, "train", f"run_dir={run}", *job(run.parent, *TRAINED, *overrides)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield process
        finally:
            # Asked twice, it does not save its state.
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
            process.wait(END_S)


def finish(process: subprocess.Popen[bytes], run: Path, timeout_s: float, code: int = 0) -> None:
    """Wait for the end of a run, with this exit code.

    Raises:
        SystemExit: it has another one; with the end of what it said.
    """
    if process.wait(timeout_s) != code:
        raise SystemExit(f"{run.name} failed:\n{run.with_suffix('.out').read_text()[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/chaos.json"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("chaos", ["fault", "role", "times", "median s", "most s"])
    with tempfile.TemporaryDirectory(prefix="windlass-chaos-") as name:
        folder = Path(name)
        subprocess.run([*WINDLASS, "certs", "init", str(folder / "keys")], check=True, stdout=subprocess.DEVNULL)
        secured = f"security.certificates={folder / 'keys'}"
        faulty, calm = folder / "faulty", folder / "calm"
        began = time.monotonic()
        with trained(faulty, secured, *UNDER_FAULTS) as process:
            costs = strike(faulty, arguments.faults, arguments.every, arguments.seed)
            process.send_signal(signal.SIGTERM)
            finish(process, faulty, END_S, ASKED_TO_GO)
        seconds = time.monotonic() - began
        found = audit(read(RunFolder(faulty).journal))
        with trained(calm, secured, f"training.stop_at={len(found.steps)}") as process:
            finish(process, calm, 10 * seconds)
        same = digest(find_checkpoint(faulty)) == digest(find_checkpoint(calm))
    for (kind, role), each in sorted(costs.items()):
        report.row(kind, role, len(each), statistics.median(each), max(each))
    times = sum(map(len, costs.values()))
    report.check(Check("faults", times, arguments.faults, times == arguments.faults))
    report.check(Check("the digest of a run without faults", same, True, same))
    report.check(Check("what the audit of the journal finds", len(found.problems), 0, not found.problems))
    report.note("steps", len(found.steps))
    report.note("seconds", round(seconds))
    report.finish(arguments.json)


def strike(run: Path, count: int, every_s: float, seed: int) -> dict[tuple[str, str], list[float]]:
    """Carry out the faults; returns by kind and role how long each was felt."""
    watched = WatchedRun(run)
    watched.await_step(20)
    await_that(lambda: watched.standbys_in_sync() == 2, "the standbys")
    costs = defaultdict(list)
    drawn = faults.plans(seed, list(Kind), every_s, 1.5 * LEASE_S)
    for fault in strike_all(watched.folder, drawn, count):
        # One that is stopped for longer than a step has cost what passed meanwhile.
        watched.await_step(watched.look() + 2)
        cost = time.monotonic() - fault.at
        costs[str(fault.plan.kind), fault.process.role].append(cost)
        print(f"{fault.plan.kind:<4} {fault.process}: {cost:.2f} s, step {watched.step}", flush=True)
    return dict(costs)


if __name__ == "__main__":
    main()
