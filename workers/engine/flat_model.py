"""A model whose weights and gradients live in two flat buffers, laid out as the plan says.

A chunk is a slice of the flat space, so pushing and pulling convert contiguous memory in one pass,
whatever the tensors. Parameters become views; tied ones are one parameter and so one view.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ps.errors import ConfigError
from ps.sharding import Chunk, Plan
from ps.types import WireDtype
from workers.engine.device import Mover, mover

Array = np.ndarray


class FlatModel:
    """Implements `ps.client.client.Source` for a torch module."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        wire: WireDtype,
        accumulate_fp16: bool,
        make_initialized: Callable[[], nn.Module],
    ) -> None:
        """Move the module to the device and its parameters into the flat buffers.

        Args:
            module: the model; its present values are dropped.
            dtype: of weights, forward and backward.
            accumulate_fp16: gradients add up in `dtype` (FP16) instead of FP32.
            make_initialized: makes an FP32 copy of the module, on the CPU, with its initial values.
        """
        self.module = module
        self.plan = plan
        self.device = device
        self._make_initialized = make_initialized
        self._initialized: dict[str, torch.Tensor] | None = None
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if [t.name for t in plan.table.tensors] != list(self._parameters):
            raise ConfigError("the model's trainable parameters are not those of the plan's table")
        self.weights = torch.zeros(plan.size, dtype=dtype, device=device)
        gradient_dtype = dtype if accumulate_fp16 else torch.float32
        self.gradients = torch.zeros(plan.size, dtype=gradient_dtype, device=device)
        self._mover: Mover = mover(device, wire, max(chunk.size for chunk in plan.chunks))
        #: Which tensors have had a gradient since `clear`.
        self._touched = [False] * len(plan.table.tensors)
        self._divide = True
        self._bind(dtype)

    def _bind(self, dtype: torch.dtype) -> None:
        views = zip(self.plan.table.tensors, self.plan.offsets, strict=True)
        for index, (tensor, offset) in enumerate(views):
            parameter = self._parameters[tensor.name]
            window = slice(offset, offset + tensor.size)
            parameter.data = self.weights[window].view(tensor.shape)
            gradient = self.gradients[window].view(tensor.shape)
            if self.gradients.dtype is dtype:
                # Autograd adds in place to a gradient that is there already.
                parameter.grad = gradient
                parameter.register_post_accumulate_grad_hook(self._note(index))
            else:
                parameter.register_post_accumulate_grad_hook(self._add(index, gradient))
        # What is not trained (buffers, frozen parameters) moves along as it is.
        self.module.to(self.device)

    def _note(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            self._touched[index] = True

        return hook

    def _add(self, index: int, gradient: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Half-precision gradients add up in FP32; the half one is freed at once."""

        def hook(parameter: torch.Tensor) -> None:
            self._touched[index] = True
            assert parameter.grad is not None, "the hook runs after the gradient has come"
            gradient.add_(parameter.grad)
            parameter.grad = None

        return hook

    def clear(self, divide: bool) -> None:
        """Begin a contribution: no gradient yet.

        Args:
            divide: whether `encode` divides by the number of slots (the losses were not divided).
        """
        self.gradients.zero_()
        self._touched = [False] * len(self._touched)
        self._divide = divide

    # -- Source ---------------------------------------------------------------------------------

    def encode(self, chunk: Chunk, slots: int, room: Array) -> bytes:
        """Write a chunk of the gradient into `room`; returns the presence map of its runs."""
        self._mover.read(self.gradients[chunk.start : chunk.stop], slots if self._divide else 1, room)
        bits = sum(1 << position for position, run in enumerate(chunk.runs) if self._touched[run.tensor])
        return bits.to_bytes(chunk.presence_bytes, "little")

    def decode(self, chunk: Chunk, payload: Array) -> None:
        """Take over the published weights of a chunk."""
        self._mover.write(payload, self.weights[chunk.start : chunk.stop])

    def initial(self, chunk: Chunk, room: Array) -> None:
        """Write the initial FP32 values of a chunk; the copy that has them is kept until `forget_initial`."""
        if self._initialized is None:
            module = self._make_initialized()
            self._initialized = {name: p.detach().float().reshape(-1) for name, p in module.named_parameters()}
        for run in chunk.runs:
            tensor = self.plan.table.tensors[run.tensor]
            start = chunk.start + run.start - self.plan.offsets[run.tensor]
            values = self._initialized[tensor.name][start : start + run.stop - run.start]
            room[run.start : run.stop] = values.numpy()

    def forget_initial(self) -> None:
        self._initialized = None
