"""A cluster whose workers have their gradients already: real coordinator, shards and sessions, no compute."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


def run_load(layout: Layout, load: Load, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """Run a cluster for `steps` steps and some to warm up; one contribution per worker unless `overrides` differ.

    Returns:
        The line of metrics.jsonl of each step that counts.

    Raises:
        SystemExit: the cluster failed; the ends of its logs are printed.
    """
    with tempfile.TemporaryDirectory(prefix="windlass-load-") as name, ExitStack() as stack:
        folder, run = Path(name), Path(name) / "run"
        here = environment(GLIBC_TUNABLES=MALLOC_TUNABLES)
        cli = [sys.executable, "-m", "workers.cli.main"]
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

        def start(host: Host, log: str, *command: str) -> subprocess.Popen[Any]:
            file = stack.enter_context((folder / f"{log}.log").open("w"))
            return stack.enter_context(running(host.command(command), here, stdout=file, stderr=subprocess.STDOUT))

        serve = ["--listen", f"{layout.coordinator.address}:0", "--insecure"]
        coordinator = start(layout.coordinator, "coordinator", *cli, "coordinator", *serve, *job)
        try:
            address = _address(run, coordinator)
            for index, host in enumerate(layout.shards):
                listen = ["--listen", f"{host.address}:0", "--insecure"]
                where = ["--coordinator", address, "--index", str(index)]
                start(host, f"shard-{index}", *cli, "shard", *where, *listen)
            tensors = ["--tensors", str(load.tensors)] if load.tensors else []
            model = ["--parameters", str(load.parameters), *tensors]
            for rank, host in enumerate(layout.workers):
                worker = [sys.executable, "-m", "benchmarks.support.load_worker", address, "--rank", str(rank)]
                start(host, f"worker-{rank}", *worker, *model)
            if coordinator.wait(DEADLINE_S) != 0:
                raise RuntimeError(f"the coordinator ended with exit code {coordinator.returncode}")
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", log.read_text()[-2000:], sep="\n", file=sys.stderr)
            raise SystemExit(f"the cluster failed: {error}") from None
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "step"][WARM_UP_STEPS:]


def step_seconds(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The seconds of each step."""
    return [line["step_seconds"] for line in lines]


def _address(run: Path, coordinator: subprocess.Popen[Any]) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and coordinator.poll() is None:
        try:
            return str(json.loads((run / "cluster.json").read_text())[0]["address"])
        except (OSError, ValueError, IndexError):
            time.sleep(0.02)
    raise RuntimeError("the coordinator did not start")
