"""A whole cluster inside one process: real gRPC on loopback, threads where a run has processes.

A process costs seconds of importing torch; a thread costs nothing. What is left out is what only
processes have: signals, logs, the launcher.
"""

from __future__ import annotations

import gc
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import coordinator_pb2_grpc as pb_grpc
from ps.client.grpc_transport import GrpcTransport
from ps.client.transport import Transport
from ps.config import RunConfig, from_json
from ps.coordinator.app import CoordinatorApp
from ps.shard.app import ShardApp
from ps.storage import WEIGHTS, CheckpointReader, checkpoint_folder, newest, read_manifest
from ps.storage.digest import digest
from ps.wire.options import open_channel
from tests.support.eventually import eventually
from workers.config import JobConfig
from workers.engine.app import Joined, join
from workers.launch.folder import RunFolder
from workers.launch.jobs import resolve

#: A cluster that has not ended after so long never will.
TIMEOUT_S = 90.0
_START_S = 30.0
_LOOPBACK = "127.0.0.1:0"

#: 371,000 parameters in 6 chunks, so that 3 shards have two each; a step takes some 20 ms.
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.intermediate_size=832",
    "data.sequence_length=16",
    "data.vocab_size=300",
    "batch.micro_batch_size=2",
    "batch.micro_batches_per_step=8",
    "evaluation.every_steps=0",
    "evaluation.max_sequences=8",
    "schedule.warmup_steps=5",
    "precision.compute=fp32",
    "worker.device=cpu",
    "worker.threads=1",
    "telemetry.metrics=false",
    # Several people share a machine: a thread that gets no time for a while is not dead.
    "membership.lease_s=60",
)

Array = np.ndarray  # type: ignore[type-arg]


