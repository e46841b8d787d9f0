"""A 64-bit hash of a payload, which costs nothing while the payload is written.

hash = sum over blocks of key(block) * (sum over 64-bit words of lo * hi + word), modulo 2^64. A block is 2048 bytes;
each word is xored with a random key of its offset in the block, and lo and hi are its halves. The length is not
hashed: it is checked where the payload's place is known.

- Changing either half of one word always changes the hash, as in `hashing`, whose third word this is alone.
- Any other change is missed with a probability of about 2^-32.
- It is read from registers: encoding is bound by memory, and reading a payload once more is a third of its time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ps.kernels.arrays import Array, readonly
from ps.kernels.hashing import MAX_WORDS, block_key, block_keys
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, load, prefetch, reinterpret, start_of, total

_BLOCK_BYTES = 2048
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
#: The keys of a block, as elements of each format of the wire.
_HALF_KEYS = readonly(block_keys(MAX_WORDS - 1).view(np.uint16)[: _BLOCK_BYTES // 2])
_BFLOAT_KEYS = readonly(_HALF_KEYS.view(np.int16))
_FLOAT_KEYS = readonly(_HALF_KEYS.view(np.float32))


def hash_payload(payload: bytes | memoryview | Array) -> bytes:
    """Return the hash of the bytes of a contiguous payload, as `encode` does.

    Zeros count as following to a multiple of 32 bytes.
    """
    octets = np.frombuffer(payload, np.uint8)
    if missing := -octets.size % (2 * WIDTH):
        octets = np.concatenate([octets, np.zeros(missing, np.uint8)])
    elements = np.require(octets.view(np.uint16), requirements="A")
    return to_bytes(_hash_payload(readonly(elements)))


def to_bytes(value: Any) -> bytes:
    """Return a hash as it rides in a header."""
    return int(value).to_bytes(8, "big")


def _keys(elements: Any) -> Any:
    """Return the keys in the format of a vector (inside kernels only)."""
    raise NotImplementedError


@overload(_keys, strict=False)  # type: ignore[untyped-decorator]
def _choose_keys(elements: Any) -> Any:
    if elements.dtype == types.uint16:
        return lambda elements: _HALF_KEYS  # noqa: ARG005
    if elements.dtype == types.int16:
        return lambda elements: _BFLOAT_KEYS  # noqa: ARG005
    return lambda elements: _FLOAT_KEYS  # noqa: ARG005


@inner
def block_elements(payload: Any) -> Any:
    """Return how many elements of an array a block has."""
    return _BLOCK_BYTES // payload.itemsize


@inner
def words(elements: Any, offset: Any) -> Any:
    """Return what each 64-bit word of a vector of the wire's elements adds; `offset` is in its block."""
    keys = load(start_of(_keys(elements)), offset)
    word = reinterpret(elements, np.uint64) ^ reinterpret(keys, np.uint64)
    return (word & _LOW) * (word >> _HALF) + word


@inner
def no_words(start: Any) -> Any:
    """Return the sum over nothing; `start` is where there are 16 elements."""
    elements = reinterpret(load(start, 0), np.uint64)
    return elements ^ elements


@kernel
def _hash_payload(payload: Any) -> Any:
    size, step, start = payload.size, block_elements(payload), start_of(payload)
    value = np.uint64(0)
    for low in range(0, size, step):
        block = no_words(start)
        for i in range(low, min(low + step, size), WIDTH):
            prefetch(start, i)
            block = block + words(load(start, i), i - low)
        value += total(block) * block_key(low // step)
    return value
