"""A step across limited links, against the time that its bytes take at the line rate, and against DDP.

Hosts are network namespaces; the line rate is measured with raw TCP in the same round. Workers have their gradients
already, so that a step is push, decision, update and pull. What has to cross: a worker pushes its gradients (2 bytes
per parameter, P of them) to the shards that are not on its host and pulls as much from them, a shard takes and
publishes what belongs to it. For each link and direction these bytes are added up; the fullest one sets the floor:

    decided  (bytes up + bytes down) / line rate      up, then down: nothing is published before all is pushed
    eager    max over directions / line rate          both directions of every link are busy at once

With shards on hosts of their own each worker's link carries 2P bytes up and 2P down: 4P, or 2P for an eager step. DDP's
ring moves 2 (W-1)/W 2P each way: 3P with 4 workers. With a worker and a shard on each of 4 hosts a quarter stays there,
but each direction carries pushes and pulls: 3P for both, which is why an eager step cannot beat DDP's ring there.

Training is measured too: workers with a thread each compute a small GPT, push from gradient hooks and have their
layers wait, over links on which pushing and pulling take about as long as computing. What a decided step takes beyond
computing is exposed; of pushing that should be what backward cannot hide, of pulling what forward cannot:

    max(0, push - backward) + max(0, pull - forward)    with push = pull = bytes / line rate

and at most a tenth of the step beyond that. Forward and backward are measured in the same rounds, in as many plain
PyTorch processes side by side.

    python benchmarks/bench_network.py [--settings pair four training] [--modes decided eager] [--short] [--json FILE]

Needs root, iproute2 and 8 network namespaces; says so and measures nothing where it has not got them.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_memory import write_corpus
from benchmarks.support.compute_alone import Alone, Compute
from benchmarks.support.ddp import run_ddp
from benchmarks.support.hosts import Host, Network, missing
from benchmarks.support.line import line_rate
from benchmarks.support.load_cluster import Layout, Load, run_load, run_training, step_seconds
from benchmarks.support.report import Check, Report
from workers.config import load_job
from workers.launch.estimate import estimate

#: What a job says beside the layout, by mode.
MODES = {
    "decided": ("precision.wire=fp16", "optimizer.clip_norm=1.0"),
    "eager": ("precision.wire=bf16", "optimizer.clip_norm=0"),
}
#: What is measured: gradients that are there already on two networks, and training.
SETTINGS = ["pair", "four", "training"]
#: A step may take so many times its floor.
BOUNDS = {"decided": 1.11, "eager": 1.2}
#: An eager step is at least so many times as fast as DDP with the FP16 compression hook.
DDP_BOUND = 1.3
#: Training: so much of a step may be exposed beyond what computing cannot hide.
EXPOSED_BOUND = 0.1
TRAINING_BITS_PER_S = 500e6
#: The embedding is tied: its gradient is the last to be ready and its weights are needed first, so that they cross
#: beside no computation. A small vocabulary makes it a small part, as it is of a large model.
GPT = (
    "model.hidden_size=384",
    "model.num_layers=6",
    "model.num_heads=6",
    "data.vocab_size=300",
    "data.sequence_length=128",
    "batch.micro_batch_size=4",
    "worker.threads=1",
    # The first steps would only look for the loss scale.
    "precision.loss_scale.initial_power=10",
)
#: Bytes of a gradient or weight on the wire.
WIRE_BYTES = 2
#: The line rate is measured over so much of the link's time.
LINE_S = 1.5


@dataclass(frozen=True)
class Setting:
    """Workers and shards on a network."""

    name: str
    parameters: int
    bits_per_s: float
    layout: Layout


@dataclass(frozen=True)
class Crossing:
    """Bytes that each host sends and receives in a step, by phase."""

    push_out: Counter[Host]
    push_in: Counter[Host]

    @classmethod
    def of(cls, layout: Layout, shard_bytes: Sequence[int]) -> Crossing:
        """Add up what goes from each worker to each shard on another host; pulls are the same the other way.

        Args:
            shard_bytes: of the gradient, by shard.
        """
        out, into = Counter[Host](), Counter[Host]()
        for worker in layout.workers:
            for shard, num_bytes in zip(layout.shards, shard_bytes, strict=True):
                if shard != worker:
                    out[worker] += num_bytes
                    into[shard] += num_bytes
        return cls(out, into)

    def floor_bytes(self, mode: str) -> int:
        """Bytes through the fullest direction of a link, one phase after the other or both at once."""
        if mode == "decided":
            return 2 * max(*self.push_out.values(), *self.push_in.values())
        return max((self.push_out + self.push_in).values())


class Times:
    """Seconds of a step, and how often its floor they are, one of each per round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ratios: list[float] = []

    def note(self, seconds: float, floor_s: float) -> None:
        self.seconds.append(seconds)
        self.ratios.append(seconds / floor_s)

    def row(self, report: Report, setting: str, what: str) -> None:
        ratio = statistics.median(self.ratios)
        seconds = statistics.median(self.seconds)
        report.row(setting, what, seconds, min(self.seconds), max(self.seconds), seconds / ratio, ratio)


