"""The smallest job with two shards and a worker without torch, which also runs as a process of its own; and what it
comes to, from a loop over steps.

python -m tests.support.kneading HOST:PORT
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import numpy as np

import windlass
from ps.client.arrays import table_of
from ps.config import RunConfig
from ps.sharding import Chunk
from ps.storage.digest import digest_arrays
from ps.types import slot_range
from tests.simulation import sequential

STEPS, SLOTS, CONTRIBUTIONS = 8, 4, 2
#: Two segments of 65,536 elements: one for each shard.
SIZE = 131_072
JOB = (
    f"training.steps={STEPS}",
    f"batch.micro_batches_per_step={SLOTS}",
    f"batch.contributions_per_step={CONTRIBUTIONS}",
    "precision.wire=fp16",
    "optimizer.clip_norm=1.0",
    "schedule.warmup_steps=0",
    "checkpoint.every_steps=3",
    "checkpoint.keep=1",
)


def ended(steps: int = STEPS) -> str:
    """Why `work` ends in a run of so many steps."""
    return f"finished: {steps} steps"


def work(address: str, on_step: Callable[[int], object] = lambda _: None) -> str:
    """Compute until the run ends; returns why it did. `on_step` hears of each step's first contribution.

    A gradient pulls each weight towards another place in each slot: the bits depend on every step and slot.
    """
    with windlass.Client.connect(address, {"w": np.zeros(SIZE, np.float32)}) as client:
        for piece in client:
            if piece.slots.start == 0:
                on_step(piece.step)
            weights = piece.weights["w"]
            loss = sum(float(np.mean((weights - _place(piece.step, slot)) ** 2)) for slot in piece.slots)
            client.push(piece, {"w": _gradient(weights, piece.step, piece.slots)}, loss)
        return client.reason


def digest(config: RunConfig, version: int) -> str:
    """What the job's checkpoint of a version has to be, whatever has happened to the run."""
    initial = np.zeros(SIZE, np.float32)
    table = table_of({"w": initial}, None)
    model = sequential.Model(table, lambda chunk: initial[chunk.start : chunk.stop], _scaled)
    for position in sequential.walk(config, model):
        if position.state.version == version:
            break
    arrays = position.arrays()

    def read(name: str, start: int, out: np.ndarray) -> None:
        out[:] = arrays[name][start : start + out.size]

    return digest_arrays(table, config.optimizer.moment_names, position.state.applied, read)


def _scaled(
    weights: np.ndarray, step: int, contribution: int, chunk: Chunk, _slots: int, loss_scale: float
) -> np.ndarray:
    slots = slot_range(contribution, CONTRIBUTIONS, SLOTS)
    return _gradient(weights, step, slots, chunk.start) * np.float32(loss_scale)


def _gradient(weights: np.ndarray, step: int, slots: range, start: int = 0) -> np.ndarray:
    """The sum over slots, of the weights from `start` on."""
    gradient = np.zeros(weights.size, np.float32)
    for slot in slots:
        gradient += (weights - _place(step, slot)[start : start + weights.size]) / SIZE
    return gradient


@functools.lru_cache(maxsize=2 * SLOTS)
def _place(step: int, slot: int) -> np.ndarray:
    """Where a slot pulls the weights."""
    return np.random.default_rng((step, slot)).random(SIZE, np.float32)


if __name__ == "__main__":
    work(sys.argv[1])
