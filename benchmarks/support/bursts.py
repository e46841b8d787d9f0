"""Systems that train for a few steps when asked and take no processor time in between.

So that several can be compared on a machine whose speed drifts: all are started once, and then take turns every few
seconds. A cluster is stopped with SIGSTOP, all of its processes; the peers wait for a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Protocol, Self

from benchmarks.support.processes import running
from workers.launch.local_cluster import LocalCluster

#: No burst takes longer; what does has hung.
DEADLINE_S = 600.0
_LOOK_S = 0.02
#: Steps of a burst that do not count: in it a cluster was stopped, and the caches are another system's.
_UNCOUNTED = 1


class System(Protocol):
    """Something that trains."""

    def run(self, steps: int) -> list[float]:
        """Do so many steps, and one before them that does not count; returns the seconds of each."""

    @property
    def pids(self) -> dict[str, int]:
        """Its processes, by name."""


def take_turns(systems: Mapping[str, System], rounds: int, steps: int) -> dict[str, list[float]]:
    """The mean seconds of a step of each system, one for each round; every second round is in reverse order."""
    found: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for name in list(systems)[:: -1 if number % 2 else 1]:
            found[name].append(statistics.fmean(systems[name].run(steps)))
    return found


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of one system's figure in terms of another's."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def median_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """The same of what one takes beyond the other."""
    return statistics.median(a - b for a, b in zip(values, others, strict=True))


class Cluster:
    """A Windlass cluster as its launcher starts it, for a `with` block; stopped but for its bursts.

    Args:
        job: the job as on the command line.
        shards: how many.
        workers: how many the launcher starts.
    """

    def __init__(self, job: Sequence[str], shards: int, workers: int = 2) -> None:
        # It is stopped for longer than any lease. The first steps would only look for the loss scale.
        asleep = ["membership.lease_s=3600", "membership.start_timeout_s=600", "precision.loss_scale.initial_power=10"]
        endless = ["training.steps=100000", "evaluation.every_steps=0"]
        self._cluster = LocalCluster(*asleep, *endless, *job, shards=shards, workers=workers)
        self._stack = ExitStack()
        self._pids: dict[str, int] = {}
        #: Bytes of the metrics that have been read.
        self._read = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._await(_UNCOUNTED)
            self._signal(signal.SIGSTOP)
            stack.callback(self._signal, signal.SIGCONT)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        stack.enter_context(self._cluster)
        self._pids = self._cluster.pids

    @property
    def pids(self) -> dict[str, int]:
        return self._pids

    def run(self, steps: int) -> list[float]:
        """As of any system.

        Raises:
            SystemExit: a step was skipped, or the cluster has lost a process.
        """
        self._new_lines()
        self._signal(signal.SIGCONT)
        lines = self._await(_UNCOUNTED + steps)[_UNCOUNTED:]
        self._signal(signal.SIGSTOP)
        if any(line["skipped"] for line in lines) or not self._cluster.pids.items() <= self._pids.items():
            raise SystemExit(f"these steps were no training: {lines}; {self._cluster.logs()}")
        return [line["step_seconds"] for line in lines]

    def _await(self, steps: int) -> list[dict[str, Any]]:
        """The lines of the next so many steps."""
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < steps:
            if time.monotonic() > deadline:
                raise SystemExit(f"the cluster does not train: {self._cluster.logs()}")
            time.sleep(_LOOK_S)
            found += self._new_lines()
        return found[:steps]

    def _new_lines(self) -> list[dict[str, Any]]:
        """The lines of steps that have not been read; looking for them takes next to no processor time."""
        found = []
        with suppress(FileNotFoundError), (self._cluster.run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(self._read)
            for text in file:
                if text.endswith(b"\n"):
                    self._read += len(text)
                    found.append(json.loads(text))
        return [line for line in found if line["kind"] == "step"]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class DeviceCluster(Cluster):
    """One worker on a device, which says what it takes of it."""

    def __init__(self, job: Sequence[str], shards: int, device: str, env: Mapping[str, str]) -> None:
        super().__init__([*job, "cluster.workers=1", f"worker.device={device}"], shards, workers=0)
        self._device = device
        self._env = env
        #: The most bytes on the device in the last burst.
        self.peak_bytes = 0

    def _start(self, stack: ExitStack) -> None:
        super()._start(stack)
        command = [sys.executable, "-m", "benchmarks.support.device_worker", self._device, "worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        address = ["--coordinator", self._cluster.address]
        self._worker = stack.enter_context(running([*command, *address], self._env, **pipes))
        self._pids = {**self._pids, "worker-0": self._worker.pid}

    def run(self, steps: int) -> list[float]:
        seconds = super().run(steps)
        self._signal(signal.SIGCONT)
        self.peak_bytes = int(_asked(self._worker, ""))
        self._signal(signal.SIGSTOP)
        return seconds


class Peers:
    """Processes of `benchmarks.support.torch_training` that share each step, for a `with` block."""

    def __init__(
        self, mode: str, job: Sequence[str], env: Mapping[str, str], world_size: int = 2, device: str = "cpu"
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.support.torch_training", mode, device]
        rest = [str(world_size), str(port), json.dumps(list(job))]
        self._commands = [[*command, str(rank), *rest] for rank in range(world_size)]
        self._env = env
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[str]] = []
        #: The most bytes on the device in the last burst, of the process that took most.
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with ExitStack() as stack:
            self._processes = [stack.enter_context(running(command, self._env, **pipes)) for command in self._commands]
            self.run(1)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pids(self) -> dict[str, int]:
        return {f"worker-{rank}": process.pid for rank, process in enumerate(self._processes)}

    def run(self, steps: int) -> list[float]:
        for process in self._processes:
            _ask(process, str(steps + _UNCOUNTED))
        answers = [json.loads(_answer(process)) for process in self._processes]
        self.peak_bytes = max(answer["peak_bytes"] for answer in answers)
        together = zip(*(answer["seconds"] for answer in answers), strict=True)
        return [statistics.fmean(seconds) for seconds in together][_UNCOUNTED:]


def _ask(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints.

    Raises:
        SystemExit: it has ended.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process has ended: {process.args!r}")
    return line


def _asked(process: subprocess.Popen[str], line: str) -> str:
    _ask(process, line)
    return _answer(process)
