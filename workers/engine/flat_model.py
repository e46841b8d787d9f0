"""A model whose weights and gradients live in two flat buffers, laid out as the plan says.

A chunk is a slice of the flat space, so pushing and pulling convert contiguous memory in one pass,
whatever the tensors. Parameters become views; tied ones are one parameter and so one view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ps.client.pusher import Encoded
from ps.errors import ConfigError
from ps.kernels.digest import hash_payload
from ps.sharding import Chunk, Plan, presence_map
from ps.types import WireDtype
from workers.engine.device import Mark, Mover, flat_buffer, mover
from workers.engine.overlap import AtTheEnd, Finishing, Layers

Array = np.ndarray
#: Where a module holds each parameter, by the parameter's identity.
Owners = dict[int, list[tuple[nn.Module, str]]]


class _SkipValues(TorchFunctionMode):
    """Leaves tensors as they are where a module's constructor would fill them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        named = kwargs or {}
        if func in _FILLS:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


_FILLS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
_FILLS |= {getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_")}


@contextmanager
def without_values() -> Iterator[None]:
    """Make modules whose parameters take no memory, for a `FlatModel` to place.

    Filling a tensor on the meta device would be free as well, but for 70 MB of Python modules that
    torch imports to find that out.
    """
    with torch.device("meta"), _SkipValues():
        yield


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
        initial_value: Callable[[str], torch.Tensor],
        *,
        overlap: bool = True,
    ) -> None:
        """Move the module to the device and its parameters into the flat buffers.

        Args:
            module: the model; its present values are dropped. Made inside `without_values` it costs no
                memory before this.
            dtype: of weights, forward and backward.
            accumulate_fp16: gradients add up in `dtype` (FP16) instead of FP32.
            initial_value: a parameter's initial value by its name, FP32 on the CPU.
            overlap: chunks are told of while the backward goes on.
        """
        self.module = module
        self.plan = plan
        self.device = device
        self._initial_value = initial_value
        #: The initial value that was asked for last: neighbouring chunks share a tensor.
        self._initial: tuple[str, torch.Tensor] | None = None
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if [t.name for t in plan.table.tensors] != list(self._parameters):
            raise ConfigError("the model's trainable parameters are not those of the plan's table")
        self.weights = flat_buffer(plan.size, dtype, device)
        #: Of a tensor that has had no gradient since `clear`, what an earlier contribution left.
        self.gradients = flat_buffer(plan.size, dtype if accumulate_fp16 else torch.float32, device)
        self._mover: Mover = mover(device, wire, max(chunk.size for chunk in plan.chunks))
        #: Which tensors have had a gradient since `clear`.
        self._touched = [False] * len(plan.table.tensors)
        self._divide = True
        #: When the device has each chunk's gradient, and all of them.
        self._ready: dict[int, Mark] = {}
        self._rest: Mark = None
        #: The numbers of the tensors, by the identity of their parameter.
        self._tensors: dict[int, int] = {}
        self._layers = Layers(module, self._chunks_of)
        self._finish: Finishing | AtTheEnd = Finishing(plan) if overlap else AtTheEnd()
        self._bind(dtype)

    def _bind(self, dtype: torch.dtype) -> None:
        views = zip(self.plan.table.tensors, self.plan.offsets, strict=True)
        owners = _owners(self.module)
        for index, (tensor, offset) in enumerate(views):
            window = slice(offset, offset + tensor.size)
            parameter = self._place(tensor.name, self.weights[window].view(tensor.shape), owners)
            self._tensors[id(parameter)] = index
            gradient = self.gradients[window].view(tensor.shape)
            keep = self._keep if self.gradients.dtype is dtype else self._add
            parameter.register_post_accumulate_grad_hook(keep(index, gradient))
        self._layers.watch()
        # What is not trained (buffers, frozen parameters) moves along as it is.
        self.module.to(self.device)

    def _place(self, name: str, view: torch.Tensor, owners: Owners) -> nn.Parameter:
        """Make a parameter a view, wherever the module holds it: tied ones are one parameter.

        Autograd is not to see that weights are written: those of one layer come while another one's are computed
        with, and who may write is seen to by the client.
        """
        parameter = self._parameters[name]
        if not parameter.is_meta:
            parameter.data = view
            return parameter
        placed = nn.Parameter(view.data)
        for owner, attribute in owners[id(parameter)]:
            setattr(owner, attribute, placed)
        return placed

    def _keep(self, index: int, gradient: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Autograd adds in place to a gradient that is there already; the first one it makes anew."""

        def hook(parameter: torch.Tensor) -> None:
            if not self._touched[index]:
                self._touched[index] = True
                assert parameter.grad is not None, "the hook runs after the gradient has come"
                parameter.grad = gradient.copy_(parameter.grad.to_dense())
            self._finish.came(index)

        return hook

    def _add(self, index: int, gradient: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Half-precision gradients add up in FP32; the half one is freed at once."""

        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, "the hook runs after the gradient has come"
            if self._touched[index]:
                gradient.add_(parameter.grad)
            else:
                self._touched[index] = True
                gradient.copy_(parameter.grad.to_dense())
            parameter.grad = None
            self._finish.came(index)

        return hook

    def _chunks_of(self, parameters: Iterable[nn.Parameter]) -> list[Chunk]:
        """The chunks that some parameters touch, in forward order."""
        found: dict[int, Chunk] = {}
        for parameter in parameters:
            tensor = self._tensors[id(parameter)]
            start = self.plan.offsets[tensor]
            stop = start + self.plan.table.tensors[tensor].size
            found.update((chunk.index, chunk) for chunk in self.plan.chunks_between(start, stop))
        return [found[index] for index in sorted(found)]

    @contextmanager
    def needing(
        self, await_weights: Callable[[Sequence[Chunk] | None], None], *, layerwise: bool = True
    ) -> Iterator[None]:
        """Have every layer wait, before its forward, for the weights that it reads.

        Args:
            await_weights: returns when weights of these chunks are there; None: of all.
            layerwise: False: all are waited for first.
        """

        def need(chunks: Sequence[Chunk] | None) -> None:
            await_weights(chunks)
            self._mover.use()

        if layerwise:
            with self._layers.needing(need):
                yield
        else:
            need(None)
            yield
        self._mover.mark()

    @contextmanager
    def finishing(self, on_chunk: Callable[[Chunk], None]) -> Iterator[None]:
        """Tell of every chunk whose gradient the backward inside finishes, as soon as it does."""

        def ready(chunk: Chunk) -> None:
            self._ready[chunk.index] = self._mover.mark()
            on_chunk(chunk)

        with self._finish.telling(ready):
            yield
        self._rest = self._mover.mark()

    def clear(self, divide: bool) -> None:
        """Begin a contribution: no gradient yet.

        Args:
            divide: whether `encode` divides by the number of slots (the losses were not divided).
        """
        # No zeros are written: the first gradient of each tensor replaces what is there.
        self.module.zero_grad(set_to_none=True)
        self._ready.clear()
        self._touched = [False] * len(self._touched)
        self._divide = divide

    # -- Source ---------------------------------------------------------------------------------

    def encode(self, chunk: Chunk, slots: int, room: Array) -> Encoded:
        """Write a chunk of the gradient into `room`."""
        ready = self._ready.get(chunk.index, self._rest)
        gradient = self.gradients[chunk.start : chunk.stop]
        digest = self._mover.read(gradient, slots if self._divide else 1, room, ready)
        absent = [run for run in chunk.runs if not self._touched[run.tensor]]
        for run in absent:
            room[run.start : run.stop] = 0
        return Encoded(hash_payload(room) if absent else digest, presence_map(chunk, self._touched))

    def discard(self) -> None:
        """Nothing: the next contribution is written over it, and weights that come need no room of their own."""

    def decode(self, chunk: Chunk, payload: Array) -> None:
        """Take over the published weights of a chunk."""
        self._mover.write(payload, self.weights[chunk.start : chunk.stop])

    def initial(self, chunk: Chunk, room: Array) -> None:
        """Write the initial FP32 values of a chunk."""
        for run in chunk.runs:
            tensor = self.plan.table.tensors[run.tensor]
            if self._initial is None or self._initial[0] != tensor.name:
                self._initial = (tensor.name, self._initial_value(tensor.name).reshape(-1))
            start = chunk.start + run.start - self.plan.offsets[run.tensor]
            room[run.start : run.stop] = self._initial[1][start : start + run.stop - run.start].numpy()

    def forget_initial(self) -> None:
        """Free what `initial` keeps."""
        self._initial = None


def _owners(module: nn.Module) -> Owners:
    owners: Owners = {}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((owner, attribute))
    return owners
