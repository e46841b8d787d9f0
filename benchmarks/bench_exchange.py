"""Exchange and update alone: from FP32 gradients present to weights updated, 2 workers, conversions included.

Windlass (real coordinator, shards and sessions; torch-free workers whose gradients are there already)
against PyTorch DDP with gloo and fused AdamW, FP32 and with the FP16 compression hook. Rounds of both
alternate in one run; the ratio is what counts, since the machine's speed drifts.

    python benchmarks/bench_exchange.py [--sizes 10 50] [--shards 1 2] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.support.report import Report
from workers.launch.environment import MALLOC_TUNABLES

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 180.0


def environment() -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**os.environ, **one, "GLIBC_TUNABLES": MALLOC_TUNABLES, "PYTHONPATH": str(ROOT)}


def run_windlass(parameters: int, shards: int, steps: int) -> list[float]:
    """Start a cluster, let it do `steps` steps, and return the seconds of each but the first two."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        cli = [sys.executable, "-m", "workers.cli.main"]
        job = [
            f"run_dir={run}",
            f"cluster.shards={shards}",
            "cluster.workers=2",
            f"training.steps={steps + 2}",
            "batch.micro_batches_per_step=2",
            "telemetry.metrics=false",
            "evaluation.every_steps=0",
        ]
        processes = [subprocess.Popen([*cli, "coordinator", *job], env=environment(), stderr=subprocess.DEVNULL)]
        try:
            address = _address(run)
            for index in range(shards):
                command = [*cli, "shard", "--coordinator", address, "--index", str(index)]
                processes.append(subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL))
            for rank in range(2):
                command = [sys.executable, "-m", "benchmarks.support.load_worker", address, str(rank)]
                command.append(str(parameters))
                processes.append(subprocess.Popen(command, env=environment()))
            processes[0].wait(DEADLINE_S)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            return [line["step_seconds"] for line in lines if line["kind"] == "step"][2:]
        finally:
            for process in reversed(processes):
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _address(run: Path) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            return str(json.loads((run / "cluster.json").read_text())[0]["address"])
        except (OSError, ValueError, IndexError):
            time.sleep(0.02)
    raise SystemExit("the coordinator did not start")


def run_ddp(parameters: int, steps: int, mode: str) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.support.ddp_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(parameters), str(steps), mode, str(port)],
            env={key: value for key, value in environment().items() if key != "GLIBC_TUNABLES"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    return [float(value) for value in outputs[0].split()]


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
                times.setdefault(name, []).append(statistics.median(run_ddp(parameters, arguments.steps, mode)))
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
