"""Rounding of float32 to the wire dtype, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, Array, padded, readonly, require, wire_view
from ps.kernels.digest import block_elements, hash_payload, no_words, to_bytes, words
from ps.kernels.formats import narrow, widen
from ps.kernels.hashing import block_key
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, load, prefetch, settle, start_of, store, stream, streams, total
from ps.types import WireDtype


def encode(source: Array, divisor: int, dtype: WireDtype, out: Array) -> bytes:
    """Divide in float32, round once, to nearest even, to the wire dtype, and hash.

    What is too large for FP16 becomes infinite; a NaN stays one.

    Args:
        source: float32 [n].
        divisor: 1..8192; 1 divides nothing.
        dtype: of the wire.
        out: [n] of `dtype.numpy`.

    Returns:
        What `hash_payload` returns of `out`.

    Raises:
        ValueError: an array is not what is said above.
    """
    require("source", source, FLOAT32, source.size)
    require("out", out, dtype.numpy, source.size, writeable=True)
    if divisor < 1:
        raise ValueError(f"divisor={divisor}: must be at least 1")
    whole = padded(out)
    value = _encode(readonly(padded(source)), np.float32(divisor), wire_view(whole, dtype))
    if whole is out:
        return to_bytes(value)
    out[:] = whole[: out.size]
    return hash_payload(out)


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
def _encode(source: Any, divisor: Any, out: Any) -> Any:
    size, step, source, out = source.size, block_elements(out), start_of(source), start_of(out)
    value = np.uint64(0)
    for low in range(0, size, step):
        block = no_words(out)
        for i in range(low, min(low + step, size), WIDTH):
            prefetch(source, i)
            elements = narrow(load(source, i) / divisor, out)
            store(out, i, elements)
            block = block + words(elements, i - low)
        value += total(block) * block_key(low // step)
    return value


@kernel
def _decode(source: Any, out: Any) -> None:
    size, source, out = source.size, start_of(source), start_of(out)
    past_the_caches = streams(out)
    for i in range(0, size, WIDTH):
        prefetch(source, i)
        stream(out, i, widen(load(source, i)), past_the_caches)
    settle()
