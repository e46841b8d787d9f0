"""A 64-bit hash of weights and optimizer state that is a sum over elements.

hash = sum over blocks of key(block) * (sum over pairs of neighbours of NH(pair)), modulo 2^64. A pair is two float32
read as one 64-bit number with halves lo and hi. With a, b, c the weights, first and second moment, each xored with
a random key of its offset, NH = lo(a) lo(b) + hi(a) hi(b) + a + b + lo(c) hi(c) + c.

- Changing one word always changes the hash. Say that lo(a) changes by d: NH changes by d (lo(b) + 1), where both
  factors are not 0 and the product is below 2^64. If hi(a) does: by d (hi(b) + 2^32), a multiple of 2^64 for no
  |d| < 2^32. The same for b and c. The odd key of the block loses nothing modulo 2^64.
- Any other change is missed with a probability of about 2^-32.
- It is a sum: neither the cut into chunks nor the order of the chunks changes it.
- Two 32-bit products for two elements of three words: next to nothing beside the update's memory traffic.

Source: NH, Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication" (1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ps.kernels.arrays import FLOAT32, Array, readonly, require
from ps.kernels.jit import inner, kernel

#: Elements under one outer key; chunks start at multiples of it.
BLOCK = 1024
#: Weights and at most two moments.
MAX_WORDS = 3


def _make_keys() -> list[Array]:
    """Random keys from splitmix64: the same on every machine and under every numpy."""
    keys, state = np.empty((MAX_WORDS, BLOCK // 2), np.uint64), 0
    for word, pair in np.ndindex(keys.shape):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        keys[word, pair] = mixed ^ (mixed >> 31)
    return [readonly(row) for row in keys]


_KEYS_A, _KEYS_B, _KEYS_C = _make_keys()
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_PAIRS = BLOCK // 2
#: In place of a moment that the optimizer does not have; every block reads these zeros.
NO_MOMENT = np.zeros(BLOCK, FLOAT32)


def first_block(base: int) -> int:
    """Return the index of the block that starts at an element of the flat space.

    Raises:
        ValueError: no block starts there.
    """
    if base < 0 or base % BLOCK:
        raise ValueError(f"base={base}: a chunk starts at a multiple of {BLOCK} of the flat space")
    return base // BLOCK


def hash_state(words: Sequence[Array], base: int) -> int:
    """Return the hash of the weights and the moments of a chunk.

    Args:
        words: float32 [n]: the weights, then each moment, at most two.
        base: where the chunk starts in the flat space, in elements.

    Raises:
        ValueError: an array is not what is said above, or `base` is not at a block's start.
    """
    for index, array in enumerate(words):
        require(f"word {index}", array, FLOAT32, words[0].size)
    a, b, c = (readonly(array) for array in (*words, NO_MOMENT, NO_MOMENT)[:MAX_WORDS])
    return int(_hash_chunk(a, b, c, first_block(base)))


@inner
def _block_key(block: Any) -> Any:
    state = (np.uint64(block) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)


@inner
def _nh(weights: Any, first: Any, second: Any) -> Any:
    total = np.uint64(0)
    for i in range(_PAIRS):
        a, b, c = weights[i] ^ _KEYS_A[i], first[i] ^ _KEYS_B[i], second[i] ^ _KEYS_C[i]
        low, high = (a & _LOW) * (b & _LOW), (a >> _HALF) * (b >> _HALF)
        total += low + high + a + b + (c & _LOW) * (c >> _HALF) + c
    return total


@inner
def whole_words(array: Any) -> Any:
    """Return the whole blocks of a float32 array as 64-bit words."""
    return array[: array.size // BLOCK * BLOCK].view(np.uint64)


@inner
def hash_block(weights: Any, first: Any, second: Any, block: Any, start: Any) -> Any:
    """Return the part of the hash of a whole block.

    Args:
        weights, first, second: `whole_words` of the chunk; a missing moment is those of `NO_MOMENT`.
        block: in the chunk.
        start: the chunk's first block in the flat space.
    """
    a = block * _PAIRS
    b = a if first.size == weights.size else 0
    c = a if second.size == weights.size else 0
    inner = _nh(weights[a : a + _PAIRS], first[b : b + _PAIRS], second[c : c + _PAIRS])
    return inner * _block_key(start + block)


@inner
def hash_tail(weights: Any, first: Any, second: Any, start: Any) -> Any:
    """Return the part of the hash of the last, incomplete block, as if zeros followed."""
    rest = weights.size % BLOCK
    if rest == 0:
        return np.uint64(0)
    low = weights.size - rest
    padded = np.zeros((MAX_WORDS, BLOCK), np.float32)
    padded[0, :rest] = weights[low:]
    if first.size == weights.size:
        padded[1, :rest] = first[low:]
    if second.size == weights.size:
        padded[2, :rest] = second[low:]
    words = padded.view(np.uint64)
    return _nh(words[0], words[1], words[2]) * _block_key(start + low // BLOCK)


@kernel
def _hash_chunk(weights: Any, first: Any, second: Any, start: Any) -> Any:
    a, b, c = whole_words(weights), whole_words(first), whole_words(second)
    total = hash_tail(weights, first, second, start)
    for block in range(weights.size // BLOCK):
        total += hash_block(a, b, c, block, start)
    return total
