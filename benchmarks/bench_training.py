"""Real training steps of the project's GPT: Windlass against PyTorch DDP, two workers on this machine.

A step is 2 micro-batches of 1 x 128 tokens on each of 2 workers with 1 thread, gradients clipped to a global
norm, AdamW. Windlass runs as the launcher starts it (coordinator, shards, workers: processes of their own), its
weights and gradients FP16 on the way; DDP as a user would write it (`benchmarks.support.ddp_training`), in FP32 and
with the FP16 compression hook: the better one is the peer. All are started once and then take turns, a few steps
each, while the others sleep: a round is one pair, and only ratios within a round count.

What is exposed is what a step takes beyond computing. Computing is measured in the same rounds, the same way for
both: two plain PyTorch processes, side by side, that run forward and backward of the same micro-batches, exchange
nothing and update nothing. Whatever a system adds (hooks, copies, threads that compete with the computation for the
two cores, waiting) is exposed. What Windlass's workers say of it themselves (`step_seconds` less `compute_seconds`,
which leaves out what slows the computation down) is in the notes.

Memory is the peak of each process during a few more steps, as `benchmarks.support.memory` counts it, above what a
process takes that has imported the same modules. A worker's activations are measured apart, in a plain PyTorch
process with the same malloc settings, and subtracted.

    python benchmarks/bench_training.py [--sizes 10 50] [--rounds 9] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.support import memory
from benchmarks.support.bursts import Cluster, Peers, System
from benchmarks.support.processes import environment
from benchmarks.support.report import Check, Report
from workers.launch.environment import MALLOC_TUNABLES

TOKENS_BOUND, EXPOSED_BOUND, MEMORY_BOUND = 1.05, 0.5, 0.65
#: The size at which the memory is held to its bound, in millions of parameters.
MEMORY_SIZE = 50
VOCAB_SIZE = 4096
SEQUENCE = 128
SLOTS, WORKERS = 4, 2
#: Hidden size, layers and heads, by millions of parameters.
SHAPES = {10: (384, 5, 6), 50: (512, 15, 8)}
#: Steps of a burst that count, by millions of parameters.
STEPS = {10: 8, 50: 3}
WORKER_IMPORTS = ("workers.cli.main", "workers.engine.app")
PEER_IMPORTS = ("benchmarks.support.ddp_training",)
PEERS = {"DDP fp32": "fp32", "DDP fp16 hook": "fp16"}
ALONE = "computing alone"


@dataclass
class Measured:
    """What was seen of one system."""

    #: Seconds of a step, one mean for each round.
    seconds: list[float] = field(default_factory=list)
    #: Step less compute in the words of Windlass's own metrics, one mean for each round.
    said: list[float] = field(default_factory=list)
    #: Peak bytes of each process, above what its imports take.
    bytes: dict[str, int] = field(default_factory=dict)


def job_arguments(size: int, folder: Path) -> list[str]:
    hidden, layers, heads = SHAPES[size]
    return [
        f"data.cache_dir={folder / 'data'}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.sequence_length={SEQUENCE}",
        f"model.hidden_size={hidden}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        "batch.micro_batch_size=1",
        f"batch.micro_batches_per_step={SLOTS}",
        f"batch.contributions_per_step={WORKERS}",
    ]


def peer_environment() -> dict[str, str]:
    """A user's: with the C library's own malloc settings."""
    return {name: value for name, value in environment().items() if name != "GLIBC_TUNABLES"}


def parameters_of(size: int, job: list[str]) -> int:
    from workers.config import load_job
    from workers.launch.estimate import estimate

    del size
    return estimate(load_job(None, job), VOCAB_SIZE).num_parameters


def activations(job: list[str], env: Mapping[str, str], times: int) -> float:
    """Bytes; the median of 3 processes."""
    command = [sys.executable, "-m", "benchmarks.support.activations", json.dumps(job), str(VOCAB_SIZE), str(times)]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(int(run.stdout) for run in runs)


def measure(systems: Mapping[str, System], rounds: int, steps: int) -> dict[str, Measured]:
    """Let the systems take turns; every second round in the reverse order."""
    found = {name: Measured() for name in systems}
    for number in range(rounds):
        for name in list(systems)[:: -1 if number % 2 else 1]:
            system, measured = systems[name], found[name]
            if isinstance(system, Cluster):
                lines = system.lines(steps)
                measured.seconds.append(statistics.fmean(line["step_seconds"] for line in lines))
                measured.said.append(
                    statistics.fmean(line["step_seconds"] - line["compute_seconds"] for line in lines)
                )
            else:
                measured.seconds.append(statistics.fmean(system.run(steps)))
    for name, system in systems.items():
        with memory.Peaks(system.pids) as peaks:
            system.run(steps)
        found[name].bytes = peaks.bytes
    return found


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def size_of(report: Report, size: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Measure one size, and add its rows, notes and checks."""
    job = job_arguments(size, folder)
    plain = peer_environment()
    tuned = {**environment(), "GLIBC_TUNABLES": MALLOC_TUNABLES}
    with ExitStack() as stack:
        systems: dict[str, System] = {ALONE: stack.enter_context(Peers("alone", VOCAB_SIZE, job, plain))}
        for transport in arguments.transports:
            cluster = Cluster([*job, f"launch.transport={transport}"], arguments.shards, WORKERS)
            systems[f"Windlass {transport}"] = stack.enter_context(cluster)
        for name, mode in PEERS.items():
            systems[name] = stack.enter_context(Peers(mode, VOCAB_SIZE, job, plain))
        found = measure(systems, arguments.rounds, arguments.steps or STEPS[size])
    parameters = parameters_of(size, job)
    floors = {"Windlass": memory.imports(WORKER_IMPORTS, tuned), "DDP": memory.imports(PEER_IMPORTS, plain)}
    times = (arguments.rounds + 1) * SLOTS // WORKERS
    active = {"Windlass": activations(job, tuned, times), "DDP": activations(job, plain, times)}
    report.note(f"{size}M: a worker's imports, MB", {name: round(value / 1e6) for name, value in floors.items()})
    report.note(f"{size}M: a worker's activations, MB", {name: round(value / 1e6) for name, value in active.items()})
    alone = found[ALONE].seconds
    exposed = {
        name: statistics.median(a - b for a, b in zip(measured.seconds, alone, strict=True))
        for name, measured in found.items()
    }
    beyond: dict[str, float] = {}
    for name, measured in found.items():
        kind = "Windlass" if name.startswith("Windlass") else "DDP"
        worker = max(taken for process, taken in measured.bytes.items() if process.startswith("worker"))
        beyond[name] = worker - floors[kind] - active[kind]
        seconds = statistics.median(measured.seconds)
        tokens = SLOTS * SEQUENCE / seconds
        report.row(
            size, name, tokens, seconds, exposed[name], (worker - floors[kind]) / 1e6, beyond[name] / parameters
        )
        if measured.said:
            report.note(f"{size}M: {name}: step less compute by its own metrics, s", statistics.median(measured.said))
        others = {p: round(v / 1e6) for p, v in measured.bytes.items() if not p.startswith("worker")}
        if others:
            report.note(f"{size}M: {name}: the other processes, MB with their imports", others)
    better = min(PEERS, key=lambda name: statistics.median(found[name].seconds))
    report.note(f"{size}M: the better peer", better)
    for transport in arguments.transports:
        name = f"Windlass {transport}"
        faster = median_ratio(found[better].seconds, found[name].seconds)
        part = exposed[name] / exposed[better]
        leaner = beyond[name] / beyond[better]
        if transport == "shm":
            report.check(Check(f"{size}M: tokens/s, of DDP's", faster, TOKENS_BOUND, faster >= TOKENS_BOUND))
            report.check(Check(f"{size}M: exposed time, of DDP's", part, EXPOSED_BOUND, part <= EXPOSED_BOUND))
            if size == MEMORY_SIZE:
                ok = leaner <= MEMORY_BOUND
                report.check(Check(f"{size}M: a worker's memory, of DDP's", leaner, MEMORY_BOUND, ok))
        else:
            report.note(f"{size}M: {name}: tokens/s, exposed time, memory, of DDP's", [faster, part, leaner])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SHAPES), help="millions of parameters")
    parser.add_argument("--transports", nargs="+", choices=["shm", "grpc"])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="pairs; 9")
    parser.add_argument("--steps", type=int, help="of each system in a round")
    parser.add_argument("--short", action="store_true", help="10M over shared memory only, 5 rounds")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/training.json"))
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or ([10] if arguments.short else [10, 50])
    arguments.transports = arguments.transports or (["shm"] if arguments.short else ["shm", "grpc"])
    arguments.rounds = arguments.rounds or (5 if arguments.short else 9)
    columns = ["parameters, M", "system", "tokens/s", "step s", "exposed s", "worker MB", "B/param beyond activations"]
    report = Report("training", columns)
    report.note("shards", arguments.shards)
    report.note("rounds", arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="windlass-training-") as name:
        for size in arguments.sizes:
            size_of(report, size, arguments, Path(name))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
