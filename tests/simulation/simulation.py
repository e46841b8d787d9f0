"""One run of Windlass from a seed: real coordinator, shards and workers on a simulated machine."""

from __future__ import annotations

import functools
import gc
import json
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ps.config import RunConfig, validate
from ps.coordinator.recorder import METRICS_NAME
from ps.storage import layout
from tests.simulation import faults, patches, scheduler, sequential
from tests.simulation.cluster import Cluster
from tests.simulation.disk import Disk
from tests.simulation.faults import Fault
from tests.simulation.invariants import Watch
from tests.simulation.network import Network, Weather
from tests.simulation.scheduler import Scheduler
from tests.simulation.sequential import Truth

SHARDS, WORKERS, STEPS = 2, 3, 22
#: A run that has not ended by then, in simulated seconds, hangs.
DEADLINE_S = 300.0
#: Messages of a run without faults; and the faults of another, at least and at most.
MESSAGES = 1_300
FAULTS = (5, 10)
#: The part of the seeds with durability=journal.
WITH_JOURNAL = 0.35
#: What a kernel of a shard takes at most, in seconds, in each so many of the seeds.
KERNELS_S = (0.0, 0.0, 0.0, 0.0, 0.003, 0.3)

#: What is trained, by name: with decisions or eager, and in each format of the wire.
KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"precision": {"wire": "fp16", "loss_scale": {"initial_power": 13, "hysteresis": 1, "window": 4}}},
    "eager": {"precision": {"wire": "fp32"}, "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.0}},
    "bf16": {"precision": {"wire": "bf16"}, "optimizer": {"name": "sgd", "lr": 0.01, "clip_norm": 1.0}},
}


@dataclass
class Outcome:
    """How a run went."""

    seed: int
    kind: str
    rough: bool
    wrong: list[str] = field(default_factory=list)
    events: int = 0
    messages: int = 0
    committed: int = 0
    faults: list[str] = field(default_factory=list)
    rollbacks: int = 0
    simulated_s: float = 0.0
    standbys: int = 1
    durability: str = "checkpoint"
    #: Standbys that took over.
    takeovers: int = 0
    #: The same for two runs of a seed, whatever differs between their processes.
    fingerprint: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)


def config_of(kind: str, run_dir: Path, standbys: int = 1, durability: str = "checkpoint") -> RunConfig:
    """What a run of this kind is told."""
    defaults: dict[str, Any] = {
        "run_dir": run_dir,
        "cluster": {"shards": SHARDS, "standbys": standbys, "workers": WORKERS, "threads_per_shard": 2},
        "durability": durability,
        "batch": {"micro_batches_per_step": 8, "contributions_per_step": 4},
        "training": {"steps": STEPS, "step_timeout_s": 20.0},
        "evaluation": {"every_steps": 0},
        "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "membership": {"lease_s": 2.0},
        "telemetry": {"metrics": False},
    }
    return validate(RunConfig, {**defaults, **KINDS[kind]})


@functools.cache
def truth_of(kind: str) -> Truth:
    """What every run of this kind comes to."""
    with patches.small_chunks():
        return sequential.train(config_of(kind, Path("nowhere")))


def weather_of(rng: random.Random, rough: bool = False) -> Weather:
    """How bad the network is throughout a run."""
    if rough:
        return Weather(late=0.1, late_s=rng.choice((0.05, 0.3)), breaks=0.002, twice=0.1)
    return Weather(
        late=rng.choice((0.0, 0.02, 0.1)),
        late_s=rng.choice((0.005, 0.05)),
        breaks=rng.choice((0.0, 0.0, 0.0005, 0.003)),
        twice=rng.choice((0.0, 0.02, 0.2)),
    )


def simulate(
    seed: int,
    *,
    kind: str | None = None,
    calm: bool = False,
    rough: bool = False,
    only: list[Fault] | None = None,
    standbys: int = 1,
    trace: bool = False,
    messages: bool = False,
) -> Outcome:
    """Run one seed.

    Args:
        kind: of `KINDS`; None: drawn.
        calm: nothing goes wrong, but for `only`.
        standbys: processes of a shard besides the one that serves.
        rough: four times as many faults, in bad weather: for bugs that need several.
        only: these faults, in their order, instead of drawn ones.
        trace: keep what happens, line by line; changes nothing else.
        messages: every message is a line of it.
    """
    drawn = random.Random(f"{seed}")
    drawn_kind = drawn.choice(list(KINDS))
    few, many = FAULTS if not rough else (4 * FAULTS[0], 4 * FAULTS[1])
    weather, planned = weather_of(drawn, rough), faults.draw(drawn, MESSAGES, few, many)
    durability = "journal" if drawn.random() < WITH_JOURNAL else "checkpoint"
    kernel_s = drawn.choice(KERNELS_S)
    if calm:
        weather, planned = Weather(), []
    if only is not None:
        planned = only
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=_fast_folder()))
    # Threads that were never ended are cycles: they are looked for among what is new, and only at the end.
    gc.freeze()
    gc.disable()
    try:
        outcome = Outcome(seed, kind or drawn_kind, rough, standbys=standbys, durability=durability)
        return _Simulation(outcome, folder, weather, planned, kernel_s, trace, messages).run()
    finally:
        shutil.rmtree(folder)
        gc.enable()
        gc.collect()
        gc.unfreeze()


