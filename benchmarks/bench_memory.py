"""Bytes per parameter of a shard and of a worker, at 50M parameters.

A real cluster (1 shard, 2 workers, C = 2, AdamW, FP16 wire, FP32 compute on the CPU) trains for a few
steps between checkpoints. For every process the peak of its resident memory is compared with that of
an idle process of the same role (everything imported, kernels ready, connected, no plan yet). What a
worker's activations take is measured apart, in plain PyTorch, and subtracted.

    python benchmarks/bench_memory.py [--json FILE] [--layers 10]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support.report import Check, Report

SHARD_BOUND = 22.0
WORKER_BOUND = 8.0


def memory_of(pid: int, key: str) -> int:
    """Resident memory in bytes: VmRSS now, VmHWM at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def write_corpus(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 8))) for _ in range(300)]
    path.write_text("\n".join(" ".join(draw.choice(words) for _ in range(12)) for _ in range(4000)))


_ACTIVATIONS = """
import sys, json, torch
from pathlib import Path
from workers.config import load_job
from workers.models.gpt import GPT
torch.set_num_threads(1)
job = load_job(None, json.loads(sys.argv[1]))
model = GPT(job.model, 300, job.data.sequence_length)
for p in model.parameters():
    p.grad = torch.zeros_like(p).add_(1.0)
def rss(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
Path("/proc/self/clear_refs").write_text("5")
before = rss("VmRSS:")
for _ in range(3):
    tokens = torch.randint(0, 300, (job.batch.micro_batch_size, job.data.sequence_length + 1))
    model.loss(tokens).backward()
print(rss("VmHWM:") - before)
"""

_IDLE_WORKER = """
import sys
import workers.engine.app
from ps.kernels.compile import warm_up_worker
from ps.types import WireDtype
from ps.wire.options import open_channel
import torch
torch.set_num_threads(1)
torch.ones(8, 8).requires_grad_().matmul(torch.ones(8, 8)).sum().backward()
warm_up_worker(WireDtype.FP16)
channel = open_channel("127.0.0.1:1")
from pathlib import Path
print(next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS:")))
"""


def job_arguments(folder: Path, layers: int) -> list[str]:
    return [
        f"run_dir={folder / 'run'}",
        f"data.paths=['{folder / 'text.txt'}']",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_size=300",
        "data.sequence_length=64",
        "cluster.shards=1",
        "cluster.workers=2",
        f"model.num_layers={layers}",
        "model.hidden_size=640",
        "model.num_heads=8",
        "batch.micro_batch_size=1",
        "batch.micro_batches_per_step=4",
        "batch.contributions_per_step=2",
        "training.steps=1000",
        "training.stop_at=8",
        "evaluation.max_sequences=4",
    ]


def python(code: str, *arguments: str) -> int:
    environment = {**os.environ, **_tunables()}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=True
    )
    return int(run.stdout.split()[-1])


def _tunables() -> dict[str, str]:
    from workers.launch.environment import MALLOC_TUNABLES

    return {"GLIBC_TUNABLES": MALLOC_TUNABLES}


def members(run: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads((run / "cluster.json").read_text())
    except (OSError, ValueError):
        return []
    return found


def measure(folder: Path, layers: int) -> dict[str, float]:
    """Run the cluster and sample its processes until it ends."""
    run = folder / "run"
    log = (folder / "out.log").open("w")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "workers.cli.main", "train", *job_arguments(folder, layers)],
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
                    rss, peak = memory_of(member["pid"], "VmRSS"), memory_of(member["pid"], "VmHWM")
                except (OSError, KeyError):
                    continue
                seen = peaks.setdefault(name, {"idle": rss, "peak": 0.0, "steady": 0.0})
                seen["peak"] = max(seen["peak"], peak)
                if 3 <= versions < 7:
                    seen["steady"] = max(seen["steady"], rss)
            time.sleep(0.02)
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(60)
    if launcher.returncode:
        raise SystemExit((folder / "out.log").read_text()[-2000:])
    return {f"{name}/{key}": value for name, seen in peaks.items() for key, value in seen.items()}


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
        idle_worker = python(_IDLE_WORKER)
        activations = python(_ACTIVATIONS, json.dumps(job_arguments(folder, arguments.layers)))
        found = measure(folder, arguments.layers)
        manifest = json.loads(next((folder / "run" / "checkpoints").glob("step-*/manifest.json")).read_text())
    parameters = sum(_size(shape) for _, shape, _ in manifest["table"])
    for member in sorted({key.split("/")[0] for key in found}):
        if member == "coordinator-0":
            continue
        worker = member.startswith("worker")
        idle = idle_worker if worker else found[f"{member}/idle"]
        extra = activations if worker else 0
        steady = (found[f"{member}/steady"] - idle - extra) / parameters
        peak = (found[f"{member}/peak"] - idle - extra) / parameters
        report.row(
            member, idle / 1e6, found[f"{member}/steady"] / 1e6, found[f"{member}/peak"] / 1e6, steady, peak
        )
        bound = WORKER_BOUND if worker else SHARD_BOUND
        report.check(Check(f"{member}: bytes per parameter outside snapshots", steady, bound, steady <= bound))
    report.note("parameters", parameters)
    report.note("activations of a worker, MB", activations / 1e6)
    report.finish(arguments.json)


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


if __name__ == "__main__":
    main()
