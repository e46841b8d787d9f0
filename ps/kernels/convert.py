"""Rounding of float32 to the wire dtype, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, Array, readonly, require, wire_view
from ps.kernels.formats import narrow, widen
from ps.kernels.jit import inner, kernel
from ps.types import WireDtype


def encode(source: Array, divisor: int, dtype: WireDtype, out: Array) -> None:
    """Divide in float32 and round once, to nearest even, to the wire dtype.

    What is too large for FP16 becomes infinite; a NaN stays one.

    Args:
        source: float32 [n].
        divisor: 1..8192; 1 divides nothing.
        dtype: of the wire.
        out: [n] of `dtype.numpy`.

    Raises:
        ValueError: an array is not what is said above.
    """
    require("source", source, FLOAT32, source.size)
    require("out", out, dtype.numpy, source.size, writeable=True)
    if divisor < 1:
        raise ValueError(f"divisor={divisor}: must be at least 1")
    _encode(readonly(source), np.float32(divisor), wire_view(out, dtype))


def decode(source: Array, dtype: WireDtype, out: Array) -> None:
    """Widen to float32, exactly.

    Args:
        source: [n] of `dtype.numpy`.
        dtype: of the wire.
        out: float32 [n].

    Raises:
        ValueError: an array is not what is said above.
    """
    require("source", source, dtype.numpy, source.size)
    require("out", out, FLOAT32, source.size, writeable=True)
    _decode(readonly(wire_view(source, dtype)), out)


@inner
def round_to_wire(source: Any, out: Any) -> None:
    """Round without a division."""
    for i in range(source.size):
        out[i] = narrow(source[i], out)


@kernel
def _encode(source: Any, divisor: Any, out: Any) -> None:
    if divisor == np.float32(1):
        round_to_wire(source, out)
    else:
        for i in range(source.size):
            out[i] = narrow(np.float32(source[i] / divisor), out)


@kernel
def _decode(source: Any, out: Any) -> None:
    for i in range(source.size):
        out[i] = widen(source[i])
