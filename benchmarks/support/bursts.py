"""Systems that train for a few steps when asked and take no processor time in between.

So that two of them can be compared on a machine whose speed drifts: both are started once, and then take
turns every few seconds. A cluster is stopped with SIGSTOP, all of its processes; the peers wait for a line.
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
from types import TracebackType
from typing import Any, Protocol, Self

from workers.launch.local_cluster import LocalCluster

#: No burst takes longer; what does has hung.
DEADLINE_S = 600.0
_LOOK_S = 0.01


class System(Protocol):
    """Something that trains."""

    def run(self, steps: int) -> list[float]:
        """Do so many steps, and one before them that does not count; returns the seconds of each."""

    @property
    def pids(self) -> dict[str, int]:
        """Its processes, by name."""


class Cluster:
    """A Windlass cluster as its launcher starts it, for a `with` block; stopped but for its bursts.

    Args:
        job: the job as on the command line.
        shards: how many.
        workers: how many.
    """

    def __init__(self, job: list[str], shards: int, workers: int = 2) -> None:
        # It is stopped for longer than any lease.
        asleep = ["membership.lease_s=3600", "membership.start_timeout_s=600", "precision.loss_scale.initial_power=10"]
        self._cluster = LocalCluster(
            *asleep, *job, "training.steps=100000", "evaluation.every_steps=0", shards=shards, workers=workers
        )
        self._pids: dict[str, int] = {}
        self._seen = 0

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        self._pids = self._cluster.pids
        try:
            # The first steps find the loss scale.
            self._await(6)
        except BaseException:
            self._cluster.close()
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        self._cluster.close()

    @property
    def pids(self) -> dict[str, int]:
        return self._pids

    def run(self, steps: int) -> list[float]:
        return [line["step_seconds"] for line in self.lines(steps)]

    def lines(self, steps: int) -> list[dict[str, Any]]:
        """As `run`; returns the steps' lines of metrics.jsonl.

        Raises:
            SystemExit: a step was skipped, or the cluster has lost a process.
        """
        # The first step to end is the one that was stopped in.
        began = len(self._lines())
        self._signal(signal.SIGCONT)
        self._await(began + 1 + steps)
        self._signal(signal.SIGSTOP)
        lines = self._lines()[began + 1 : began + 1 + steps]
        if any(line["skipped"] for line in lines) or self._cluster.pids != self._pids:
            raise SystemExit(f"these steps were no training: {lines}; {self._cluster.logs()}")
        return lines

    def _await(self, lines: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self._lines()) < lines:
            if time.monotonic() > deadline:
                raise SystemExit(f"the cluster does not train: {self._cluster.logs()}")
            time.sleep(_LOOK_S)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = (self._cluster.run_dir / "metrics.jsonl").read_text()
        except OSError:
            return []
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["kind"] == "step"]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids.values():
            os.kill(pid, number)


class Peers:
    """Two processes of `benchmarks.support.ddp_training`, for a `with` block."""

    def __init__(self, mode: str, vocab_size: int, job: list[str], environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.support.ddp_training"]
        self._commands = [[*command, str(rank), mode, str(port), str(vocab_size), json.dumps(job)] for rank in range(2)]
        self._environment = environment
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for command in self._commands:
            self._processes.append(
                subprocess.Popen(
                    command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        try:
            self.run(2)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    @property
    def pids(self) -> dict[str, int]:
        return {f"worker-{rank}": process.pid for rank, process in enumerate(self._processes)}

    def run(self, steps: int) -> list[float]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps + 1}\n")
            process.stdin.flush()
        return [statistics.fmean(pair) for pair in zip(*map(self._answer, self._processes), strict=True)][1:]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> list[float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a peer has ended: {process.args!r}")
        seconds: list[float] = json.loads(line)
        return seconds
