"""A contribution: a pure function of weights, loss scale, slots and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ps.types import slot_range
from workers.data.batches import HeldOut
from workers.data.sampling import slot_seed
from workers.engine import device
from workers.engine.flat_model import FlatModel
from workers.models.evaluate import evaluate_windows
from workers.models.gpt import GPT


class Batches(Protocol):
    """Where a slot's samples come from."""

    def batch(self, step: int, slot: int) -> device.Array:
        """Return int64 [B, L+1], a pure function of (step, slot)."""


@dataclass(frozen=True)
class Computed:
    """What a contribution says besides its gradient."""

    #: Sum over the slots of the mean loss, unscaled, in nats.
    loss_sum: float
    tokens: int


class Contributor:
    """Computes contributions with a model, and evaluates it."""

    def __init__(
        self,
        model: GPT,
        flat: FlatModel,
        batches: Batches,
        held_out: HeldOut,
        seed: int,
        slots: int,
        contributions: int,
        evaluation_batch: int,
        accumulate_fp16: bool,
    ) -> None:
        self._model = model
        self._flat = flat
        self._batches = batches
        self._held_out = held_out
        self._seed = seed
        self._slots = slots
        self._contributions = contributions
        self._evaluation_batch = evaluation_batch
        self._accumulate_fp16 = accumulate_fp16

    def contribute(self, step: int, contribution: int, loss_scale: float) -> Computed:
        """Run a contribution's slots in order; its gradient is in the flat buffer afterwards.

        The sum of undivided, scaled gradients adds up and is divided once when it is pushed; FP16
        sums would overflow, so there each loss is divided before its backward.
        """
        flat = self._flat
        slots = slot_range(contribution, self._contributions, self._slots)
        flat.clear(divide=not self._accumulate_fp16)
        factor = loss_scale / len(slots) if self._accumulate_fp16 else loss_scale
        self._model.train()
        losses, tokens = [], 0
        for slot in slots:
            batch_BT = device.upload(self._batches.batch(step, slot), flat.device)
            device.seed(slot_seed(self._seed, step, slot))
            loss = self._model.loss(batch_BT)
            (loss * factor).backward()
            losses.append(loss.detach())
            tokens += batch_BT.shape[0] * (batch_BT.shape[1] - 1)
        # One transfer at the end: the device is not waited for in between. Not every device has float64.
        return Computed(float(torch.stack(losses).cpu().double().sum()), tokens)

    def evaluate(self, part: int) -> tuple[float, int, int]:
        """Evaluate one part of the held-out data: (loss sum in nats, tokens, bytes of text)."""
        windows = self._held_out.part(part)
        loss_sum, tokens = evaluate_windows(self._model, windows, self._evaluation_batch)
        return loss_sum, tokens, self._held_out.bytes_of(part)
