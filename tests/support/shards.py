"""One shard's engine with real kernels, without gRPC: what workers and the coordinator would send it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ps.config import RunConfig, validate
from ps.coordinator.decision import TrainingState, after, decide
from ps.errors import PsError
from ps.kernels.convert import encode
from ps.kernels.digest import hash_payload
from ps.shard.engine import Outbox, ShardEngine
from ps.shard.exchange import Exchange
from ps.shard.seat import Seat
from ps.shard.snapshot import SnapshotTarget
from ps.sharding import Chunk
from ps.storage.shard_file import ShardFile
from ps.types import (
    Applied,
    Decision,
    Fence,
    ParameterTable,
    Prepared,
    TensorSpec,
    WireDtype,
    slot_range,
)
from ps.wire import frame
from ps.wire.messages import Header, Hello, Initialize, Pull, Push, parse_to_worker
from tests.support.eventually import eventually

RUN = "run-1"
FENCE = Fence(1, 1)
TIMEOUT_S = 20.0
#: Two groups; two chunks, the second one short and with several runs; padding in both.
TABLE = ParameterTable(
    (
        TensorSpec("embedding", (500, 100), 1),
        TensorSpec("matrix", (130, 130), 0),
        TensorSpec("bias", (33,), 1),
        TensorSpec("norm", (7,), 1),
        TensorSpec("scalar", (), 0),
    )
)


def make_config(
    run_dir: Path,
    slots: int = 4,
    wire: str = "fp16",
    threads: int = 1,
    optimizer: str = "adamw",
    **sections: Any,
) -> RunConfig:
    """A job of one shard."""
    mapping = {
        "run_dir": run_dir,
        "cluster": {"shards": 1, "threads_per_shard": threads},
        "batch": {"micro_batches_per_step": slots},
        "precision": {"wire": wire},
        "optimizer": {"name": optimizer},
        "schedule": {"warmup_steps": 0},
        **sections,
    }
    return validate(RunConfig, mapping)


class Told:
    """What a shard told the coordinator."""

    def __init__(self) -> None:
        self.prepared: queue.Queue[Prepared] = queue.Queue()
        self.applied: queue.Queue[Applied] = queue.Queue()
        self.initialized: queue.Queue[Fence] = queue.Queue()
        self.snapshots: queue.Queue[tuple[SnapshotTarget, ShardFile | PsError]] = queue.Queue()
        self.failures: list[BaseException] = []

    def next_prepared(self) -> Prepared:
        """Wait for the next report; a kernel thread that has failed will not make one."""

        def look() -> list[Prepared | BaseException]:
            with suppress(queue.Empty):
                return [self.prepared.get_nowait()]
            return list(self.failures)

        (first, *_) = eventually(look, TIMEOUT_S, "the step to be reduced")
        if isinstance(first, BaseException):
            raise AssertionError("a kernel thread failed") from first
        return first

    def outbox(self) -> Outbox:
        return Outbox(
            self.prepared.put,
            self.applied.put,
            lambda fence, _: self.initialized.put(fence),
            lambda target, result: self.snapshots.put((target, result)),
            self.failures.append,
        )


class Rig:
    """A shard 0 of 1 that serves, and a worker's and the coordinator's view of it."""

    def __init__(
        self, config: RunConfig, contributions: int = 2, table: ParameterTable = TABLE, initialize: bool = True
    ) -> None:
        self.config = config
        self.contributions = contributions
        self.dtype = config.precision.wire
        self.engine = ShardEngine(config, RUN, table, 0, contributions)
        self.seat = Seat(self.engine)
        self.told = Told()
        self.engine.outbox = self.told.outbox()
        self.state = TrainingState.start(config)
        self.fence = FENCE
        if initialize:
            self.seat.load(self.fence, None, "")
            self.seat.serve(self.fence, 0, 0, self.state.scaler.scale)
            for chunk in self.chunks:
                self.engine.initialize(*self.initial(chunk))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.engine.chunks

    def close(self) -> None:
        self.engine.close()

    # -- What a worker sends --------------------------------------------------------------------

    def who(self) -> dict[str, Any]:
        return {"run": RUN, "term": self.fence.term, "epoch": self.fence.epoch, "rank": 0, "incarnation": 77}

    def initial(self, chunk: Chunk) -> tuple[Initialize, memoryview]:
        values = np.zeros(chunk.size, np.float32)
        generator = np.random.default_rng([1, chunk.index])
        for run in chunk.runs:
            values[run.start : run.stop] = generator.standard_normal(run.stop - run.start, dtype=np.float32)
        payload = values.data.cast("B")
        return Initialize(**self.who(), chunk=chunk.index, hash=hash_payload(payload)), payload

    def gradient(self, step: int, contribution: int, chunk: Chunk) -> np.ndarray:
        """A gradient in the wire dtype, of so wide a range that sums have to round, zero in the padding."""
        low, high = (-12, 6) if self.dtype is WireDtype.FP16 else (-60, 30)
        values = np.zeros(chunk.size, np.float32)
        generator = np.random.default_rng([2, step, contribution, chunk.index])
        for run in chunk.runs:
            size = run.stop - run.start
            values[run.start : run.stop] = generator.standard_normal(size) * np.exp2(generator.uniform(low, high, size))
        wire = np.empty(chunk.size, self.dtype.numpy)
        encode(values, 1, self.dtype, wire)
        return wire

    def slots(self, contribution: int) -> int:
        return len(slot_range(contribution, self.contributions, self.config.batch.micro_batches_per_step))

    def push(
        self, contribution: int, chunk: Chunk, gradient: np.ndarray | None = None, **changes: Any
    ) -> tuple[Push, memoryview]:
        """The right push of a chunk for the open step, with some header fields changed."""
        step = self.state.version
        gradient = self.gradient(step, contribution, chunk) if gradient is None else gradient
        payload = gradient.data.cast("B")
        header = Push(
            **self.who(),
            step=step,
            contribution=contribution,
            chunk=chunk.index,
            slots=self.slots(contribution),
            loss_scale=self.state.scaler.scale,
            dtype=str(self.dtype),
            hash=hash_payload(payload),
            present=((1 << len(chunk.runs)) - 1).to_bytes(chunk.presence_bytes, "little"),
            loss_sum=0.5 + contribution,
            tokens=10 + contribution,
        )
        return replace(header, **changes), payload

    def pushes(self) -> list[tuple[Push, memoryview]]:
        """Every push of the open step."""
        return [self.push(c, chunk) for c in range(self.contributions) for chunk in self.chunks]

    def hello(self, **changes: Any) -> Hello:
        return replace(Hello(**self.who(), plan=self.engine.plan.digest), **changes)

    def pull(self, version: int, applied: int = -1, **changes: Any) -> Pull:
        return replace(Pull(**self.who(), version=version, applied=applied), **changes)

    # -- What the coordinator does --------------------------------------------------------------

    def push_step(self) -> Prepared:
        """Push all of the open step and wait until it is prepared."""
        for header, payload in self.pushes():
            self.engine.push(header, payload)
        return self.told.next_prepared()

    def decision(self, report: Prepared | None = None, **changes: Any) -> Decision:
        """What a coordinator decides from the open step's report; nothing is told yet."""
        if report is None:
            report = self.engine.protocol.prepared(self.engine.store.all_square_sums())
        return replace(decide(self.config, self.state, [report], self.fence), **changes)

    def tell(self, decision: Decision) -> Applied:
        """Tell a decision and wait until it is carried out."""
        self.engine.decide(decision)
        self.state = after(self.state, decision)
        return self.told.applied.get(timeout=TIMEOUT_S)

    def run_step(self, **changes: Any) -> Applied:
        """A whole step; returns the acknowledgement."""
        return self.tell(self.decision(self.push_step(), **changes))

    def skip_step(self) -> Applied:
        """Skip the open step, all of which is prepared."""
        decision = self.decision()
        return self.tell(
            replace(
                decision,
                skip=True,
                applied=self.state.applied,
                skipped=self.state.skipped + 1,
                gradient_multiplier=0.0,
                next_loss_scale=self.state.scaler.scale,
                next_hysteresis=self.state.scaler.hysteresis,
            )
        )

    # -- What the shard holds -------------------------------------------------------------------

    def expected_mean(self, chunk: Chunk) -> np.ndarray:
        """m of the open step, by numpy, in contribution order."""
        total = np.zeros(chunk.size, np.float64)
        for contribution in range(self.contributions):
            gradient = self.gradient(self.state.version, contribution, chunk)
            total += self.slots(contribution) * widen(gradient, self.dtype)
        return (total / self.config.batch.micro_batches_per_step).astype(np.float32)

    def weights(self) -> np.ndarray:
        return np.concatenate([self.engine.store.weights(chunk) for chunk in self.chunks])


