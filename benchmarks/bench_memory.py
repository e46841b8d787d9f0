"""Bytes per parameter of a shard and of a worker, at 50M parameters.

A real cluster (1 shard, 2 workers, C = 2, AdamW, FP16 wire, FP32 compute on the CPU) trains for a few
steps between checkpoints. The resident memory of every process is compared with that of an idle process
of the same role: one of a cluster with a model of next to nothing, in which everything is imported,
compiled and connected. What a worker's activations take is measured apart, in plain PyTorch, and
subtracted. What `windlass validate` says of the same job is held against each process as a whole.

    python benchmarks/bench_memory.py [--json FILE] [--layers 10]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support.activations import activations
from benchmarks.support.device_memory import resident
from benchmarks.support.processes import environment
from benchmarks.support.report import Check, Report
from workers.launch.environment import MALLOC_TUNABLES

SHARD_BOUND = 22.0
WORKER_BOUND = 8.0
#: How far `windlass validate` may be from what was measured, as a part of it.
ESTIMATE_BOUND = 0.15
STEPS = 10


def write_corpus(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 8))) for _ in range(300)]
    path.write_text("\n".join(" ".join(draw.choice(words) for _ in range(12)) for _ in range(4000)))


def job_arguments(folder: Path, layers: int, hidden: int = 640) -> list[str]:
    return [
        f"run_dir={folder / 'run'}",
        f"data.paths=['{folder / 'text.txt'}']",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_size=300",
        "data.sequence_length=64",
        "cluster.shards=1",
        "cluster.workers=2",
        f"model.num_layers={layers}",
        f"model.hidden_size={hidden}",
        "model.num_heads=8",
        "batch.micro_batch_size=1",
        "batch.micro_batches_per_step=4",
        "batch.contributions_per_step=2",
        "training.steps=1000",
        f"training.stop_at={STEPS}",
        "evaluation.max_sequences=4",
        # What is shared would count in every process that maps it.
        "launch.transport=grpc",
    ]


def members(run: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads((run / "cluster.json").read_text())
    except (OSError, ValueError):
        return []
    return found


def measure(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Run a cluster and sample its processes until it ends."""
    run = Path(next(a for a in reversed(arguments) if a.startswith("run_dir=")).removeprefix("run_dir="))
    log = (folder / "out.log").open("w")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "workers.cli.main", "train", *arguments],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    peaks: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + 500
    try:
        while launcher.poll() is None and time.monotonic() < deadline:
            versions = _steps(run)
            for member in members(run):
                name = f"{member['role']}-{member['rank']}"
                try:
                    rss, peak = resident(member["pid"], "VmRSS"), resident(member["pid"], "VmHWM")
                except (OSError, KeyError):
                    continue
                seen = peaks.setdefault(name, {"peak": 0.0, "steady": 0.0})
                seen["peak"] = max(seen["peak"], peak)
                if 3 <= versions < STEPS - 1:
                    seen["steady"] = max(seen["steady"], rss)
            time.sleep(0.02)
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(60)
    if launcher.returncode:
        raise SystemExit((folder / "out.log").read_text()[-2000:])
    return {f"{name}/{key}": value for name, seen in peaks.items() for key, value in seen.items()}


def estimates(arguments: list[str]) -> dict[str, int]:
    """What `windlass validate` says that each process takes, in bytes."""
    from workers.config import load_job
    from workers.launch.estimate import estimate

    found = estimate(load_job(None, arguments))
    roles = {"coordinator-0": found.coordinator, "shard-0": found.shards[0]}
    roles |= {f"worker-{rank}": found.worker for rank in range(len(found.contributions))}
    return {name: role.num_bytes for name, role in roles.items()}


def _steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"kind": "step"')
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/memory.json"))
    parser.add_argument("--layers", type=int, default=10)
    arguments = parser.parse_args()
    report = Report("memory", ["role", "idle MB", "steady MB", "peak MB", "steady B/param", "peak B/param"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "text.txt")
        job = job_arguments(folder, arguments.layers)
        # 4 micro-batches of a step are shared by 2 workers.
        env = environment(GLIBC_TUNABLES=MALLOC_TUNABLES)
        active = activations(job, env, STEPS * 4 // 2)
        idle = measure(
            folder, [*job_arguments(folder, 1, hidden=64), f"run_dir={folder / 'idle'}", "training.stop_at=300"]
        )
        found = measure(folder, job)
        manifest = json.loads(next((folder / "run" / "checkpoints").glob("step-*/manifest.json")).read_text())
    parameters = sum(math.prod(shape) for _, shape, _ in manifest["table"])
    for member in ("shard-0", "worker-0", "worker-1"):
        worker = member.startswith("worker")
        floor = idle[f"{member}/peak"] + (active if worker else 0)
        steady = (found[f"{member}/steady"] - floor) / parameters
        peak = (found[f"{member}/peak"] - floor) / parameters
        report.row(
            member,
            idle[f"{member}/peak"] / 1e6,
            found[f"{member}/steady"] / 1e6,
            found[f"{member}/peak"] / 1e6,
            steady,
            peak,
        )
        bound = WORKER_BOUND if worker else SHARD_BOUND
        report.check(Check(f"{member}: bytes per parameter outside snapshots", steady, bound, steady <= bound))
    for member, expected in estimates(job).items():
        measured = found[f"{member}/steady"]
        off = abs(expected / measured - 1)
        name = f"{member}: the estimate, {expected / 1e6:.0f} MB, off from {measured / 1e6:.0f} MB by"
        report.check(Check(name, off, ESTIMATE_BOUND, off <= ESTIMATE_BOUND))
    report.note("parameters", parameters)
    report.note("activations of a worker, MB", active / 1e6)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
