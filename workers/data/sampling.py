"""Which samples a slot holds and which random numbers it starts from: pure functions, no cursor.

Sample number n of a run is window permute(n mod N) of data pass n div N. The permutation is a
Feistel network keyed by (seed, data pass), so nothing is stored and nothing can be lost.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), section 4 (cycle walking);
Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), SplitMix64.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_ROUNDS = 6


def slot_indices(
    seed: int, step: int, slot: int, slots_per_step: int, micro_batch_size: int, num_windows: int
) -> npt.NDArray[np.int64]:
    """Return the window numbers of one micro-batch.

    Over N = `num_windows` consecutive samples that begin at a multiple of N every window comes exactly once.

    Args:
        seed: The run's seed.
        step: t, from 0.
        slot: s, 0..slots_per_step-1.
        slots_per_step: G.
        micro_batch_size: B.
        num_windows: N, the windows of the training part.

    Returns:
        int64 [B], each 0..N-1.
    """
    if num_windows < 1:
        raise ValueError(f"num_windows={num_windows} must be at least 1")
    if not 0 <= slot < slots_per_step:
        raise ValueError(f"slot={slot} must be in 0..{slots_per_step - 1}")
    first = (step * slots_per_step + slot) * micro_batch_size
    numbers = np.arange(first, first + micro_batch_size, dtype=np.uint64)
    passes, positions = np.divmod(numbers, np.uint64(num_windows))
    indices = np.empty(micro_batch_size, dtype=np.int64)
    for data_pass in np.unique(passes):
        here = passes == data_pass
        indices[here] = _permute(positions[here], num_windows, _mix(seed, int(data_pass)))
    return indices


def slot_seed(seed: int, step: int, slot: int) -> int:
    """Return the seed, 0..2^63-1, of the random numbers (dropout) of one slot."""
    return _mix(_mix(_mix(seed, 0x510F), step), slot) >> 1


def _mix(state: int, value: int) -> int:
    """SplitMix64's output function over a state and one more word."""
    z = (state + (value + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _permute(values: Words, size: int, key: int) -> npt.NDArray[np.int64]:
    """Permute 0..size-1; walk along the cycle of the larger power of four until back inside."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [_mix(key, index) for index in range(_ROUNDS)]
    values = _feistel(values, half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: Words, half_bits: int, keys: list[int]) -> Words:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for key in keys:
        left, right = right, left ^ (_mix_words(right, key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix_words(words: Words, key: int) -> Words:
    """The vectorized form of `_mix`; unsigned arithmetic wraps."""
    z: npt.NDArray[Any] = words * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))
