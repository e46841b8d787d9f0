"""Short versions of the benchmarks against their committed figures: for CI.

Only ratios are compared, each measured against a peer in the same run. A benchmark that falls below
its figure by more than the tolerance is run once more, since a machine may be busy with something else.

    python benchmarks/regressions.py [--only NAME ...] [--update] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.report import Check, Report

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "baseline.json"
#: A ratio may fall to this part of its committed figure.
TOLERANCE = 0.8
#: A short benchmark that has not ended after this hangs.
DEADLINE_S = 600.0


def measure(name: str) -> dict[str, Any]:
    """Run the short version of a benchmark; returns its checks by name.

    Raises:
        SystemExit: it did not write its figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--short", "--json", str(path)]
        subprocess.run(command, timeout=DEADLINE_S, check=False)
        if not path.exists():
            raise SystemExit(f"bench_{name} wrote no figures")
        return {check["name"]: check["value"] for check in json.loads(path.read_text())["checks"]}


def kept(value: float, baseline: dict[str, Any]) -> float:
    """Which part of a committed figure is still reached; above 1 it is surpassed."""
    return value / baseline["value"] if baseline["better"] == "higher" else baseline["value"] / value


def compare(name: str, baseline: dict[str, Any]) -> dict[str, float]:
    """Measure a benchmark, once more if it falls short; the better part kept of each figure."""
    parts: dict[str, float] = {}
    for _ in range(2):
        measured = measure(name)
        for check, figure in baseline.items():
            if check not in measured:
                raise SystemExit(f"bench_{name} has no check {check!r} any more: run with --update")
            parts[check] = max(parts.get(check, 0.0), kept(measured[check], figure))
        if min(parts.values(), default=1.0) >= TOLERANCE:
            break
    return parts


def main() -> None:
    baseline = json.loads(BASELINE.read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(baseline), default=sorted(baseline))
    parser.add_argument("--update", action="store_true", help="commit what is measured now as the baseline")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/regressions.json"))
    arguments = parser.parse_args()
    if arguments.update:
        for name in arguments.only:
            measured = measure(name)
            for check in baseline[name]:
                baseline[name][check]["value"] = round(measured[check], 3)
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
        return
    report = Report("regressions", ["benchmark", "figure", "committed", "part kept"])
    for name in arguments.only:
        for check, part in compare(name, baseline[name]).items():
            report.row(name, check, baseline[name][check]["value"], part)
            report.check(Check(f"{name}: {check}", part, TOLERANCE, part >= TOLERANCE))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