def widen(gradient: np.ndarray, dtype: WireDtype) -> np.ndarray:
    """Elements of the wire as float64."""
    if dtype is WireDtype.FP16:
        return gradient.view(np.float16).astype(np.float64)
    if dtype is WireDtype.FP32:
        return gradient.astype(np.float64)
    return (gradient.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@contextmanager
def rig(config: RunConfig, contributions: int = 2, **arguments: Any) -> Iterator[Rig]:
    """A rig that is closed, and whose kernel threads did not fail."""
    made = Rig(config, contributions, **arguments)
    try:
        yield made
        assert made.told.failures == []
    finally:
        made.close()


def encode_frame(header: Header, payload: memoryview | bytes = b"") -> bytes:
    return frame.encode(header.pack(), payload)


def drain(exchange: Exchange) -> list[tuple[Header, memoryview]]:
    """Every answer that could go now, without waiting (`replies` would)."""
    answers = []
    with exchange._engine.lock:
        while (reply := exchange._next()) is not None:
            fields, payload = frame.decode(reply)
            answers.append((parse_to_worker(fields), payload))
    return answers


class Reader:
    """Reads `replies` of an exchange in a thread, as a transport does."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.answers: queue.Queue[tuple[Header, memoryview]] = queue.Queue()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for reply in self.exchange.replies():
            fields, payload = frame.decode(reply)
            self.answers.put((parse_to_worker(fields), payload))

    def next(self) -> tuple[Header, memoryview]:
        return self.answers.get(timeout=TIMEOUT_S)

    def close(self) -> None:
        self.exchange.close()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()


def in_threads(*work: Callable[[], None]) -> None:
    """Run these at once; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive(), "a thread of the test hangs"
    if failures:
        raise failures[0]
