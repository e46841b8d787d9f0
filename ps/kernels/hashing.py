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

from ps.kernels.arrays import FLOAT32, Array, padded, readonly, require
from ps.kernels.jit import inner, kernel
from ps.kernels.vectors import WIDTH, load, reinterpret, repeat, start_of, total

#: Elements under one outer key; chunks start at multiples of it.
BLOCK = 1024
#: Weights and at most two moments.
MAX_WORDS = 3


def block_keys(word: int) -> Array:
    """Return uint32 [BLOCK], the two halves of every pair's key, for one of the words.

    Random from splitmix64: the same on every machine and under every numpy.
    """
    keys = np.empty(BLOCK // 2, np.uint64)
    for pair in range(keys.size):
        state = (word * keys.size + pair + 1) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        keys[pair] = mixed ^ (mixed >> 31)
    return readonly(keys.view(np.uint32))


_KEYS_A, _KEYS_B, _KEYS_C = (block_keys(word) for word in range(MAX_WORDS))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
#: In place of a moment that the optimizer does not have; writeable as those are: another type is another compilation.
NO_MOMENT = np.empty(0, FLOAT32)


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
    a, b, c = (readonly(padded(array)) for array in (*words, NO_MOMENT, NO_MOMENT)[:MAX_WORDS])
    return int(_hash_chunk(a, b, c, len(words) - 1, first_block(base)))


@inner
def block_key(block: Any) -> Any:
    """Return the outer key of a block of the flat space."""
    state = (np.uint64(block) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)


@inner
def _keyed(values: Any, keys: Any, offset: Any) -> Any:
    return reinterpret(values, np.uint64) ^ reinterpret(load(start_of(keys), offset), np.uint64)


@inner
def pairs(weights: Any, first: Any, second: Any, offset: Any) -> Any:
    """Return NH of the 8 pairs of a vector of each word.

    Args:
        offset: of the vectors in their block; a missing moment is zeros.
    """
    a, b, c = _keyed(weights, _KEYS_A, offset), _keyed(first, _KEYS_B, offset), _keyed(second, _KEYS_C, offset)
    low, high = (a & _LOW) * (b & _LOW), (a >> _HALF) * (b >> _HALF)
    return low + high + a + b + (c & _LOW) * (c >> _HALF) + c


@inner
def no_pairs() -> Any:
    """Return the sum of NH over nothing."""
    return reinterpret(repeat(np.float32(0)), np.uint64)


@inner
def hash_block(weights: Any, first: Any, second: Any, size: Any, count: Any, low: Any, start: Any) -> Any:
    """Return the part of the hash of a block; in the last one of a chunk it is as if zeros followed.

    Args:
        weights, first, second: where the chunk's arrays start.
        size: of the chunk, whole vectors.
        count: moments that there are.
        low: where the block starts in the chunk, in elements.
        start: the chunk's first block in the flat space.
    """
    zero, whole = repeat(np.float32(0)), no_pairs()
    for offset in range(0, BLOCK, WIDTH):
        a, b, c, i = zero, zero, zero, low + offset
        if i < size:
            a = load(weights, i)
            if count > 0:
                b = load(first, i)
            if count > 1:
                c = load(second, i)
        whole = whole + pairs(a, b, c, offset)
    return total(whole) * block_key(start + low // BLOCK)


@kernel
def _hash_chunk(weights: Any, first: Any, second: Any, count: Any, start: Any) -> Any:
    size, a, b, c = weights.size, start_of(weights), start_of(first), start_of(second)
    value = np.uint64(0)
    for low in range(0, size, BLOCK):
        value += hash_block(a, b, c, size, count, low, start)
    return value
