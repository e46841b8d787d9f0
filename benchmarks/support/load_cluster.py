"""Clusters on hosts: real coordinator, shards and sessions; workers that compute, or have their gradients already."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.hosts import HERE, Host
from benchmarks.support.processes import environment, running
from workers.launch.environment import MALLOC_TUNABLES

#: A cluster that has not ended after this hangs.
DEADLINE_S = 240.0
#: Steps before the ones that count: memory is touched, connections find their speed.
WARM_UP_STEPS = 2
_LOOK_S = 0.02
CLI = [sys.executable, "-m", "workers.cli.main"]


@dataclass(frozen=True)
class Layout:
    """On which host each role runs."""

    coordinator: Host
    shards: Sequence[Host]
    workers: Sequence[Host]

    @classmethod
    def here(cls, shards: int, workers: int) -> Layout:
        """All of them on this machine."""
        return cls(HERE, [HERE] * shards, [HERE] * workers)


@dataclass(frozen=True)
class Load:
    """What the workers push and pull."""

    parameters: int
    #: None: matrices of 1024 x 1024.
    tensors: int | None = None
    #: Gradients come through the hooks of a torch module, instead of being there.
    hooks: bool = False
    #: Seconds that each worker sleeps for a contribution, by rank; empty: none does.
    compute_s: Sequence[float] = ()


#: The command of a worker: the coordinator's address and the rank are given.
WorkerCommand = Callable[[str, int], list[str]]


def run_load(layout: Layout, load: Load, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """Run workers that have their gradients already; otherwise as `run_cluster`."""
    options = [*(["--tensors", str(load.tensors)] if load.tensors else []), *(["--hooks"] if load.hooks else [])]

    def worker(address: str, rank: int) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.support.load_worker", address, "--rank", str(rank)]
        seconds = ["--compute-s", str(load.compute_s[rank])] if load.compute_s else []
        return [*command, "--parameters", str(load.parameters), *options, *seconds]

    return run_cluster(layout, worker, steps, *overrides)


def run_training(layout: Layout, steps: int, *job: str) -> list[dict[str, Any]]:
    """Run workers that train the model of `job`; otherwise as `run_cluster`."""

    def worker(address: str, rank: int) -> list[str]:
        return [*CLI, "worker", "--coordinator", address, "--rank", str(rank), "--insecure"]

    return run_cluster(layout, worker, steps, *job)


def run_cluster(layout: Layout, worker: WorkerCommand, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """Run a cluster for `steps` steps and some to warm up; one contribution per worker unless `overrides` differ.

    Returns:
        The line of metrics.jsonl of each step that counts.

    Raises:
        SystemExit: the cluster failed; the ends of its logs are printed.
    """
    with tempfile.TemporaryDirectory(prefix="windlass-load-") as name, ExitStack() as stack:
        folder, run = Path(name), Path(name) / "run"
        here = environment(GLIBC_TUNABLES=MALLOC_TUNABLES)
        job = [
            f"run_dir={run}",
            f"cluster.shards={len(layout.shards)}",
            f"cluster.workers={len(layout.workers)}",
            f"training.steps={steps + WARM_UP_STEPS}",
            f"batch.micro_batches_per_step={len(layout.workers)}",
            "telemetry.metrics=false",
            "evaluation.every_steps=0",
            "launch.transport=grpc",
            *overrides,
        ]

        started: dict[str, subprocess.Popen[Any]] = {}

        def start(host: Host, name: str, *command: str) -> None:
            file = stack.enter_context((folder / f"{name}.log").open("w"))
            options = {"stdout": file, "stderr": subprocess.STDOUT}
            started[name] = stack.enter_context(running(host.command(command), here, **options))

        serve = ["--listen", f"{layout.coordinator.address}:0", "--insecure"]
        start(layout.coordinator, "coordinator", *CLI, "coordinator", *serve, *job)
        try:
            address = _address(run, started)
            for index, host in enumerate(layout.shards):
                listen = ["--listen", f"{host.address}:0", "--insecure"]
                where = ["--coordinator", address, "--index", str(index)]
                start(host, f"shard-{index}", *CLI, "shard", *where, *listen)
            for rank, host in enumerate(layout.workers):
                start(host, f"worker-{rank}", *worker(address, rank))
            _await(lambda: started["coordinator"].poll() == 0, started, "the run does not end")
        except RuntimeError as error:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", log.read_text()[-2000:], sep="\n", file=sys.stderr)
            raise SystemExit(f"the cluster failed: {error}") from None
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "step"][WARM_UP_STEPS:]


def step_seconds(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The seconds of each step."""
    return [line["step_seconds"] for line in lines]


def _address(run: Path, started: Mapping[str, subprocess.Popen[Any]]) -> str:
    """Where the coordinator is, once it says so."""
    _await(lambda: bool(_members(run)), started, "the coordinator does not start")
    return str(_members(run)[0]["address"])


def _members(run: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((run / "cluster.json").read_text()))
    except OSError:
        return []


def _await(there: Callable[[], bool], started: Mapping[str, subprocess.Popen[Any]], otherwise: str) -> None:
    """Wait until something is there.

    Raises:
        RuntimeError: it takes too long, or a process has failed: the others would wait for it until then.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not there():
        for name, process in started.items():
            if process.poll() not in (None, 0):
                raise RuntimeError(f"{name} ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(_LOOK_S)
