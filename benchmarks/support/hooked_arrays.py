"""A torch module of many tensors whose backward has its gradients already: what is left is the hooks' work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ps.client.pusher import Encoded
from ps.sharding import Chunk, Plan
from ps.types import WireDtype
from workers.engine.flat_model import FlatModel, without_values

Array = np.ndarray


class _Given(torch.autograd.Function):
    """One node of the graph whose backward returns a gradient for each parameter, in the order of a real one."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return None, *ctx.gradients


class HookedArrays:
    """A `Source` as a worker has it, with the worker's own flat model and its gradient hooks."""

    def __init__(self, plan: Plan, wire: WireDtype, seed: int) -> None:
        # As in workers: one thread, which computes.
        torch.set_num_threads(1)
        with without_values():
            module = nn.Module()
            for tensor in plan.table.tensors:
                module.register_parameter(tensor.name, nn.Parameter(torch.empty(tensor.shape)))
        cpu = torch.device("cpu")
        self._flat = FlatModel(module, plan, cpu, torch.float32, wire, False, lambda _: torch.empty(0))
        generator = torch.Generator().manual_seed(seed)
        self._gradients = [torch.randn(t.shape, generator=generator).mul_(1e-3) for t in plan.table.tensors]

    def backward(self, on_chunk: Callable[[Chunk], None]) -> None:
        """Have autograd bring all gradients, telling of every chunk as it is finished."""
        flat = self._flat
        flat.clear(divide=True)
        parameters = list(flat.module.parameters())
        with flat.finishing(on_chunk):
            _Given.apply(self._gradients, *parameters).requires_grad_().backward()

    def encode(self, chunk: Chunk, slots: int, room: Array) -> Encoded:
        return self._flat.encode(chunk, slots, room)

    def decode(self, chunk: Chunk, payload: Array) -> None:
        self._flat.decode(chunk, payload)

    def initial(self, chunk: Chunk, room: Array) -> None:
        for run in chunk.runs:
            room[run.start : run.stop] = 0.02

    def discard(self) -> None:
        self._flat.discard()

    def forget_initial(self) -> None:
        pass
