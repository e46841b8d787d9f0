"""The exact weighted mean of a chunk's contributions, and its statistics.

S = sum over contributions of K_c * g_c in float64, starting from +0.0; m = float32(S / G). FP16
values are multiples of 2^-24 below 2^16 and the K_c add up to at most 8192, so S is exact and no order of
arrival can change a bit. (Of two NaNs the order may choose the payload; such a step is skipped.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, FLOAT64, Array, padded, readonly, require, wire_view
from ps.kernels.formats import widen
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, astype, load, prefetch, repeat, settle, start_of, store, stream, streams
from ps.types import SEGMENT, WireDtype

#: Gradients in one pass; a shard holds as many contributions of a chunk as received.
MAX_GRADIENTS = 4
#: Float64 accumulators of the sum of squares, by position in the segment.
LANES = 256


def fold(accumulator: Array, gradients: Sequence[Array], weights: Sequence[int], dtype: WireDtype) -> None:
    """Add K0*g0, then K1*g1, ..., to the accumulator, in float64.

    Args:
        accumulator: float64 [n], changed in place.
        gradients: 1 to 4 of [n] of `dtype.numpy`; may be readonly.
        weights: K_c, the slots of each contribution.
        dtype: of the wire.

    Raises:
        ValueError: an array is not what is said above, or a count is out of range.
    """
    require("accumulator", accumulator, FLOAT64, accumulator.size, writeable=True)
    if not gradients:
        raise ValueError("fold: there are no gradients")
    out = padded(accumulator)
    _fold(out, len(gradients), *_quadruples(gradients, weights, dtype, accumulator.size))
    if out is not accumulator:
        accumulator[:] = out[: accumulator.size]


def reduce(
    gradients: Sequence[Array],
    weights: Sequence[int],
    accumulator: Array | None,
    total: int,
    dtype: WireDtype,
    mean: Array,
    square_sums: Array,
) -> None:
    """Write m = float32((accumulator + K0*g0 + K1*g1 + ...) / total) and its sums of squares.

    The sum of squares of a segment is taken in 256 float64 accumulators by position modulo 256, which are
    then added in order: one result on every machine. It is not finite when any m is not.

    Args:
        gradients: 0 to 4 of [n] of `dtype.numpy`, added in this order; may be readonly.
        weights: K_c, the slots of each contribution.
        accumulator: float64 [n] of what was folded before, or None for +0.0.
        total: G, the slots of the step.
        dtype: of the wire.
        mean: float32 [n], written.
        square_sums: float64 [ceil(n / 65536)], written.

    Raises:
        ValueError: an array is not what is said above, a count is out of range, or nothing is given.
    """
    size = mean.size
    require("mean", mean, FLOAT32, size, writeable=True)
    require("square_sums", square_sums, FLOAT64, -(-size // SEGMENT), writeable=True)
    if total < 1:
        raise ValueError(f"total={total}: must be at least 1")
    if accumulator is not None:
        require("accumulator", accumulator, FLOAT64, size)
    elif not gradients:
        raise ValueError("reduce: there are neither gradients nor an accumulator")
    start = _NOTHING if accumulator is None else readonly(padded(accumulator))
    views, factors = _quadruples(gradients, weights, dtype, size)
    # Zeros add nothing to a sum of squares.
    out = padded(mean)
    _reduce(start, len(gradients), views, factors, np.float64(total), out, square_sums)
    if out is not mean:
        mean[:] = out[:size]


_NOTHING = readonly(np.empty(0, FLOAT64))


def _quadruples(
    gradients: Sequence[Array], weights: Sequence[int], dtype: WireDtype, size: int
) -> tuple[tuple[Array, ...], tuple[np.float64, ...]]:
    """Check the gradients and fill them up to four, so that one compiled kernel serves every count."""
    if len(gradients) > MAX_GRADIENTS or len(gradients) != len(weights):
        raise ValueError(f"{len(gradients)} gradients, {len(weights)} weights: at most {MAX_GRADIENTS}, in pairs")
    for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        require(f"gradient {index}", gradient, dtype.numpy, size)
        if weight < 1:
            raise ValueError(f"the weight of gradient {index} is {weight}: must be at least 1")
    missing = MAX_GRADIENTS - len(gradients)
    filled = (*gradients, *[np.empty(0, dtype.numpy)] * missing)
    factors = (*weights, *[0] * missing)
    return tuple(readonly(wire_view(padded(g), dtype)) for g in filled), tuple(np.float64(k) for k in factors)


@inner
def _wide(gradient: Any, i: Any) -> Any:
    prefetch(gradient, i)
    return astype(widen(load(gradient, i)), np.float64)


@inner
def _sum(accumulator: Any, has_start: Any, count: Any, g0: Any, g1: Any, g2: Any, g3: Any, k: Any, i: Any) -> Any:
    """Return a vector of accumulator + K0*g0 + K1*g1 + ..., added in this order.

    The branches are the same for every vector of a pass: they cost next to nothing beside its memory traffic.
    """
    total = repeat(0.0)
    if has_start:
        prefetch(accumulator, i)
        total = load(accumulator, i)
    if count > 0:
        total = total + k[0] * _wide(g0, i)
    if count > 1:
        total = total + k[1] * _wide(g1, i)
    if count > 2:
        total = total + k[2] * _wide(g2, i)
    if count > 3:
        total = total + k[3] * _wide(g3, i)
    return total


@kernel
def _fold(accumulator: Any, count: Any, g: Any, k: Any) -> None:
    out, g0, g1, g2, g3 = start_of(accumulator), start_of(g[0]), start_of(g[1]), start_of(g[2]), start_of(g[3])
    for i in range(0, accumulator.size, WIDTH):
        store(out, i, _sum(out, True, count, g0, g1, g2, g3, k, i))


@kernel
def _reduce(accumulator: Any, count: Any, g: Any, k: Any, divisor: Any, mean: Any, square_sums: Any) -> None:
    # A division by a power of two is exactly a multiplication, and several times faster.
    is_power = np.int64(divisor) & (np.int64(divisor) - 1) == 0
    reciprocal = 1.0 / divisor
    has_start, size, out = accumulator.size > 0, mean.size, start_of(mean)
    start, g0, g1, g2, g3 = start_of(accumulator), start_of(g[0]), start_of(g[1]), start_of(g[2]), start_of(g[3])
    lanes = np.empty(LANES, np.float64)
    squares = start_of(lanes)
    past_the_caches = streams(out)
    for segment in range(square_sums.size):
        lanes[:] = 0.0
        end = min((segment + 1) * SEGMENT, size)
        for row in range(segment * SEGMENT, end, LANES):
            for lane in range(0, min(LANES, end - row), WIDTH):
                i = row + lane
                total = _sum(start, has_start, count, g0, g1, g2, g3, k, i)
                m = astype(total * reciprocal if is_power else total / divisor, np.float32)
                stream(out, i, m, past_the_caches)
                wide = astype(m, np.float64)
                store(squares, lane, load(squares, lane) + wide * wide)
        square_sum = 0.0
        for lane in range(LANES):
            square_sum += lanes[lane]
        square_sums[segment] = square_sum
    settle()
