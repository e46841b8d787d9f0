"""A contribution: a pure function of weights, loss scale, slots and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ps.client.pusher import Contribution
from ps.sharding import Chunk
from ps.telemetry.trace import COMPUTE, OFF, Recorder
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


class Steps(Protocol):
    """Whose contributions these are; `Interrupted` leaves one."""

    def await_weights(self, chunks: Sequence[Chunk] | None) -> None:
        """Wait until the weights of these chunks are there; None: of all."""

    def forget_gradient(self) -> None:
        """The gradient is about to be overwritten: wait until what was computed last is on its way."""

    def begin_push(self, contribution: int, report: Callable[[], tuple[float, int]]) -> Contribution:
        """Chunks of a contribution are about to be ready; `report` returns its sum of losses, and its tokens."""

    def push_chunk(self, contribution: Contribution, chunk: Chunk) -> None:
        """A chunk is ready: nothing of its gradient changes any more."""


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
        steps: Steps,
        trace: Recorder = OFF,
    ) -> None:
        self._model = model
        self._steps = steps
        self._trace = trace
        self._flat = flat
        self._batches = batches
        self._held_out = held_out
        self._seed = seed
        self._slots = slots
        self._contributions = contributions
        self._evaluation_batch = evaluation_batch
        self._accumulate_fp16 = accumulate_fp16

    def contribute(self, step: int, contribution: int, loss_scale: float) -> Contribution:
        """Run a contribution's slots in order; its gradient is in the flat buffer afterwards.

        The sum of undivided, scaled gradients adds up and is divided once when it is pushed; FP16
        sums would overflow, so there each loss is divided before its backward. The forward waits for each
        layer's weights when it comes to it, and the last backward pushes each chunk as it is finished. What was
        computed before is pushed until the first backward.

        Raises:
            Interrupted: the weights do not come.
        """
        flat = self._flat
        slots = slot_range(contribution, self._contributions, self._slots)
        factor = loss_scale / len(slots) if self._accumulate_fp16 else loss_scale
        self._model.train()
        losses, tokens = [], 0
        with flat.needing(self._steps.await_weights):
            for slot in slots:
                loss, count = self._forward(step, contribution, slot)
                losses.append(loss.detach())
                tokens += count
                if slot == slots[0]:
                    self._steps.forget_gradient()
                    flat.clear(divide=not self._accumulate_fp16)
                if slot != slots[-1]:
                    self._backward(step, contribution, loss * factor)
                # Also where no layer waits for its own weights, what nobody wants any more is left between two slots;
                # and what no layer asked for may be pushed as well.
                self._steps.await_weights(None)
        # One transfer at the end: the device is not waited for in between. Not every device has float64.
        loss_sums = device.fetch(torch.stack(losses))
        begun = self._steps.begin_push(contribution, lambda: (float(loss_sums().double().sum()), tokens))
        with flat.finishing(lambda chunk: self._steps.push_chunk(begun, chunk)):
            self._backward(step, contribution, loss * factor)
        return begun

    def _forward(self, step: int, contribution: int, slot: int) -> tuple[torch.Tensor, int]:
        with self._trace.span("forward", "compute", step, contribution=contribution, track=COMPUTE):
            batch_BT = device.upload(self._batches.batch(step, slot), self._flat.device)
            device.seed(slot_seed(self._seed, step, slot))
            return self._model.loss(batch_BT), batch_BT.shape[0] * (batch_BT.shape[1] - 1)

    def _backward(self, step: int, contribution: int, loss: torch.Tensor) -> None:
        with self._trace.span("backward", "compute", step, contribution=contribution, track=COMPUTE):
            loss.backward()

    def evaluate(self, part: int) -> tuple[float, int, int]:
        """Evaluate one part of the held-out data: (loss sum in nats, tokens, bytes of text)."""
        windows = self._held_out.part(part)
        # The layers learn from contributions: here, some of them may not be called at all.
        with self._flat.needing(self._steps.await_weights, layerwise=False):
            loss_sum, tokens = evaluate_windows(self._model, windows, self._evaluation_batch)
        return loss_sum, tokens, self._held_out.bytes_of(part)
