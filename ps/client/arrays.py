"""Named float32 arrays as the source of a `ParameterClient`: what a worker without torch pushes and pulls.

Weights and gradients lie in two flat buffers, laid out as the plan says; what the user sees are views.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ps.client.pusher import Encoded
from ps.errors import ConfigError, GradientError, PsError
from ps.kernels.convert import decode, encode
from ps.sharding import Chunk, Plan, presence_map
from ps.types import ParameterTable, TensorSpec, WireDtype

Array = np.ndarray

#: Index of a parameter group: the weight decay applies to the first, not to the second.
DECAYED, NOT_DECAYED = 0, 1


def copy_of(parameters: Mapping[str, Any]) -> dict[str, Array]:
    """Copy initial values, so that what the caller does with them later cannot change the run's.

    Raises:
        ConfigError: there are none, or one is not float32, or not finite.
    """
    if not parameters:
        raise ConfigError("parameters={}: at least one named float32 array is needed")
    values = {}
    for name, value in parameters.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a parameter is named {name!r}; names are texts of at least one letter")
        array = np.asarray(value)
        if array.size == 0:
            raise ConfigError(f"parameter {name!r} of shape {array.shape} has no elements")
        _require_float32(ConfigError, f"parameter {name!r}", array)
        if not np.isfinite(array).all():
            raise ConfigError(f"the initial value of parameter {name!r} is not finite; start from finite numbers")
        values[name] = array.copy(order="C")
    return values


def table_of(values: Mapping[str, Array], decay: Collection[str] | None) -> ParameterTable:
    """List the parameters, in their order.

    Args:
        values: the initial values by name.
        decay: names to which the weight decay applies; None: those with two and more dimensions.

    Raises:
        ConfigError: `decay` names what is no parameter.
    """
    if decay is None:
        decay = {name for name, value in values.items() if value.ndim >= 2}
    if isinstance(decay, str):
        raise ConfigError(f"decay={decay!r} is one text; give a list of names")
    for name in decay:
        if name not in values:
            raise ConfigError(f"decay names {name!r}, {_near(name, values)}")
    return ParameterTable(
        tuple(
            TensorSpec(name, value.shape, DECAYED if name in decay else NOT_DECAYED) for name, value in values.items()
        )
    )


class NamedArrays:
    """Implements `ps.client.client.Source`.

    Args:
        values: the initial values by name, which stay as they are.
        plan: of the table of these values.
        wire: the dtype in which gradients and weights travel.
    """

    def __init__(self, values: Mapping[str, Array], plan: Plan, wire: WireDtype) -> None:
        self._plan = plan
        self._wire = wire
        self._initial = [value.reshape(-1) for value in values.values()]
        self._weights = np.zeros(plan.size, np.float32)
        self._gradients = np.zeros(plan.size, np.float32)
        #: Which tensors the present contribution has a gradient of.
        self._touched = [False] * len(self._initial)
        #: Read-only views of the weights.
        self.weights: Mapping[str, Array] = MappingProxyType(self._views(self._weights, writeable=False))
        self._gradient_views = self._views(self._gradients, writeable=True)

    def _views(self, flat: Array, writeable: bool) -> dict[str, Array]:
        views = {}
        for tensor, offset in zip(self._plan.table.tensors, self._plan.offsets, strict=True):
            view = flat[offset : offset + tensor.size].reshape(tensor.shape)
            view.flags.writeable = writeable
            views[tensor.name] = view
        return views

    def check(self, gradients: Mapping[str, Any]) -> dict[str, Array]:
        """See that gradients are those of the parameters; one that is left out is no gradient.

        Raises:
            GradientError: a name, a shape, a dtype or a layout is wrong; names the array and what it must be.
        """
        checked = {}
        for name, gradient in gradients.items():
            expected = self._gradient_views.get(name)
            if expected is None:
                raise GradientError(f"a gradient of {name!r}, {_near(name, self._gradient_views)}")
            array = np.asarray(gradient)
            what = f"the gradient of {name!r}"
            if array.shape != expected.shape:
                raise GradientError(f"{what} has shape {list(array.shape)}, its parameter {list(expected.shape)}")
            _require_float32(GradientError, what, array)
            if not array.flags.c_contiguous:
                raise GradientError(f"{what} is not C-contiguous; push np.ascontiguousarray(gradient)")
            checked[name] = array
        return checked

    def fill(self, gradients: Mapping[str, Array], loss_scale: float) -> None:
        """Take over the gradients of a contribution, multiplied by the loss scale; `check` comes first."""
        scale = np.float32(loss_scale)
        # What overflows becomes infinite, and the coordinator skips the step: that is what the scale is adapted by.
        with np.errstate(over="ignore", invalid="ignore"):
            for index, (name, view) in enumerate(self._gradient_views.items()):
                self._touched[index] = name in gradients
                if name in gradients:
                    np.multiply(gradients[name], scale, out=view)
                else:
                    view.fill(0)

    # -- Source ---------------------------------------------------------------------------------

    def encode(self, chunk: Chunk, slots: int, room: Array) -> Encoded:
        """Write a chunk of the gradient, divided by `slots`, into `room`."""
        digest = encode(self._gradients[chunk.start : chunk.stop], slots, self._wire, room)
        return Encoded(digest, presence_map(chunk, self._touched))

    def decode(self, chunk: Chunk, payload: Array) -> None:
        """Take over the published weights of a chunk."""
        decode(payload, self._wire, self._weights[chunk.start : chunk.stop])

    def initial(self, chunk: Chunk, room: Array) -> None:
        """Write the initial values of a chunk."""
        for run in chunk.runs:
            start = chunk.start + run.start - self._plan.offsets[run.tensor]
            room[run.start : run.stop] = self._initial[run.tensor][start : start + run.stop - run.start]

    def discard(self) -> None:
        """The buffer is kept: the next contribution is written into it."""

    def forget_initial(self) -> None:
        """They are kept: a cluster that lost everything before its first checkpoint asks again."""


def _require_float32(error: type[PsError], what: str, array: Array) -> None:
    if array.dtype != np.float32:
        raise error(f"{what} is {array.dtype}, not float32; convert it with .astype(np.float32)")


def _near(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"which is no parameter of this client{hint} (it has: {', '.join(names)})"
