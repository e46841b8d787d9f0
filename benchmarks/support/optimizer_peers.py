"""The same step with PyTorch's fused AdamW and DeepSpeed's CPU Adam, with the conversions that they need.

In: two FP16 gradients. Then their mean in FP32, unscaled; the update; the weights in FP16. Whole tensors, or pieces
that stay in the cache from the first conversion to the last. A norm that clips must be known before anything is
updated: with one, pieces go over the data twice, as Windlass does. `norm unused` takes it in the only pass, where it
comes too late to clip.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.support.optimizer_passes import GRADIENTS, LOSS_SCALE, LR, OPTIMIZER, Pass, Problem

#: Elements of a piece: 1.4 MiB of everything that the step touches, which an L2 cache of 2 MiB holds. Of 16 to 256 Ki
#: the best for the peers.
PIECE = 64 * 1024
UNSCALE = 1 / (GRADIENTS * LOSS_SCALE)
STEP = 10.0
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Tensors:
    """A piece of the problem; the views share its memory."""

    gradients: list[torch.Tensor]
    weights: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    half: torch.Tensor
    #: FP32 room for the mean.
    mean: torch.Tensor

    def add_up(self) -> None:
        self.mean.copy_(self.gradients[0])
        for gradient in self.gradients[1:]:
            self.mean.add_(gradient)

    def square_sum(self) -> torch.Tensor:
        """With BLAS, which is quicker at it than `torch.linalg.vector_norm`."""
        return torch.dot(self.mean, self.mean)

    def publish(self) -> None:
        self.half.copy_(self.weights)


Step = Callable[[Tensors], object]


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def peers(problem: Problem) -> dict[str, Pass]:
    torch.set_num_threads(1)
    updates: dict[str, Step] = {"torch": _torch_update()}
    if has_deepspeed():
        updates["DeepSpeed"] = _deepspeed_update()
    whole = _cut(problem, problem.size, in_place=True)
    #: One room for all pieces, so that it stays in the cache.
    pieces = _cut(problem, PIECE, in_place=False)
    kept = _cut(problem, PIECE, in_place=True)
    made: dict[str, Pass] = {}
    for name, update in updates.items():
        made[f"{name}, whole"] = _one_pass(whole, update)
        made[f"{name}, pieces"] = _one_pass(pieces, update)
        made[f"{name}, pieces, norm"] = _two_passes(kept, update)
        made[f"{name}, pieces, norm unused"] = _one_pass(pieces, update, norm=True)
    return made


def _cut(problem: Problem, size: int, *, in_place: bool) -> list[Tensors]:
    room = torch.empty(min(size, problem.size))
    parts = []
    for low in range(0, problem.size, size):
        part = slice(low, min(low + size, problem.size))
        gradients = [torch.from_numpy(gradient[part]).view(torch.float16) for gradient in problem.gradients]
        state = (torch.from_numpy(array[part]) for array in (problem.weights, problem.first, problem.second))
        half = torch.from_numpy(problem.published[part]).view(torch.float16)
        mean = torch.from_numpy(problem.mean[part]) if in_place else room[: part.stop - part.start]
        parts.append(Tensors(gradients, *state, half, mean))
    return parts


def _one_pass(parts: list[Tensors], update: Step, *, norm: bool = False) -> Pass:
    def run() -> None:
        for part in parts:
            part.add_up()
            part.mean.mul_(UNSCALE)
            if norm:
                part.square_sum()
            update(part)
            part.publish()

    return run


def _two_passes(parts: list[Tensors], update: Step) -> Pass:
    def run() -> None:
        square_sums = []
        for part in parts:
            part.add_up()
            square_sums.append(part.square_sum())
        norm = UNSCALE * math.sqrt(torch.stack(square_sums).sum())
        factor = UNSCALE / max(1.0, norm / CLIP_NORM)
        for part in parts:
            part.mean.mul_(factor)
            update(part)
            part.publish()

    return run


def _torch_update() -> Step:
    step = torch.tensor(STEP)
    beta1, beta2 = OPTIMIZER.betas
    options: dict[str, Any] = {
        "lr": LR,
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": OPTIMIZER.weight_decay,
        "eps": OPTIMIZER.eps,
        "amsgrad": False,
        "maximize": False,
    }

    def update(part: Tensors) -> None:
        torch._fused_adamw_([part.weights], [part.mean], [part.first], [part.second], [], [step], **options)

    return update


def _deepspeed_update() -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # The parameter only makes it compile; pieces have no parameter of their own.
    optimizer = DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))], lr=LR, adamw_mode=True)
    beta1, beta2 = OPTIMIZER.betas
    rule = (LR, beta1, beta2, OPTIMIZER.eps, OPTIMIZER.weight_decay, True)

    def update(part: Tensors) -> None:
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, int(STEP), *rule, part.weights, part.mean, part.first, part.second
        )

    # Kept alive: its operator is released with it.
    update.optimizer = optimizer  # type: ignore[attr-defined]
    return update
