"""Forward and backward of a job's model in plain PyTorch: what computing takes without anything to exchange.

    python -m benchmarks.support.compute_alone JOB_ARGUMENTS

A line of standard input is a number of micro-batches; it is answered by a line of JSON: the seconds of each forward,
and of each backward.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from benchmarks.support.processes import environment, running
from workers.config import load_job
from workers.launch.environment import MALLOC_TUNABLES


@dataclass(frozen=True)
class Compute:
    """Seconds of a micro-batch."""

    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s

    def mean(self, other: Compute) -> Compute:
        """Of what was measured before something and after it: the machine's speed drifts."""
        return Compute((self.forward_s + other.forward_s) / 2, (self.backward_s + other.backward_s) / 2)


class Alone:
    """So many processes that compute side by side when asked, for a `with` block; in between they only wait."""

    def __init__(self, job: Sequence[str], processes: int) -> None:
        self._job = list(job)
        self._count = processes
        self._processes: list[subprocess.Popen[str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.support.compute_alone", json.dumps(self._job)]
        env = environment(GLIBC_TUNABLES=MALLOC_TUNABLES)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with ExitStack() as stack:
            self._processes = [stack.enter_context(running(command, env, **pipes)) for _ in range(self._count)]
            self.run(2)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, micro_batches: int) -> Compute:
        """The median of all that were computed.

        Raises:
            SystemExit: a process has ended.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{micro_batches}\n")
            process.stdin.flush()
        forwards: list[float] = []
        backwards: list[float] = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a process that computes has ended")
            forward, backward = json.loads(line)
            forwards += forward
            backwards += backward
        return Compute(statistics.median(forwards), statistics.median(backwards))


def _serve(arguments: list[str]) -> None:
    import torch

    from workers.models.gpt import GPT

    job = load_job(None, arguments)
    torch.set_num_threads(job.worker.threads)
    model = GPT(job.model, job.data.vocab_size, job.data.sequence_length)
    model.initialize(job.seed)
    shape = (job.batch.micro_batch_size, job.data.sequence_length + 1)
    for line in sys.stdin:
        forwards, backwards = [], []
        for _ in range(int(line)):
            tokens = torch.randint(0, job.data.vocab_size, shape)
            began = time.perf_counter()
            loss = model.loss(tokens)
            between = time.perf_counter()
            loss.backward()
            forwards.append(between - began)
            backwards.append(time.perf_counter() - between)
            model.zero_grad()
        print(json.dumps([forwards, backwards]), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
