"""The optimizer step of a chunk: one pass in place that updates, publishes and hashes.

The pass walks blocks of 1024 elements: one loop updates and publishes what a run holds of the block,
another one hashes the block while it is in the first-level cache (one loop for both would not
vectorize). Every element is computed by the same float32 operations in the same order wherever its
block, run or chunk ends: the cut of the flat space cannot change a bit.
Source: torch.optim.AdamW, Adam, SGD (single tensor); Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.config import OptimizerConfig
from ps.kernels.arrays import FLOAT32, Array, readonly, require, wire_view
from ps.kernels.convert import encode, round_to_wire
from ps.kernels.formats import narrow
from ps.kernels.hashing import (
    BLOCK,
    NO_MOMENT,
    first_block,
    hash_block,
    hash_state,
    hash_tail,
    whole_words,
)
from ps.kernels.jit import inner, kernel
from ps.sharding import Run
from ps.types import Decision, WireDtype


@dataclass(frozen=True)
class RunTable:
    """The runs of a chunk, as the compiled pass reads them; what lies between them is padding."""

    #: int64 [runs], in ascending order, relative to the chunk.
    starts: Array
    stops: Array
    #: int64 [runs]: the parameter group of each run.
    groups: Array
    #: Length of the chunk in elements.
    size: int

    @classmethod
    def build(cls, runs: Sequence[Run], size: int) -> RunTable:
        """Check and pack the runs of a chunk.

        Raises:
            ValueError: a run is empty, overlaps the one before, or ends outside of the chunk.
        """
        end = 0
        for run in runs:
            if not end <= run.start < run.stop <= size or run.group < 0:
                raise ValueError(f"{run} follows a run that ends at {end} in a chunk of {size} elements")
            end = run.stop
        columns = np.array([(run.start, run.stop, run.group) for run in runs], np.int64).reshape(-1, 3)
        starts, stops, groups = (readonly(np.ascontiguousarray(column)) for column in columns.T)
        return cls(starts, stops, groups, size)

    def __len__(self) -> int:
        return int(self.starts.size)

    @property
    def num_groups(self) -> int:
        """One more than the highest group."""
        return int(self.groups.max(initial=-1)) + 1


class Update:
    """The update rule of a run: an optimizer and a wire dtype.

    Concurrency: holds no state; different chunks may be updated in parallel, without the interpreter lock.
    """

    def __init__(self, optimizer: OptimizerConfig, dtype: WireDtype) -> None:
        self._optimizer = optimizer
        self._dtype = dtype
        #: The optimizer's state beside the weights, named as in torch.optim.
        self.moment_names: tuple[str, ...] = _MOMENTS[_rule(optimizer)]
        self._rule = _rule(optimizer)

    def apply(
        self,
        mean: Array,
        weights: Array,
        moments: Sequence[Array],
        runs: RunTable,
        present: Array,
        decision: Decision,
        published: Array,
        base: int,
    ) -> int:
        """Carry out a committed decision on a chunk: update, publish, hash.

        Args:
            mean: float32 [n], m: the reduced, still scaled gradient; may be readonly.
            weights: float32 [n], changed in place.
            moments: float32 [n] each, in the order of `moment_names`, changed in place.
            runs: of the chunk.
            present: bool [runs]; a run without gradient is published and hashed, but not updated.
            decision: its multiplier, scalars per group, bias corrections and `applied`.
            published: [n] of the wire dtype, written.
            base: where the chunk starts in the flat space, in elements.

        Returns:
            The hash of the chunk's state after the update; add up modulo 2^64 over chunks.

        Raises:
            ValueError: an array is not what is said above, or a group has no scalars.
        """
        self._check(mean, weights, moments, published)
        require("present", present, np.dtype(np.bool_), len(runs))
        if runs.size != weights.size or runs.num_groups > len(decision.groups):
            raise ValueError(
                f"the runs are those of a chunk of {runs.size} elements and {runs.num_groups} groups; "
                f"there are {weights.size} weights and the scalars of {len(decision.groups)} groups"
            )
        first, second = (*moments, NO_MOMENT, NO_MOMENT)[:2]
        return int(
            _apply(
                self._rule,
                readonly(mean),
                weights,
                first,
                second,
                runs.starts,
                runs.stops,
                runs.groups,
                readonly(present),
                *_group_scalars(self._optimizer, decision),
                _rule_scalars(self._optimizer, decision),
                wire_view(published, self._dtype),
                first_block(base),
            )
        )

    def publish(self, weights: Array, published: Array) -> None:
        """Round the weights to the wire dtype without an update.

        Args:
            weights: float32 [n].
            published: [n] of the wire dtype, written.

        Raises:
            ValueError: an array is not what is said above.
        """
        encode(weights, 1, self._dtype, published)

    def state_hash(self, weights: Array, moments: Sequence[Array], base: int) -> int:
        """Return what `apply` returns for a chunk in this state.

        Raises:
            ValueError: an array is not as `apply` demands.
        """
        if len(moments) != len(self.moment_names):
            raise ValueError(f"{len(moments)} moments; must be {self.moment_names}")
        return hash_state((weights, *moments), base)

    def _check(self, mean: Array, weights: Array, moments: Sequence[Array], published: Array) -> None:
        size = weights.size
        require("weights", weights, FLOAT32, size, writeable=True)
        require("mean", mean, FLOAT32, size)
        require("published", published, self._dtype.numpy, size, writeable=True)
        for name, moment in zip(self.moment_names, moments, strict=True):
            require(name, moment, FLOAT32, size, writeable=True)


_ADAM, _MOMENTUM, _PLAIN = range(3)
_MOMENTS = {_ADAM: ("exp_avg", "exp_avg_sq"), _MOMENTUM: ("momentum_buffer",), _PLAIN: ()}


def _rule(optimizer: OptimizerConfig) -> int:
    if optimizer.name != "sgd":
        return _ADAM
    return _MOMENTUM if optimizer.momentum > 0 else _PLAIN


def _group_scalars(optimizer: OptimizerConfig, decision: Decision) -> tuple[Array, Array, Array]:
    """Per group, computed in float64 and rounded once: step size, L2 factor, factor of decoupled decay."""
    decoupled = optimizer.name == "adamw"
    rows = [
        (
            group.lr / decision.bias_correction1,
            0.0 if decoupled else group.weight_decay,
            1.0 - group.lr * group.weight_decay if decoupled else 1.0,
        )
        for group in decision.groups
    ]
    columns = np.array(rows, np.float64).reshape(-1, 3).T
    steps, penalties, decays = (readonly(column.astype(np.float32, order="C")) for column in columns)
    return steps, penalties, decays


def _rule_scalars(optimizer: OptimizerConfig, decision: Decision) -> Array:
    """The multiplier of m, then the rule's own; computed in float64 and rounded once."""
    values: tuple[float, ...] = ()
    if optimizer.name != "sgd":
        beta1, beta2 = optimizer.betas
        correction = 1.0 / math.sqrt(decision.bias_correction2)
        values = (beta1, 1.0 - beta1, beta2, 1.0 - beta2, correction, optimizer.eps)
    elif optimizer.momentum > 0:
        # The first time the buffer, still zero, becomes the gradient itself.
        share = 1.0 if decision.applied == 1 else 1.0 - optimizer.dampening
        values = (optimizer.momentum, share, 1.0 if optimizer.nesterov else 0.0)
    return readonly(np.array((decision.gradient_multiplier, *values), np.float64).astype(np.float32))


