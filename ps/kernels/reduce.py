"""The exact weighted mean of a chunk's contributions, and its statistics.

S = sum over contributions of K_c * g_c in float64, starting from +0.0; m = float32(S / G). FP16
values are multiples of 2^-24 below 2^16 and the K_c add up to at most 8192, so S is exact and no order of
arrival can change a bit. (Of two NaNs the order may choose the payload; such a step is skipped.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, FLOAT64, Array, readonly, require, wire_view
from ps.kernels.formats import widen
from ps.kernels.jit import inner, kernel
from ps.types import SEGMENT, WireDtype

#: Gradients in one pass; a shard holds as many contributions of a chunk as received.
MAX_GRADIENTS = 4
#: Float64 accumulators of the sum of squares, by position in the segment.
LANES = 256
#: What the passes work on at a time: stays in the first-level cache, is a multiple of LANES, divides SEGMENT.
_BLOCK = 1024


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
    _fold(accumulator, len(gradients), *_quadruples(gradients, weights, dtype, accumulator.size))


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
    start = _NOTHING if accumulator is None else readonly(accumulator)
    views, factors = _quadruples(gradients, weights, dtype, size)
    _reduce(start, accumulator is not None, len(gradients), views, factors, np.float64(total), mean, square_sums)


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
    return tuple(readonly(wire_view(g, dtype)) for g in filled), tuple(np.float64(k) for k in factors)


@inner
def _add_one(total: Any, g0: Any, k0: Any) -> None:
    for i in range(total.size):
        total[i] += k0 * np.float64(widen(g0[i]))


@inner
def _add_two(total: Any, g0: Any, k0: Any, g1: Any, k1: Any) -> None:
    for i in range(total.size):
        total[i] = (total[i] + k0 * np.float64(widen(g0[i]))) + k1 * np.float64(widen(g1[i]))


@inner
def _add_all(total: Any, low: Any, count: Any, g: Any, k: Any) -> None:
    """Two at a time: half the traffic of the accumulator, the same order of additions."""
    high = low + total.size
    if count >= 2:
        _add_two(total, g[0][low:high], k[0], g[1][low:high], k[1])
    if count == 4:
        _add_two(total, g[2][low:high], k[2], g[3][low:high], k[3])
    elif count == 3:
        _add_one(total, g[2][low:high], k[2])
    elif count == 1:
        _add_one(total, g[0][low:high], k[0])


@kernel
def _fold(accumulator: Any, count: Any, g: Any, k: Any) -> None:
    for low in range(0, accumulator.size, _BLOCK):
        high = min(low + _BLOCK, accumulator.size)
        _add_all(accumulator[low:high], low, count, g, k)


@inner
def _quotient(total: Any, divisor: Any, reciprocal: Any) -> Any:
    """A division by a power of two is exactly a multiplication, and several times faster."""
    return np.float32(total * reciprocal if reciprocal != 0.0 else total / divisor)


@inner
def _mean(total: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    for i in range(total.size):
        out[i] = _quotient(total[i], divisor, reciprocal)


@inner
def _mean_of_one(g0: Any, k0: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = _quotient(0.0 + k0 * np.float64(widen(g0[i])), divisor, reciprocal)


@inner
def _mean_of_two(g0: Any, g1: Any, k: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    for i in range(out.size):
        total = 0.0 + k[0] * np.float64(widen(g0[i]))
        total = total + k[1] * np.float64(widen(g1[i]))
        out[i] = _quotient(total, divisor, reciprocal)


@inner
def _mean_of_three(g0: Any, g1: Any, g2: Any, k: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    for i in range(out.size):
        total = 0.0 + k[0] * np.float64(widen(g0[i]))
        total = total + k[1] * np.float64(widen(g1[i]))
        total = total + k[2] * np.float64(widen(g2[i]))
        out[i] = _quotient(total, divisor, reciprocal)


@inner
def _mean_of_four(g0: Any, g1: Any, g2: Any, g3: Any, k: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    for i in range(out.size):
        total = 0.0 + k[0] * np.float64(widen(g0[i]))
        total = total + k[1] * np.float64(widen(g1[i]))
        total = total + k[2] * np.float64(widen(g2[i]))
        total = total + k[3] * np.float64(widen(g3[i]))
        out[i] = _quotient(total, divisor, reciprocal)


@inner
def _mean_of_all(count: Any, g: Any, k: Any, low: Any, divisor: Any, reciprocal: Any, out: Any) -> None:
    """Without an accumulator the sum never leaves the registers."""
    high = low + out.size
    if count == 1:
        _mean_of_one(g[0][low:high], k[0], divisor, reciprocal, out)
    elif count == 2:
        _mean_of_two(g[0][low:high], g[1][low:high], k, divisor, reciprocal, out)
    elif count == 3:
        _mean_of_three(g[0][low:high], g[1][low:high], g[2][low:high], k, divisor, reciprocal, out)
    else:
        _mean_of_four(g[0][low:high], g[1][low:high], g[2][low:high], g[3][low:high], k, divisor, reciprocal, out)


@inner
def _square(mean: Any, lanes: Any) -> None:
    for i in range(mean.size):
        lanes[i] += np.float64(mean[i]) * np.float64(mean[i])


@inner
def _square_four(row0: Any, row1: Any, row2: Any, row3: Any, lanes: Any) -> None:
    """Four rows in one go: the same order of additions with a quarter of the accumulators' traffic."""
    for i in range(LANES):
        lane = lanes[i] + np.float64(row0[i]) * np.float64(row0[i])
        lane = lane + np.float64(row1[i]) * np.float64(row1[i])
        lane = lane + np.float64(row2[i]) * np.float64(row2[i])
        lanes[i] = lane + np.float64(row3[i]) * np.float64(row3[i])


@inner
def _add_squares(mean: Any, lanes: Any) -> None:
    if mean.size == 4 * LANES:
        _square_four(mean[:256], mean[256:512], mean[512:768], mean[768:1024], lanes)
    else:
        for row in range(0, mean.size, LANES):
            _square(mean[row : min(row + LANES, mean.size)], lanes)


@kernel
def _reduce(
    start: Any,
    has_start: Any,
    count: Any,
    g: Any,
    k: Any,
    divisor: Any,
    mean: Any,
    square_sums: Any,
) -> None:
    is_power = np.int64(divisor) & (np.int64(divisor) - 1) == 0
    reciprocal = 1.0 / divisor if is_power else 0.0
    buffer = np.empty(_BLOCK, np.float64)
    lanes = np.empty(LANES, np.float64)
    for segment in range(square_sums.size):
        lanes[:] = 0.0
        end = min((segment + 1) * SEGMENT, mean.size)
        for low in range(segment * SEGMENT, end, _BLOCK):
            high = min(low + _BLOCK, end)
            out = mean[low:high]
            if has_start:
                total = buffer[: high - low]
                total[:] = start[low:high]
                _add_all(total, low, count, g, k)
                _mean(total, divisor, reciprocal, out)
            else:
                _mean_of_all(count, g, k, low, divisor, reciprocal, out)
            _add_squares(out, lanes)
        square_sum = 0.0
        for lane in range(LANES):
            square_sum += lanes[lane]
        square_sums[segment] = square_sum
