"""The optimizer step of a chunk: one pass in place that updates, publishes and hashes.

The pass walks blocks of 1024 elements. What lies inside of one run is updated, published and hashed in one
loop, from registers. A block that a run's border cuts is published as it is, then updated run by run under a
mask, then hashed, while it is in the first-level cache. Every element is computed by the same float32 operations
in the same order wherever its block, run or chunk ends: the cut of the flat space cannot change a bit.
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
from ps.kernels.hashing import BLOCK, NO_MOMENT, block_key, first_block, hash_block, hash_state, no_pairs, pairs
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, load, positions, prefetch, repeat, start_of, store, total, where
from ps.sharding import Run
from ps.types import ALIGNMENT, Decision, WireDtype


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
            ValueError: an array is not what is said above, a group has no scalars, or the chunk is not one of a plan.
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
        if size % ALIGNMENT:
            raise ValueError(f"a chunk has a multiple of {ALIGNMENT} elements; there are {size} weights")
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
def _gradient(mean: Any, weight: Any, multiplier: Any, penalty: Any) -> Any:
    """Unscale and clip, and add the L2 penalty of the old weight."""
    gradient = mean * multiplier
    if penalty != np.float32(0):
        gradient = gradient + penalty * weight
    return gradient


@inner
def _inside(i: Any, start: Any, stop: Any) -> Any:
    """Return which elements of the vector at i lie in start..stop."""
    lane = positions()
    return (lane >= np.uint32(max(start - i, 0))) & (lane < np.uint32(min(stop - i, WIDTH)))


@inner
def _adam(
    mean: Any,
    weights: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    published: Any,
    start: Any,
    stop: Any,
    whole: Any,
    step: Any,
    penalty: Any,
    decay: Any,
    scalars: Any,
    block: Any,
) -> Any:
    """Update start..stop; return their part of the hash when they are whole blocks."""
    multiplier, beta1, rest1, beta2, rest2 = scalars[0], scalars[1], scalars[2], scalars[3], scalars[4]
    correction, eps = scalars[5], scalars[6]
    value = np.uint64(0)
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        nh = no_pairs()
        for i in range(max(start // WIDTH * WIDTH, low), min(stop, low + BLOCK), WIDTH):
            prefetch(mean, i)
            prefetch(weights, i)
            prefetch(exp_avg, i)
            prefetch(exp_avg_sq, i)
            old, old_average, old_square = load(weights, i), load(exp_avg, i), load(exp_avg_sq, i)
            gradient = _gradient(load(mean, i), old, multiplier, penalty)
            average = beta1 * old_average + rest1 * gradient
            square = beta2 * old_square + rest2 * (gradient * gradient)
            weight = decay * old - step * average / (np.sqrt(square) * correction + eps)
            if whole:
                nh = nh + pairs(weight, average, square, i - low)
            else:
                inside = _inside(i, start, stop)
                weight, average = where(inside, weight, old), where(inside, average, old_average)
                square = where(inside, square, old_square)
            store(exp_avg, i, average)
            store(exp_avg_sq, i, square)
            store(weights, i, weight)
            store(published, i, narrow(weight, published))
        value += total(nh) * block_key(block + low // BLOCK)
    return value


@inner
def _momentum(
    mean: Any,
    weights: Any,
    buffer: Any,
    published: Any,
    start: Any,
    stop: Any,
    whole: Any,
    step: Any,
    penalty: Any,
    scalars: Any,
    block: Any,
) -> Any:
    """As `_adam`."""
    multiplier, momentum, share, nesterov = scalars[0], scalars[1], scalars[2], scalars[3] != np.float32(0)
    value, zero = np.uint64(0), repeat(np.float32(0))
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        nh = no_pairs()
        for i in range(max(start // WIDTH * WIDTH, low), min(stop, low + BLOCK), WIDTH):
            prefetch(mean, i)
            prefetch(weights, i)
            prefetch(buffer, i)
            old, old_average = load(weights, i), load(buffer, i)
            gradient = _gradient(load(mean, i), old, multiplier, penalty)
            average = momentum * old_average + share * gradient
            direction = gradient + momentum * average if nesterov else average
            weight = old - step * direction
            if whole:
                nh = nh + pairs(weight, average, zero, i - low)
            else:
                inside = _inside(i, start, stop)
                weight, average = where(inside, weight, old), where(inside, average, old_average)
            store(buffer, i, average)
            store(weights, i, weight)
            store(published, i, narrow(weight, published))
        value += total(nh) * block_key(block + low // BLOCK)
    return value


@inner
def _plain(
    mean: Any,
    weights: Any,
    published: Any,
    start: Any,
    stop: Any,
    whole: Any,
    step: Any,
    penalty: Any,
    scalars: Any,
    block: Any,
) -> Any:
    """As `_adam`."""
    value, zero = np.uint64(0), repeat(np.float32(0))
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        nh = no_pairs()
        for i in range(max(start // WIDTH * WIDTH, low), min(stop, low + BLOCK), WIDTH):
            prefetch(mean, i)
            prefetch(weights, i)
            old = load(weights, i)
            weight = old - step * _gradient(load(mean, i), old, scalars[0], penalty)
            if whole:
                nh = nh + pairs(weight, zero, zero, i - low)
            else:
                weight = where(_inside(i, start, stop), weight, old)
            store(weights, i, weight)
            store(published, i, narrow(weight, published))
        value += total(nh) * block_key(block + low // BLOCK)
    return value


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
    block: Any,
) -> Any:
    size, mean, weights, published = weights.size, start_of(mean), start_of(weights), start_of(published)
    count, first, second = (first.size > 0) + (second.size > 0), start_of(first), start_of(second)
    value, run, low = np.uint64(0), 0, 0
    while low < size:
        while run < starts.size and stops[run] <= low:
            run += 1
        high, whole = min(low + BLOCK, size), False
        if run < starts.size and present[run] and starts[run] <= low and low + BLOCK <= stops[run]:
            high, whole = low + (stops[run] - low) // BLOCK * BLOCK, True
        else:
            round_to_wire(weights, published, low, high)
        current = run
        while current < starts.size and starts[current] < high:
            a, b, group = max(starts[current], low), min(stops[current], high), groups[current]
            step, penalty, decay = steps[group], penalties[group], decays[group]
            part = np.uint64(0)
            if not present[current]:
                pass
            elif rule == _ADAM:
                part = _adam(mean, weights, first, second, published, a, b, whole, step, penalty, decay, scalars, block)
            elif rule == _MOMENTUM:
                part = _momentum(mean, weights, first, published, a, b, whole, step, penalty, scalars, block)
            else:
                part = _plain(mean, weights, published, a, b, whole, step, penalty, scalars, block)
            if whole:
                value += part
            current += 1
        if not whole:
            value += hash_block(weights, first, second, size, count, low, block)
        low = high
    return value
