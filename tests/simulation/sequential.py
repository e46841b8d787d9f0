"""What a run has to come to: one loop over steps, without processes, messages or faults.

What is trained is a `Model`, whose gradient is a pure function of the weights as a worker gets them, of the step and
of the contribution. That of simulations is a handful of chunks, which at some steps overflow when the loss scale is
high.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ps.config import RunConfig
from ps.coordinator.decision import TrainingState, after, decide
from ps.kernels import reduce as kernels
from ps.kernels.convert import decode, encode
from ps.kernels.update import Update
from ps.shard.store import Store
from ps.sharding import Chunk, Plan, make_plan
from ps.types import ContributionReport, Decision, Fence, ParameterTable, Prepared, TensorSpec, WireDtype, slot_range

#: The steps at which a gradient is infinite, and the loss scale from which on: a lower one cures the second.
OVERFLOWS = {3: 0.0, 9: 2.0**13}
CHUNK = 1024
CHUNKS = 4
#: Two tensors in a chunk, of two parameter groups.
TABLE = ParameterTable(
    tuple(
        TensorSpec(f"{index}.{part}", (CHUNK // 2,), group)
        for index in range(CHUNKS)
        for group, part in enumerate("wb")
    )
)


def content(decision: Decision) -> str:
    """A decision, but for the fence under which it is told, and for a checkpoint that a shard has asked for."""
    return repr(replace(decision, fence=Fence(0, 0), snapshot=False))


def initial(chunk: Chunk) -> np.ndarray:
    """FP32 [chunk.size]."""
    return np.random.default_rng([1, chunk.index]).standard_normal(chunk.size, np.float32) * np.float32(0.1)


@functools.lru_cache(maxsize=4096)
def _noise(step: int, contribution: int, chunk: int, size: int) -> np.ndarray:
    return np.random.default_rng([2, step, contribution, chunk]).standard_normal(size, np.float32)


def gradient(
    weights: np.ndarray, step: int, contribution: int, chunk: Chunk, slots: int, loss_scale: float
) -> np.ndarray:
    """FP32 [chunk.size]: the sum over a contribution's slots of the scaled gradients.

    Args:
        weights: FP32 [chunk.size], as they were published.
    """
    noise = _noise(step, contribution, chunk.index, chunk.size)
    found = (weights + noise) * np.float32(slots * loss_scale * 2.0**-9)
    if contribution == 1 and chunk.index == 2 and loss_scale >= OVERFLOWS.get(step, np.inf):
        found[7] = np.inf
    return np.asarray(found, np.float32)


def loss(step: int, contribution: int) -> float:
    """The sum of a contribution's losses."""
    return float(step + contribution)


@dataclass(frozen=True)
class Model:
    """What is trained."""

    table: ParameterTable
    #: The initial values of a chunk.
    initial: Callable[[Chunk], np.ndarray]
    #: As `gradient`.
    gradient: Callable[[np.ndarray, int, int, Chunk, int, float], np.ndarray]


CHAIN = Model(TABLE, initial, gradient)


@dataclass(frozen=True)
class Position:
    """Where a run is after some steps; what it holds changes with the next."""

    plan: Plan
    stores: Sequence[Store]
    state: TrainingState
    #: What has led here; None: the beginning.
    decision: Decision | None
    #: FP32 weights as a worker gets them.
    published: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds, by name, over the flat space."""
        found: dict[str, np.ndarray] = {}
        for chunk in self.plan.chunks:
            for name, array in self.stores[chunk.shard].arrays(chunk).items():
                found.setdefault(name, np.empty(self.plan.size, np.float32))[chunk.start : chunk.stop] = array
        return found


@dataclass(frozen=True)
class Truth:
    """A whole run, version by version."""

    plan: Plan
    #: The state hash of each shard, by version.
    hashes: list[tuple[int, ...]]
    #: What is decided, by step.
    decisions: list[Decision]
    contents: list[str]
    #: FP32 weights as a worker gets them, by version.
    published: list[np.ndarray]
    #: What a checkpoint holds, by version and name, over the flat space.
    arrays: list[dict[str, np.ndarray]]


def train(config: RunConfig) -> Truth:
    """Make all steps of a simulated run."""
    hashes, decisions, published, arrays = [], [], [], []
    for position in walk(config, CHAIN):
        hashes.append(tuple(store.state_hash for store in position.stores))
        published.append(position.published)
        arrays.append(position.arrays())
        if position.decision is not None:
            decisions.append(position.decision)
    return Truth(position.plan, hashes, decisions, [content(d) for d in decisions], published, arrays)


def walk(config: RunConfig, model: Model) -> Iterator[Position]:
    """Make the steps of a run, one after the other; the first position is the beginning."""
    plan, wire = make_plan(model.table, config.cluster.shards), config.precision.wire
    update = Update(config.optimizer, wire)
    stores = [Store(plan.chunks_of(shard), update, wire) for shard in range(plan.num_shards)]
    for chunk in plan.chunks:
        store = stores[chunk.shard]
        store.weights(chunk)[:] = model.initial(chunk)
        store.publish(chunk, store.encode(chunk, 0, 0))
    position = Position(plan, stores, TrainingState.start(config), None, _published(plan, stores, wire))
    yield position
    for step in range(config.training.end):
        state = position.state
        for chunk in plan.chunks:
            _reduce(config, model, stores[chunk.shard], chunk, position.published, step, state.scaler.scale)
        decision = decide(config, state, _reports(config, stores, step), Fence(0, 0))
        if not decision.skip:
            for chunk in plan.chunks:
                store = stores[chunk.shard]
                store.publish(chunk, store.apply(chunk, np.ones(len(chunk.runs), np.bool_), decision))
        position = Position(plan, stores, after(state, decision), decision, _published(plan, stores, wire))
        yield position


def _reduce(
    config: RunConfig, model: Model, store: Store, chunk: Chunk, weights: np.ndarray, step: int, loss_scale: float
) -> None:
    contributions, slots = config.contributions, config.batch.micro_batches_per_step
    wire = config.precision.wire
    counts = [len(slot_range(c, contributions, slots)) for c in range(contributions)]
    rounded = []
    for contribution, count in enumerate(counts):
        here = weights[chunk.start : chunk.stop]
        room = np.empty(chunk.size, wire.numpy)
        encode(model.gradient(here, step, contribution, chunk, count, loss_scale), count, wire, room)
        rounded.append(room)
    kernels.reduce(rounded, counts, None, slots, wire, store.mean(chunk), store.square_sums(chunk))


def _reports(config: RunConfig, stores: Sequence[Store], step: int) -> list[Prepared]:
    told = tuple(ContributionReport(c, loss(step, c), 1, 0, 0) for c in range(config.contributions))
    return [Prepared(Fence(0, 0), step, shard, store.all_square_sums(), told) for shard, store in enumerate(stores)]


def _published(plan: Plan, stores: Sequence[Store], wire: WireDtype) -> np.ndarray:
    weights = np.empty(plan.size, np.float32)
    for chunk in plan.chunks:
        rounded = np.empty(chunk.size, wire.numpy)
        encode(stores[chunk.shard].weights(chunk), 1, wire, rounded)
        decode(rounded, wire, weights[chunk.start : chunk.stop])
    return weights
