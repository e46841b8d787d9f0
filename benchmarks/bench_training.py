"""Real training steps of the project's GPT: Windlass against PyTorch DDP, two workers on this machine.

A step is 2 micro-batches of 1 x 128 tokens on each of 2 workers with 1 thread, gradients clipped to a global norm,
AdamW. Windlass runs as the launcher starts it (coordinator, shards, workers: processes of their own), computing in
FP32 as a worker does on a CPU, its weights and gradients FP16 on the way. DDP runs as a user would write it, with gloo
and fused AdamW, in FP32 and with its FP16 compression hook: the faster one is the peer. All are started once and
take turns, a few steps each, while the others sleep: a round makes pairs, and only ratios within a round count.

Exposed is what a step takes beyond computing. That is measured in the same rounds, and the same for both: two plain
PyTorch processes, side by side, that run forward and backward of as many micro-batches, exchange nothing and update
nothing. Whatever a system adds (hooks, conversions, threads that compete for the two cores, waiting) is exposed.

Memory is a worker's peak in one more burst, as `benchmarks.support.memory` counts it, above what a process takes
that has imported the same modules, and beyond the activations: those of a plain PyTorch process with the same malloc
settings.

    python benchmarks/bench_training.py [--sizes 10 50] [--rounds 9] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support import memory
from benchmarks.support.activations import activations
from benchmarks.support.bursts import Cluster, Peers, System, median_difference, median_ratio, take_turns
from benchmarks.support.processes import environment, unwind_when_asked_to_go
from benchmarks.support.report import Check, Report
from workers.config import load_job
from workers.launch.environment import MALLOC_TUNABLES
from workers.launch.estimate import estimate

TOKENS_BOUND, EXPOSED_BOUND, MEMORY_BOUND = 1.05, 0.5, 0.65
#: The size at which the memory is held to its bound, in millions of parameters.
MEMORY_SIZE = 50
SEQUENCE, SLOTS, WORKERS = 128, 4, 2
#: Hidden size, layers and heads, by millions of parameters.
SHAPES = {10: (384, 5, 6), 50: (512, 15, 8)}
#: Steps of a burst that count.
STEPS = {10: 8, 50: 3}
ALONE = "computing alone"
PEERS = {"DDP": "ddp", "DDP, FP16 hook": "ddp_fp16"}


@dataclass(frozen=True)
class Setting:
    """What a worker's process runs in, and what it has imported before it begins."""

    environment: dict[str, str]
    imports: tuple[str, ...]


WINDLASS = Setting({**environment(), "GLIBC_TUNABLES": MALLOC_TUNABLES}, ("workers.cli.main", "workers.engine.app"))
#: A user's, with the C library's own malloc settings.
PLAIN = Setting(environment(), ("benchmarks.support.torch_training",))


def job_arguments(size: int) -> list[str]:
    hidden, layers, heads = SHAPES[size]
    return [
        f"data.sequence_length={SEQUENCE}",
        f"model.hidden_size={hidden}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        "batch.micro_batch_size=1",
        f"batch.micro_batches_per_step={SLOTS}",
        f"batch.contributions_per_step={WORKERS}",
    ]


def workers_peak(system: System, steps: int) -> int:
    """The bytes of the worker that takes most during a burst."""
    with memory.Peaks(system.pids) as peaks:
        system.run(steps)
    return max(taken for name, taken in peaks.bytes.items() if name.startswith("worker"))


def floor(setting: Setting, job: list[str], steps: int) -> float:
    """The bytes of a worker's imports and of its activations."""
    taken = activations(job, setting.environment, steps * SLOTS // WORKERS)
    return memory.imports(setting.imports, setting.environment) + taken


def measure(report: Report, size: int, transports: list[str], shards: int, rounds: int) -> None:
    """Add the rows and checks of one size."""
    job, steps = job_arguments(size), STEPS[size]
    with ExitStack() as stack:
        systems: dict[str, System] = {ALONE: stack.enter_context(Peers("alone", job, PLAIN.environment))}
        for name, mode in PEERS.items():
            systems[name] = stack.enter_context(Peers(mode, job, PLAIN.environment))
        for transport in transports:
            cluster = Cluster([*job, f"launch.transport={transport}"], shards, WORKERS)
            systems[f"Windlass, {transport}"] = stack.enter_context(cluster)
        seconds = take_turns(systems, rounds, steps)
        peaks = {name: workers_peak(system, steps) for name, system in systems.items()}
    floors = {Peers: floor(PLAIN, job, rounds * steps), Cluster: floor(WINDLASS, job, rounds * steps)}
    taken = {name: peaks[name] - floors[type(system)] for name, system in systems.items()}
    peer = min(PEERS, key=lambda name: statistics.median(seconds[name]))
    exposed = {name: median_difference(values, seconds[ALONE]) for name, values in seconds.items()}
    parameters = estimate(load_job(None, job)).num_parameters
    for name, values in seconds.items():
        step_s, faster = statistics.median(values), median_ratio(seconds[peer], values)
        report.row(size, name, SLOTS * SEQUENCE / step_s, faster, step_s, exposed[name], taken[name] / parameters)
    best = f"Windlass, {transports[0]}"
    faster = median_ratio(seconds[peer], seconds[best])
    report.check(Check(f"{size}M: tokens/s over DDP's", faster, TOKENS_BOUND, faster >= TOKENS_BOUND))
    part = exposed[best] / exposed[peer]
    report.check(Check(f"{size}M: time exposed over DDP's", part, EXPOSED_BOUND, part <= EXPOSED_BOUND))
    if size == MEMORY_SIZE:
        part = taken[best] / taken[peer]
        report.check(Check(f"{size}M: a worker's memory over DDP's", part, MEMORY_BOUND, part <= MEMORY_BOUND))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES), help="millions")
    parser.add_argument("--transports", nargs="+", choices=["shm", "grpc"], default=["shm", "grpc"])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--short", action="store_true", help="10M over shared memory, 5 rounds")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/training.json"))
    arguments = parser.parse_args()
    if arguments.short:
        arguments.sizes, arguments.transports, arguments.rounds = [10], ["shm"], 5
    unwind_when_asked_to_go()
    columns = ["parameters, M", "system", "tokens/s", "DDP / this", "step s", "exposed s", "memory, B/param"]
    report = Report("training", columns)
    report.note("shards", arguments.shards)
    report.note("rounds", arguments.rounds)
    for size in arguments.sizes:
        measure(report, size, arguments.transports, arguments.shards, arguments.rounds)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