def _fast_folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None


class _Simulation:
    def __init__(
        self,
        outcome: Outcome,
        folder: Path,
        weather: Weather,
        planned: list[Fault],
        kernel_s: float,
        trace: bool,
        messages: bool,
    ) -> None:
        self._outcome = outcome
        seed, kind = outcome.seed, outcome.kind
        self._tracing = trace
        self._planned = list(planned)
        self._kernel_s = kernel_s
        self._rng = random.Random(f"{seed}-faults")
        self._config = config_of(kind, folder / "run", outcome.standbys, outcome.durability)
        self._truth = truth_of(kind)
        self._scheduler = Scheduler(random.Random(f"{seed}-threads"))
        self._network = Network(self._scheduler, random.Random(f"{seed}-network"), weather)
        self._disk = Disk(self._scheduler, random.Random(f"{seed}-disk"))
        self._watch = Watch(self._config, self._truth, self._note)
        self._network.on_message = self._on_message
        self._network.note = self._note if messages else None

    def run(self) -> Outcome:
        rng = random.Random(f"{self._outcome.seed}-processes")
        scheduler.activate(self._scheduler)
        simulated = patches.simulated(self._network, self._disk, rng, self._kernel_s)
        with simulated, self._watch.on(), self._logging():
            cluster = self._cluster = Cluster(
                self._scheduler, self._network, self._disk, rng, self._config, self._truth, self._watch, self._note
            )
            cluster.start_all()
            over = self._scheduler.run(lambda: cluster.finished or bool(self._watch.wrong), DEADLINE_S)
            if not over:
                self._watch.fail(
                    f"nothing has come of it after {self._scheduler.now:.1f} s\n{self._scheduler.stacks()}"
                )
            elif not self._watch.wrong:
                self._check_end()
            self._finish()
            self._scheduler.close()
        return self._outcome

    def _finish(self) -> None:
        outcome = self._outcome
        outcome.wrong = list(self._watch.wrong)
        outcome.events, outcome.messages = self._scheduler.events, self._network.delivered
        outcome.rollbacks, outcome.takeovers = self._watch.rolled_back, self._watch.takeovers
        outcome.simulated_s = self._scheduler.now
        outcome.happened = self._network.happened
        outcome.committed = self._truth.decisions[-1].applied if not outcome.wrong else 0
        outcome.fingerprint = hash((outcome.fingerprint, outcome.events, outcome.simulated_s))

    # -- While it runs --------------------------------------------------------------------------

    def _on_message(self) -> None:
        self._outcome.fingerprint = hash((self._outcome.fingerprint, self._scheduler.now))
        while self._planned and self._network.delivered >= self._planned[0].message:
            fault = self._planned.pop(0)
            self._scheduler.after(0.0, self._strike, fault)
        self._watch.look()

    def _strike(self, fault: Fault) -> None:
        said = fault.strike(self._cluster, self._rng)
        if said:
            self._outcome.faults.append(said)
            self._note(f"FAULT: {said}")

    def _note(self, text: str) -> None:
        if self._tracing and not self._scheduler.over:
            task = self._scheduler.current
            who = f"{task.process}" if task is not None else ""
            self._outcome.trace.append(f"{self._scheduler.now:10.6f} {who:14} {text}")

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """What the roles log is a part of the trace, and costs nothing without one."""
        loggers = [logging.getLogger(name) for name in ("ps", "workers")]
        before = [(logger.level, logger.propagate) for logger in loggers]
        handler = _Handler(self._note)
        for logger in loggers:
            logger.setLevel(logging.INFO if self._tracing else logging.CRITICAL + 1)
            logger.propagate = False
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger, (level, propagate) in zip(loggers, before, strict=True):
                logger.setLevel(level)
                logger.propagate = propagate
                logger.removeHandler(handler)

    # -- At the end -----------------------------------------------------------------------------

    def _check_end(self) -> None:
        """The last checkpoint is there; every step has one line of metrics, unless power took the journal's word."""
        folder, expect = layout.newest(self._config.checkpoint_dir), self._watch.expect
        expect(folder is not None and layout.version_of(folder) == STEPS, lambda: f"the last checkpoint is {folder}")
        lines = [json.loads(line) for line in (self._config.run_dir / METRICS_NAME).read_text().splitlines()]
        steps = [line["step"] for line in lines if line["kind"] == "step"]
        missing = set(range(STEPS)) - set(steps)
        whole = missing <= self._watch.unrecorded and steps == sorted(set(steps))
        expect(whole, lambda: f"metrics.jsonl has the steps {steps}")


class _Handler(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._take = note

    def emit(self, record: logging.LogRecord) -> None:
        self._take(f"{record.levelname.lower()}: {record.getMessage()}")
