"""FP16 training of a GPT on one GPU, its optimizer in a shard on the same host: against torch AMP and fused AdamW.

A step is 8 micro-batches of 4 x 1024 tokens on one worker. Windlass keeps FP16 weights and gradients on the device
(gradients that add up in FP16, or in FP32); torch keeps FP32 weights, gradients and moments there and casts. All are
started once and take turns, as in `bench_training`. Exposed is what a step takes beyond forward and backward of the
same micro-batches in a plain PyTorch process, in FP16, measured in the same rounds.

Bytes of the device are the most that torch had allocated in a burst, less the activations: the peak of forward and
backward beyond FP16 weights and gradients in a plain process.

Without CUDA it measures nothing, says so and succeeds. All systems of 1.3B together take some 80 GB of the
device and 70 GB of the host.

    python benchmarks/bench_gpu.py [--sizes 350 1300] [--rounds 5] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.support.activations import activations
from benchmarks.support.bursts import DeviceCluster, Peers, median_difference, take_turns
from benchmarks.support.processes import environment, unwind_when_asked_to_go
from benchmarks.support.report import Check, Report
from workers.config import load_job
from workers.launch.environment import MALLOC_TUNABLES
from workers.launch.estimate import estimate

#: Bytes of the device per parameter, by what gradients add up in.
BOUNDS = {"fp16": 4.2, "fp32": 6.2}
#: Hidden size, layers and heads, by millions of parameters; 0: for a dry run.
SHAPES = {0: (64, 2, 2), 350: (1024, 27, 16), 1300: (2048, 26, 16)}
SLOTS = 8
#: Sequences of a micro-batch, and their tokens; and for a dry run.
MICRO_BATCH, SEQUENCE = 4, 1024
DRY_MICRO_BATCH, DRY_SEQUENCE = 1, 16
STEPS = 3
ALONE, AMP = "computing alone", "torch AMP, fused AdamW"


def job_arguments(size: int, threads: int) -> list[str]:
    hidden, layers, heads = SHAPES[size]
    return [
        f"data.sequence_length={SEQUENCE if size else DRY_SEQUENCE}",
        f"model.hidden_size={hidden}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        f"batch.micro_batch_size={MICRO_BATCH if size else DRY_MICRO_BATCH}",
        f"batch.micro_batches_per_step={SLOTS}",
        "batch.contributions_per_step=1",
        f"cluster.threads_per_shard={threads}",
        "precision.compute=fp16",
    ]


def measure(report: Report, size: int, device: str, rounds: int, threads: int) -> None:
    """Add the rows of one size, and its checks unless it is a dry run."""
    job, env = job_arguments(size, threads), environment()
    tuned = environment(GLIBC_TUNABLES=MALLOC_TUNABLES, WINDLASS_LOG_LEVEL="warning")
    with ExitStack() as stack:
        systems: dict[str, DeviceCluster | Peers] = {
            ALONE: stack.enter_context(Peers("alone", job, env, world_size=1, device=device)),
            AMP: stack.enter_context(Peers("amp", job, env, world_size=1, device=device)),
        }
        for dtype in BOUNDS:
            cluster = DeviceCluster([*job, f"precision.accumulate={dtype}"], 1, device, tuned)
            systems[windlass(dtype)] = stack.enter_context(cluster)
        seconds = take_turns(systems, rounds, STEPS)
        peaks = {name: system.peak_bytes for name, system in systems.items()}
    active = activations(job, env, SLOTS, device, "float16")
    parameters = estimate(load_job(None, job)).num_parameters
    taken = {name: (peak - active) / parameters for name, peak in peaks.items()}
    tokens = SLOTS * (MICRO_BATCH * SEQUENCE if size else DRY_MICRO_BATCH * DRY_SEQUENCE)
    for name, values in seconds.items():
        step_s = statistics.median(values)
        report.row(size, name, tokens / step_s, step_s, median_difference(values, seconds[ALONE]), taken[name])
    report.note(f"{size}M: activations, MB", active / 1e6)
    for dtype, bound in BOUNDS.items():
        if size:
            value = taken[windlass(dtype)]
            name = f"{size}M: bytes of the device per parameter beyond activations, gradients in {dtype}"
            report.check(Check(name, value, bound, value <= bound))


def windlass(dtype: str) -> str:
    return f"Windlass, gradients in {dtype}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=[350, 1300], default=[350, 1300], help="millions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="of the shard")
    parser.add_argument("--short", action="store_true", help="350M, 2 rounds")
    # Everything but the device: a tiny model on the CPU. Its figures mean nothing, and nothing is checked.
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/gpu.json"))
    arguments = parser.parse_args()
    if arguments.short:
        arguments.sizes, arguments.rounds = [350], 2
    unwind_when_asked_to_go()
    report = Report("gpu", ["parameters, M", "system", "tokens/s", "step s", "exposed s", "device B/param"])
    report.note("threads of the shard", arguments.threads)
    if arguments.dry_run:
        report.note("dry run", "a tiny model on the CPU; the figures mean nothing")
        measure(report, 0, "cpu", rounds=1, threads=1)
    elif torch.cuda.is_available():
        report.note("device", torch.cuda.get_device_name())
        for size in arguments.sizes:
            measure(report, size, "cuda", arguments.rounds, arguments.threads)
    else:
        report.note("skipped", "torch sees no CUDA device here")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