@inner
def _penalize(mean: Any, weights: Any, multiplier: Any, penalty: Any, out: Any) -> None:
    """Unscale and clip the gradient, and add the L2 penalty of the old weight."""
    for i in range(out.size):
        out[i] = mean[i] * multiplier + penalty * weights[i]


@inner
def _adam(
    mean: Any,
    weights: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    published: Any,
    multiplier: Any,
    step: Any,
    decay: Any,
    scalars: Any,
) -> None:
    beta1, rest1, beta2, rest2 = scalars[1], scalars[2], scalars[3], scalars[4]
    correction, eps = scalars[5], scalars[6]
    for i in range(weights.size):
        gradient = mean[i] * multiplier
        average = beta1 * exp_avg[i] + rest1 * gradient
        square = beta2 * exp_avg_sq[i] + rest2 * (gradient * gradient)
        weight = decay * weights[i] - step * average / (np.sqrt(square) * correction + eps)
        exp_avg[i] = average
        exp_avg_sq[i] = square
        weights[i] = weight
        published[i] = narrow(weight, published)


@inner
def _momentum(mean: Any, weights: Any, buffer: Any, published: Any, multiplier: Any, step: Any, scalars: Any) -> None:
    momentum, share, nesterov = scalars[1], scalars[2], scalars[3] != np.float32(0)
    for i in range(weights.size):
        gradient = mean[i] * multiplier
        average = momentum * buffer[i] + share * gradient
        direction = gradient + momentum * average if nesterov else average
        weight = weights[i] - step * direction
        buffer[i] = average
        weights[i] = weight
        published[i] = narrow(weight, published)


@inner
def _plain(mean: Any, weights: Any, published: Any, multiplier: Any, step: Any) -> None:
    for i in range(weights.size):
        weight = weights[i] - step * (mean[i] * multiplier)
        weights[i] = weight
        published[i] = narrow(weight, published)


@kernel
def _apply(
    rule: Any,
    mean: Any,
    weights: Any,
    first: Any,
    second: Any,
    starts: Any,
    stops: Any,
    groups: Any,
    present: Any,
    steps: Any,
    penalties: Any,
    decays: Any,
    scalars: Any,
    published: Any,
    start: Any,
) -> Any:
    penalized = np.empty(BLOCK, np.float32)
    words, words1, words2 = whole_words(weights), whole_words(first), whole_words(second)
    total, run = np.uint64(0), 0
    for low in range(0, weights.size, BLOCK):
        high = min(low + BLOCK, weights.size)
        done = low
        while run < starts.size and starts[run] < high:
            a, b, group = max(starts[run], low), min(stops[run], high), groups[run]
            if present[run]:
                if a > done:
                    round_to_wire(weights[done:a], published[done:a])
                done = b
                w, out, gradient, multiplier = weights[a:b], published[a:b], mean[a:b], scalars[0]
                if penalties[group] != np.float32(0):
                    _penalize(gradient, w, multiplier, penalties[group], penalized[: b - a])
                    gradient, multiplier = penalized[: b - a], np.float32(1)
                if rule == _ADAM:
                    _adam(
                        gradient,
                        w,
                        first[a:b],
                        second[a:b],
                        out,
                        multiplier,
                        steps[group],
                        decays[group],
                        scalars,
                    )
                elif rule == _MOMENTUM:
                    _momentum(gradient, w, first[a:b], out, multiplier, steps[group], scalars)
                else:
                    _plain(gradient, w, out, multiplier, steps[group])
            if stops[run] > high:
                break
            run += 1
        if high > done:
            round_to_wire(weights[done:high], published[done:high])
        if high - low == BLOCK:
            total += hash_block(words, words1, words2, low // BLOCK, start)
    return total + hash_tail(weights, first, second, start)
