"""Exchange and update alone: from FP32 gradients present to weights updated, 2 workers, conversions included.

Windlass (real coordinator, shards and sessions; torch-free workers whose gradients are there already)
against PyTorch DDP with gloo and fused AdamW, FP32 and with the FP16 compression hook. Rounds of both
alternate in one run; the ratio is what counts, since the machine's speed drifts.

    python benchmarks/bench_exchange.py [--sizes 10 50] [--shards 1 2] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.support.ddp import run_ddp
from benchmarks.support.hosts import HERE
from benchmarks.support.load_cluster import Layout, Load, run_load, step_seconds
from benchmarks.support.report import Report


def run_windlass(parameters: int, shards: int, steps: int) -> list[float]:
    """The seconds of each step of a cluster with 2 workers."""
    return step_seconds(run_load(Layout.here(shards, 2), Load(parameters), steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50], help="millions of parameters")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/exchange.json"))
    arguments = parser.parse_args()
    report = Report("exchange", ["parameters, M", "system", "median s", "min s", "max s", "DDP / this"])
    for size in arguments.sizes:
        parameters = size * 1_000_000
        times: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for mode in ("fp32", "fp16"):
                name = f"DDP gloo {mode}"
                times.setdefault(name, []).append(
                    statistics.median(run_ddp([HERE] * 2, parameters, arguments.steps, mode == "fp16"))
                )
            for shards in arguments.shards:
                name = f"Windlass gRPC, {shards} shard{'s' if shards > 1 else ''}"
                times.setdefault(name, []).append(statistics.median(run_windlass(parameters, shards, arguments.steps)))
        peers = [times["DDP gloo fp32"], times["DDP gloo fp16"]]
        better = min(peers, key=statistics.median)
        best = 0.0
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(better, values, strict=True))
            report.row(size, name, statistics.median(values), min(values), max(values), ratio)
            if name.startswith("Windlass"):
                best = max(best, ratio)
        report.note(f"the better DDP / Windlass over gRPC at {size}M", best)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
