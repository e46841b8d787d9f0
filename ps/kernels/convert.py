"""Rounding of float32 to the wire dtype, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, Array, padded, readonly, require, wire_view
from ps.kernels.formats import narrow, widen
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, load, prefetch, settle, start_of, store, stream, streams
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
    whole = source.size // WIDTH * WIDTH
    _encode(readonly(source[:whole]), np.float32(divisor), wire_view(out[:whole], dtype))
    if whole < source.size:
        rest = padded(out[whole:])
        _encode(readonly(padded(source[whole:])), np.float32(divisor), wire_view(rest, dtype))
        out[whole:] = rest[: source.size - whole]


def decode(source: Array, dtype: WireDtype, out: Array) -> None:
    """Widen to float32, exactly.

    Args:
        source: [n] of `dtype.numpy`.
        dtype: of the wire.
        out: float32 [n]. Written past the caches where it starts at a multiple of 64 bytes: a model is larger.

    Raises:
        ValueError: an array is not what is said above.
    """
    require("source", source, dtype.numpy, source.size)
    require("out", out, FLOAT32, source.size, writeable=True)
    whole = source.size // WIDTH * WIDTH
    _decode(readonly(wire_view(source[:whole], dtype)), out[:whole])
    if whole < source.size:
        rest = padded(out[whole:])
        _decode(readonly(wire_view(padded(source[whole:]), dtype)), rest)
        out[whole:] = rest[: source.size - whole]


@inner
def round_to_wire(source: Any, out: Any, begin: Any, end: Any) -> None:
    """Round whole vectors without a division; `source` and `out` are where the arrays start."""
    for i in range(begin, end, WIDTH):
        prefetch(source, i)
        store(out, i, narrow(load(source, i), out))


@kernel
def _encode(source: Any, divisor: Any, out: Any) -> None:
    size, source, out = source.size, start_of(source), start_of(out)
    if divisor == np.float32(1):
        round_to_wire(source, out, 0, size)
    else:
        for i in range(0, size, WIDTH):
            prefetch(source, i)
            store(out, i, narrow(load(source, i) / divisor, out))


@kernel
def _decode(source: Any, out: Any) -> None:
    size, source, out = source.size, start_of(source), start_of(out)
    past_the_caches = streams(out)
    for i in range(0, size, WIDTH):
        prefetch(source, i)
        stream(out, i, widen(load(source, i)), past_the_caches)
    settle()
