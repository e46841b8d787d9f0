"""The optimizer step of a shard: its two passes over memory, against loops of the same bytes and against peers.

Two FP16 gradients in, their mean with statistics (reduce); AdamW, the weights in FP16, the state hash (apply). The
peers are PyTorch's fused AdamW and DeepSpeed's CPU Adam (skipped where deepspeed is not installed), with the
conversions that they need. All contenders take turns in every round, in an order that rotates, on the same arrays;
ratios are medians over the rounds. Two processes at once show what is left when the memory is shared: their time per
parameter is that of both together.

    python benchmarks/bench_optimizer.py [--short] [--paths] [--sizes 10 50] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.support.report import Check, Report

REDUCE_BOUND = 1.3
APPLY_BOUND = 1.1
#: How many times as fast as a peer on whole tensors, and in pieces that take a norm.
WHOLE_BOUND = 2.2
PIECES_BOUND = 1.0
LOOPS = {"reduce": "reduce's loop", "apply": "apply's loop", "encode": "encode's loop", "decode": "decode's loop"}
DEADLINE_S = 600.0

#: Seconds of each round, by contender.
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """What one group of rows was measured with."""

    millions: int
    processes: int

    @property
    def name(self) -> str:
        return f"{self.millions}M, {self.processes} process{'es' if self.processes > 1 else ''}"


def rounds_of(passes: dict[str, Any], rounds: int, barrier: Any) -> Times:
    """Time every pass once a round, together with the other processes; the first round only warms up."""
    names = list(passes)
    times: Times = {name: [] for name in names}
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            barrier.wait(DEADLINE_S)
            begin = time.perf_counter()
            passes[name]()
            times[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in times.items()}


def contender(size: int, rounds: int, paths: bool, barrier: Any, results: Any) -> None:
    """One process: everything on arrays of its own."""
    from benchmarks.support.optimizer_passes import Problem, other_paths, passes

    problem = Problem(size)
    if paths:
        loop = {"apply's loop": passes(problem)["apply's loop"]}
        chosen = loop | {name: work for name, (_, work) in other_paths(problem).items()}
    else:
        from benchmarks.support.optimizer_peers import peers

        chosen = passes(problem) | peers(problem)
    results.put(rounds_of(chosen, rounds, barrier))


def measure(setting: Setting, rounds: int, *, paths: bool = False) -> Times:
    """Return nanoseconds per parameter of all processes together, by contender and round."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(setting.processes), context.Queue()
    size = setting.millions * 1_000_000 // 64 * 64
    arguments = (size, rounds, paths, barrier, results)
    processes = [context.Process(target=contender, args=arguments, daemon=True) for _ in range(setting.processes)]
    for process in processes:
        process.start()
    try:
        found: list[Times] = [results.get(timeout=DEADLINE_S) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    parameters = size * setting.processes
    return {
        name: [1e9 * max(values) / parameters for values in zip(*(times[name] for times in found), strict=True)]
        for name in found[0]
    }


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def add_rows(report: Report, setting: Setting, times: Times) -> None:
    together = [a + b for a, b in zip(times["reduce"], times["apply"], strict=True)]
    rows = {name: (values, LOOPS.get(name)) for name, values in times.items()}
    for name, (values, loop) in ({"reduce + apply": (together, None)} | rows).items():
        of_loop = ratio(values, times[loop]) if loop else ""
        is_peer = name.startswith(("torch", "DeepSpeed"))
        of_ours = ratio(values, together) if is_peer else ""
        report.row(
            setting.millions,
            setting.processes,
            name,
            statistics.median(values),
            min(values),
            max(values),
            of_loop,
            of_ours,
        )
    for name, bound in (("reduce", REDUCE_BOUND), ("apply", APPLY_BOUND)):
        value = ratio(times[name], times[LOOPS[name]])
        report.check(Check(f"{name} / its loop, {setting.name}", value, bound, value <= bound))
    for peer in ("torch", "DeepSpeed"):
        for kind, bound in (("whole", WHOLE_BOUND), ("pieces, norm", PIECES_BOUND)):
            if f"{peer}, {kind}" in times:
                value = ratio(times[f"{peer}, {kind}"], together)
                ok = value >= bound if kind == "whole" else value > bound
                report.check(Check(f"{peer}, {kind} / reduce + apply, {setting.name}", value, bound, ok))


def add_paths(report: Report, setting: Setting, times: Times) -> None:
    """Other wire formats, optimizers and numbers of gradients: time per byte, relative to apply's loop."""
    from benchmarks.support.optimizer_passes import Problem, other_paths

    loop = times.pop("apply's loop")
    sizes = {name: size for name, (size, _) in other_paths(Problem(64)).items()}
    for name, values in times.items():
        of_loop = ratio([value / sizes[name] for value in values], [value / 30 for value in loop])
        middle = statistics.median(values)
        report.row(setting.millions, setting.processes, name, middle, min(values), max(values), of_loop, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50], help="millions of parameters")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--short", action="store_true", help="10M, 1 process and 5 rounds")
    parser.add_argument("--paths", action="store_true", help="other formats and optimizers too, per byte that moves")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/optimizer.json"))
    arguments = parser.parse_args()
    if arguments.short:
        arguments.sizes, arguments.processes, arguments.rounds = [10], [1], 5
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))
    columns = ["parameters, M", "processes", "pass", "median ns/parameter", "min", "max", "/ its loop", "/ Windlass"]
    report = Report("optimizer", columns)
    for millions in arguments.sizes:
        for processes in arguments.processes:
            setting = Setting(millions, processes)
            add_rows(report, setting, measure(setting, arguments.rounds))
        if arguments.paths:
            setting = Setting(millions, 1)
            add_paths(report, setting, measure(setting, arguments.rounds, paths=True))
    try:
        report.note("deepspeed", version("deepspeed"))
    except ModuleNotFoundError:
        report.note("deepspeed", "not installed: its rows are skipped")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
