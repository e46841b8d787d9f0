"""The smallest job with two shards and a worker without torch, which also runs as a process of its own.

python -m tests.support.kneading HOST:PORT
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

import windlass

STEPS, SLOTS = 8, 4
#: Two segments of 65,536 elements: one for each shard.
SIZE = 131_072
JOB = (
    f"training.steps={STEPS}",
    f"batch.micro_batches_per_step={SLOTS}",
    "batch.contributions_per_step=2",
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
            gradient, loss = np.zeros(SIZE, np.float32), 0.0
            for slot in piece.slots:
                error = piece.weights["w"] - np.random.default_rng((piece.step, slot)).random(SIZE, np.float32)
                gradient += error / SIZE
                loss += float(np.mean(error**2))
            client.push(piece, {"w": gradient}, loss)
        return client.reason


if __name__ == "__main__":
    work(sys.argv[1])