def write_text(path: Path, words: int = 30_000) -> None:
    """Write a text that a model can learn: sentences of made-up words, each of which likes its successors."""
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    successors = {word: rng.choices(vocabulary, k=3) for word in vocabulary}
    word, lines = vocabulary[0], []
    for _ in range(words // 10):
        line = []
        for _ in range(10):
            line.append(word)
            word = rng.choice(successors[word]) if rng.random() < 0.9 else rng.choice(vocabulary)
        lines.append(" ".join(line) + ".\n")
    path.write_text("".join(lines))


def make_job(run_dir: Path, text: Path, overrides: Sequence[str]) -> JobConfig:
    """The small job over a text, with `key=value` overrides; tokens are cached beside the text."""
    where = [f"run_dir={run_dir}", f"data.paths={text}", f"data.cache_dir={text.parent / 'cache'}"]
    return resolve(None, [*where, *SMALL, *overrides])


@dataclass(frozen=True)
class Finished:
    """What a run has left behind."""

    job: JobConfig

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Everything in metrics.jsonl."""
        text = RunFolder(self.job.run_dir).metrics.read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of the steps, which are checked to be there once each."""
        steps = [line for line in self.lines if line["kind"] == "step"]
        assert [line["step"] for line in steps] == list(range(len(steps)))
        return steps

    def column(self, key: str) -> list[Any]:
        return [line[key] for line in self.steps]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The last evaluation."""
        return [line for line in self.lines if line["kind"] == "evaluation"][-1]

    def _folder(self, version: int | None) -> Path:
        found = newest(self.job.checkpoint_dir)
        assert found is not None
        return found if version is None else checkpoint_folder(self.job.checkpoint_dir, version)

    def digest(self, version: int | None = None) -> str:
        """The digest of the newest checkpoint, or of a version's."""
        return digest(self._folder(version))

    def manifest(self, version: int | None = None) -> Any:
        return read_manifest(self._folder(version))[0]

    def flat(self, array: str = WEIGHTS, version: int | None = None) -> Array:
        """A whole array of a checkpoint, as it lies in the flat space."""
        folder = self._folder(version)
        with CheckpointReader(folder, read_manifest(folder)[0]) as reader:
            values = np.empty(reader.plan.size, np.float32)
            reader.read(array, 0, values)
        return values

    def tensors(self, array: str = WEIGHTS, version: int | None = None) -> dict[str, Array]:
        """An array of a checkpoint, tensor by tensor."""
        folder = self._folder(version)
        manifest, values = read_manifest(folder)[0], self.flat(array, version)
        with CheckpointReader(folder, manifest) as reader:
            offsets = reader.plan.offsets
        return {
            tensor.name: values[offset : offset + tensor.size].reshape(tensor.shape)
            for tensor, offset in zip(manifest.table.tensors, offsets, strict=True)
        }


class _Roles:
    """Threads that stand for processes. When one fails all are ended, and its error is the test's."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._aborts: list[Callable[[], None]] = []
        self._errors: list[BaseException] = []
        self._failed = threading.Event()

    def start(self, name: str, work: Callable[[], object], abort: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by `wait`
                error.add_note(f"in {name}")
                self._errors.append(error)
                self._failed.set()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        self._aborts.append(abort)
        thread.start()

    def wait(self, timeout_s: float, waiting_for: Callable[[], str]) -> None:
        """Wait for all to end; raise what the first one raised."""
        deadline = time.monotonic() + timeout_s
        while self._alive() and time.monotonic() < deadline and not self._failed.is_set():
            self._alive()[0].join(0.05)
        if self._alive() and not self._failed.is_set():
            error = AssertionError(f"after {timeout_s:.0f} s still there: {self._names()}; {waiting_for()}")
            self._errors.append(error)
        self.end()
        if self._errors:
            raise self._errors[0]
        assert not self._alive(), f"cannot be ended: {self._names()}"

    def end(self) -> None:
        """End those that are still there, hard."""
        for abort, thread in zip(self._aborts, self._threads, strict=True):
            if thread.is_alive():
                abort()
        for thread in self._threads:
            thread.join(10.0)

    def _alive(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.is_alive()]

    def _names(self) -> str:
        return ", ".join(thread.name for thread in self._alive())


class Workers:
    """The workers of a run that is under way."""

    def __init__(self, roles: _Roles, address: str, transport: Callable[[], Transport]) -> None:
        self._roles = roles
        self._address = address
        self._transport = transport
        self._joined: dict[int, Joined] = {}
        #: The first step that nobody may compute.
        self._held_from = math.inf
        self._may_compute = threading.Condition()

    def join(self, *ranks: int) -> None:
        """Start workers of these ranks."""
        # One after the other: building a model draws from torch's generator, which is one per process.
        for rank in ranks:
            self._joined[rank] = join(self._address, rank, None, self._transport(), _START_S)
            self._before_each_batch(rank, self._await_step)
        for rank in ranks:
            worker = self._joined[rank]
            self._roles.start(f"worker {rank}", worker.run, worker.worker.leave)

    def leave(self, rank: int) -> None:
        """Have a worker go, as one that is asked to stop does."""
        self._joined.pop(rank).worker.leave()

    def hinder(self, rank: int, seconds: float) -> None:
        """Have a worker take so much longer for each micro-batch from now on."""
        pause = threading.Event()
        self._before_each_batch(rank, lambda _step: pause.wait(seconds))

    def hold_from(self, step: float) -> None:
        """Have nobody compute a step from this one on, until another one is named."""
        with self._may_compute:
            self._held_from = step
            self._may_compute.notify_all()

    def _await_step(self, step: int) -> None:
        with self._may_compute:
            self._may_compute.wait_for(lambda: step < self._held_from)

    def _before_each_batch(self, rank: int, wait: Callable[[int], object]) -> None:
        contributor: Any = self._joined[rank].worker._contributor
        batches = contributor._batches

        def batch(step: int, slot: int) -> Any:
            wait(step)
            return batches.batch(step, slot)

        contributor._batches = SimpleNamespace(batch=batch)

    def status(self) -> pb.StatusResponse:
        with open_channel(self._address) as channel:
            return pb_grpc.CoordinatorStub(channel).Status(pb.StatusRequest(), timeout=5.0)


def train(
    job: JobConfig,
    transport: Callable[[], Transport] = GrpcTransport,
    timeout_s: float = TIMEOUT_S,
    meanwhile: Callable[[Workers], None] = lambda _: None,
) -> Finished:
    """Run a job to its end.

    Args:
        job: from `make_job`; its run folder is new, or that of a run that goes on.
        transport: makes the transport of each worker.
        timeout_s: of the whole run.
        meanwhile: called once the job's workers have joined.

    Raises:
        PsError: what the first role that failed raised.
        AssertionError: the run did not end in time; says what was waited for.
    """
    RunFolder(job.run_dir).write_job(job)
    RunFolder(job.run_dir).cluster.unlink(missing_ok=True)
    gave_up = (False, "the test has given up")
    job_json = job.model_dump_json()
    coordinator = CoordinatorApp(from_json(RunConfig, job_json), job_json, _LOOPBACK)
    roles = _Roles()
    try:
        roles.start("coordinator", coordinator.run, lambda: coordinator._end(*gave_up))
        members = eventually(RunFolder(job.run_dir).members, _START_S, "the coordinator's address")
        address = members[0]["address"]
        for index in range(job.cluster.shards):
            shard = ShardApp(address, index, _LOOPBACK, None)
            roles.start(f"shard {index}", lambda shard=shard: shard.run(_START_S), lambda s=shard: s._end(*gave_up))
        workers = Workers(roles, address, transport)
        workers.join(*range(job.cluster.workers))
        try:
            meanwhile(workers)
        finally:
            workers.hold_from(math.inf)
        roles.wait(timeout_s, lambda: _describe(workers.status()))
    finally:
        roles.end()
    # The servers' idle threads go with the servers, which are cycles.
    gc.collect()
    return Finished(job)


def _describe(status: pb.StatusResponse) -> str:
    return f"{status.phase} at version {status.version}; {status.waiting_for}"
