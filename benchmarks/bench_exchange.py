"""Exchange and update alone: from FP32 gradients present to weights updated, 2 workers, conversions included.

Windlass (real coordinator, shards and sessions; torch-free workers whose gradients are there already)
over gRPC and over shared memory, against PyTorch DDP with gloo and fused AdamW, FP32 and with the FP16
compression hook. Rounds of all alternate in one run; the ratio is what counts, since the machine's
speed drifts.

    python benchmarks/bench_exchange.py [--sizes 10 50 124] [--shards 1 2] [--rounds 5] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.support.ddp import run_ddp
from benchmarks.support.hosts import HERE
from benchmarks.support.load_cluster import Layout, Load, run_load, step_seconds
from benchmarks.support.report import Check, Report

#: Times as fast as the better DDP, at least: by transport and millions of parameters.
BOUNDS = {("shm", 10): 2.0, ("shm", 50): 3.0, ("grpc", 50): 1.0}


def run_windlass(parameters: int, shards: int, transport: str, steps: int) -> list[float]:
    """The seconds of each step of a cluster with 2 workers."""
    layout = Layout.here(shards, 2)
    return step_seconds(run_load(layout, Load(parameters), steps, f"launch.transport={transport}"))


def contenders(parameters: int, shards: list[int], steps: int) -> dict[str, Callable[[], list[float]]]:
    """What is measured, by name."""
    runs: dict[str, Callable[[], list[float]]] = {
        f"DDP {mode}": lambda mode=mode: run_ddp([HERE] * 2, parameters, steps, mode == "fp16")  # type: ignore[misc]
        for mode in ("fp32", "fp16")
    }
    for transport in ("grpc", "shm"):
        for count in shards:
            runs[f"{transport}, {count} shard{'s' if count > 1 else ''}"] = (
                lambda count=count, transport=transport: run_windlass(parameters, count, transport, steps)  # type: ignore[misc]
            )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50, 124], help="millions of parameters")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="10M, 1 shard, 3 rounds")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/exchange.json"))
    arguments = parser.parse_args()
    if arguments.short:
        arguments.sizes, arguments.shards, arguments.rounds = [10], [1], 3
    report = Report("exchange", ["parameters, M", "system", "median s", "min s", "max s", "better DDP / this"])
    for size in arguments.sizes:
        runs = contenders(size * 1_000_000, arguments.shards, arguments.steps)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                times[name].append(statistics.median(run()))
        better = min((times[name] for name in times if name.startswith("DDP")), key=statistics.median)
        best: dict[str, float] = {}
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(better, values, strict=True))
            report.row(size, name, statistics.median(values), min(values), max(values), ratio)
            transport = name.split(",")[0]
            best[transport] = max(best.get(transport, 0.0), ratio)
        for transport in ("shm", "grpc"):
            bound = BOUNDS.get((transport, size))
            if bound is not None:
                name = f"the better DDP / Windlass over {transport} at {size}M"
                report.check(Check(name, best[transport], bound, best[transport] >= bound))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