def measure(settings: list[Setting], modes: list[str], rounds: int, steps: int, report: Report) -> None:
    """Measure settings that share a network, and DDP on the hosts of the first one's workers; rounds alternate."""
    first = settings[0]
    peers = first.layout.workers
    times = {(setting.name, mode): Times() for setting in settings for mode in modes}
    ring, lines = Times(), []
    for _ in range(rounds):
        host, other = first.layout.workers[0], first.layout.shards[0]
        line = line_rate(host, other, int(LINE_S * first.bits_per_s / 8))
        lines.append(line)
        for setting in settings:
            num_shards = len(setting.layout.shards)
            crossing = Crossing.of(setting.layout, [WIRE_BYTES * setting.parameters // num_shards] * num_shards)
            for mode in modes:
                seconds = step_seconds(run_load(setting.layout, Load(setting.parameters), steps, *MODES[mode]))
                floor_s = crossing.floor_bytes(mode) / line
                times[setting.name, mode].note(statistics.median(seconds), floor_s)
        if len(peers) > 1:
            seconds = run_ddp(peers, first.parameters, steps, compress=True)
            moved = 2 * (len(peers) - 1) / len(peers) * WIRE_BYTES * first.parameters
            ring.note(statistics.median(seconds), moved / line)
    report.note(f"line rate at {first.bits_per_s / 1e6:.0f} Mbit/s, raw TCP, Mbit/s", 8e-6 * statistics.median(lines))
    for setting in settings:
        for mode in modes:
            found = times[setting.name, mode]
            found.row(report, setting.name, mode)
            ratio, bound = statistics.median(found.ratios), BOUNDS[mode]
            name = f"{setting.name}: {mode}, times its bytes at the line rate"
            report.check(Check(name, ratio, bound, ratio <= bound))
    if ring.seconds:
        ring.row(report, first.name, "DDP gloo fp16 hook")
        if "eager" in modes:
            faster = _ratio(ring, times[first.name, "eager"])
            name = f"{first.name}: an eager step, times as fast as DDP with FP16 compression"
            report.check(Check(name, faster, DDP_BOUND, faster >= DDP_BOUND))
        for mode in modes:
            report.note(f"{first.name}: DDP / {mode}", _ratio(ring, times[first.name, mode]))


def _ratio(one: Times, other: Times) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Training:
    """What training took in one round."""

    compute: Compute
    step_s: float
    #: Bytes one way, at the line rate.
    transfer_s: float

    @property
    def exposed_s(self) -> float:
        return self.step_s - self.compute.seconds

    @property
    def allowed_s(self) -> float:
        """Of pushing what backward cannot hide, of pulling what forward cannot."""
        push_s = max(0.0, self.transfer_s - self.compute.backward_s)
        return push_s + max(0.0, self.transfer_s - self.compute.forward_s)

    @property
    def beyond(self) -> float:
        """What is exposed beyond that, as a part of the step."""
        return (self.exposed_s - self.allowed_s) / self.step_s


def measure_training(layouts: list[Layout], rounds: int, steps: int, report: Report) -> None:
    """Measure what a training step takes beyond computing; rounds alternate between layouts and computing alone."""
    found: list[list[Training]] = [[] for _ in layouts]
    with tempfile.TemporaryDirectory(prefix="windlass-network-") as name, ExitStack() as stack:
        text = Path(name) / "text.txt"
        write_corpus(text)
        job = [*GPT, f"data.paths=['{text}']", f"data.cache_dir={Path(name) / 'cache'}", *MODES["decided"]]
        parameters = estimate(load_job(None, job)).num_parameters
        crossings = [Crossing.of(layout, _shard_bytes(job, len(layout.shards))) for layout in layouts]
        alone = [stack.enter_context(Alone(job, len(layout.workers))) for layout in layouts]
        for _ in range(rounds):
            line = line_rate(layouts[0].workers[0], layouts[0].shards[0], int(LINE_S * TRAINING_BITS_PER_S / 8))
            for layout, crossing, computing, rows in zip(layouts, crossings, alone, found, strict=True):
                before = computing.run(steps // 2)
                seconds = step_seconds(run_training(layout, steps, *job))
                transfer_s = crossing.floor_bytes("decided") / 2 / line
                compute = before.mean(computing.run(steps // 2))
                rows.append(Training(compute, statistics.median(seconds), transfer_s))
    for layout, rows in zip(layouts, found, strict=True):
        hosts = f"{len(layout.workers)} + {len(layout.shards)}"
        _report(f"{hosts}, {TRAINING_BITS_PER_S / 1e6:.0f} Mbit/s, GPT of {parameters / 1e6:.1f}M", rows, report)


def _shard_bytes(job: list[str], num_shards: int) -> tuple[int, ...]:
    """What the plan gives each shard: of so few chunks one more than another has is a few percent."""
    return estimate(load_job(None, [*job, f"cluster.shards={num_shards}"])).wire_bytes


def _report(setting: str, rows: list[Training], report: Report) -> None:
    def median(of: Callable[[Training], float]) -> float:
        return statistics.median(of(training) for training in rows)

    times = Times()
    for training in rows:
        times.note(training.step_s, training.compute.seconds + training.allowed_s)
    times.row(report, setting, "training")
    report.note(f"{setting}: forward alone, s", median(lambda training: training.compute.forward_s))
    report.note(f"{setting}: backward alone, s", median(lambda training: training.compute.backward_s))
    report.note(f"{setting}: bytes one way at the line rate, s", median(lambda training: training.transfer_s))
    report.note(f"{setting}: exposed, s", median(lambda training: training.exposed_s))
    report.note(f"{setting}: what computing cannot hide, s", median(lambda training: training.allowed_s))
    if all(training.allowed_s for training in rows):
        ratio = median(lambda training: training.exposed_s / training.allowed_s)
        report.note(f"{setting}: exposed, times what computing cannot hide", ratio)
    beyond = median(lambda training: training.beyond)
    name = f"{setting}: time exposed beyond what computing cannot hide, part of the step"
    report.check(Check(name, beyond, EXPOSED_BOUND, beyond <= EXPOSED_BOUND))


def _pair(hosts: list[Host]) -> list[Setting]:
    """One worker, one shard."""
    worker, shard = hosts
    return [Setting("1 + 1, 1 Gbit/s, 25M", 25_000_000, 1e9, Layout(shard, [shard], [worker]))]


def _four(hosts: list[Host]) -> list[Setting]:
    """Four workers and four shards: on hosts of their own, then two and two on a host."""
    workers, shards = hosts[:4], hosts[4:]
    return [
        Setting("4 + 4 on 8 hosts, 200 Mbit/s, 5M", 5_000_000, 200e6, Layout(shards[0], shards, workers)),
        Setting("4 + 4 on 4 hosts, 200 Mbit/s, 5M", 5_000_000, 200e6, Layout(workers[0], workers, workers)),
    ]


def _training(hosts: list[Host]) -> list[Layout]:
    """One worker and one shard, two and two; all on hosts of their own, which share this machine's cores."""
    first, second, third, fourth = hosts
    return [Layout(third, [third], [first]), Layout(third, [third, fourth], [first, second])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="steps, without training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--short", action="store_true", help="2 rounds of 4 steps")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/network.json"))
    arguments = parser.parse_args()
    rounds, steps = (2, 4) if arguments.short else (arguments.rounds, arguments.steps)
    # So that the network is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("network", ["setting", "step", "median s", "min s", "max s", "floor s", "times its floor"])
    lacking = missing()
    if lacking is not None:
        report.note("skipped", lacking)
        report.finish(arguments.json)
    if "pair" in arguments.settings:
        with Network(2, 1e9) as network:
            measure(_pair(network.hosts), arguments.modes, rounds, steps, report)
    if "four" in arguments.settings:
        with Network(8, 200e6) as network:
            measure(_four(network.hosts), arguments.modes, rounds, steps, report)
    if "training" in arguments.settings:
        with Network(4, TRAINING_BITS_PER_S) as network:
            measure_training(_training(network.hosts), rounds, steps, report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
