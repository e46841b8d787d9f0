"""Short versions of the benchmarks against their committed figures: for CI.

Only ratios are compared, each against a peer in the same run, in which all contenders take turns. A benchmark of which
a ratio has fallen below 0.8 of its figure is run once more, since a machine may be busy with something else. The
figures are in benchmarks/baseline.json, by kind of hardware.

    python benchmarks/regressions.py [--only NAME ...] [--write [--runs 3]] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.baseline import (
    TOLERANCE,
    Baseline,
    Measured,
    Outcome,
    bounds_of,
    compare,
    median_of,
    read,
    write,
)
from benchmarks.support.processes import ROOT, environment
from benchmarks.support.report import Check, Report

BASELINE = ROOT / "benchmarks" / "baseline.json"
#: Those whose short version says enough, and their checks that are left out: what is no ratio, and what jumps by half
#: from process to process because a peer does (pieces with a norm).
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "optimizer": tuple(f"{peer}, pieces, norm / reduce + apply, 10M, 1 process" for peer in ("torch", "DeepSpeed")),
    "transport": ("gRPC frames, push_pull: CPU-s per GB",),
    "exchange": (),
}
#: A short benchmark that has not ended after this hangs.
DEADLINE_S = 300.0


def measure(name: str) -> dict[str, Any]:
    """Run the short version of a benchmark; returns its JSON, with the checks that count.

    Raises:
        SystemExit: it did not write its figures.
    """
    print(f"bench_{name} --short", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, f"benchmarks/bench_{name}.py", "--short", "--json", str(path)]
        # Whether its bounds are met is not the question here, so neither is its exit code.
        ended = subprocess.run(
            command, cwd=ROOT, env=environment(), timeout=DEADLINE_S, capture_output=True, text=True, check=False
        )
        if not path.exists():
            raise SystemExit(f"bench_{name} wrote no figures:\n{ended.stdout}{ended.stderr}")
        found: dict[str, Any] = json.loads(path.read_text())
    return found | {"checks": [check for check in found["checks"] if check["name"] not in BENCHMARKS[name]]}


def check(name: str, baselines: list[Baseline]) -> tuple[list[Outcome], str]:
    """Hold a benchmark against its figures, with a second try; returns also whose figures they are."""
    found = measure(name)
    baseline = next((one for one in baselines if one.is_of(found["hardware"])), None)
    if baseline is None or name not in baseline.benchmarks:
        figures, whose = bounds_of(found["checks"]), f"the bounds: none of a {found['hardware']['cpu']} are committed"
    else:
        kept = baseline.benchmarks[name]
        figures, whose = kept.figures, f"of {kept.date}"
    outcomes = compare(figures, [found["checks"]])
    if not all(outcome.ok for outcome in outcomes):
        outcomes = compare(figures, [found["checks"], measure(name)["checks"]])
    return outcomes, whose


def write_baseline(names: list[str], runs: int) -> None:
    """Replace this kind of hardware's figures by medians; the benchmarks take turns."""
    found = [{name: measure(name) for name in names} for _ in range(runs)]
    hardware = found[-1][names[0]]["hardware"]
    before = read(BASELINE)
    benchmarks = next((one.benchmarks for one in before if one.is_of(hardware)), {}) | {
        name: Measured(latest["date"], latest["versions"], median_of([run[name]["checks"] for run in found]))
        for name, latest in found[-1].items()
    }
    mine = Baseline(hardware["cpu"], hardware["cores"], benchmarks)
    write(BASELINE, [*[one for one in before if not one.is_of(hardware)], mine])
    print(f"written to {BASELINE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--write", action="store_true", help="make what is measured now the figures to be kept")
    parser.add_argument("--runs", type=int, default=3, help="of each benchmark, for --write")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/regressions.json"))
    arguments = parser.parse_args()
    if arguments.write:
        write_baseline(arguments.only, arguments.runs)
        return
    report = Report("regressions", ["benchmark", "ratio", "better", "committed", "measured", "part kept"])
    baselines = read(BASELINE)
    for name in arguments.only:
        outcomes, whose = check(name, baselines)
        for outcome in outcomes:
            better = "higher" if outcome.figure.rises else "lower"
            measured = "not measured" if outcome.measured is None else outcome.measured
            report.row(name, outcome.name, better, outcome.figure.value, measured, outcome.kept)
            report.check(Check(f"{name}: {outcome.name}", outcome.kept, TOLERANCE, outcome.ok))
        report.note(f"{name}: committed figures", whose)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
