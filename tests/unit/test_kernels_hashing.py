"""What the state hash must notice, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from ps.kernels.hashing import BLOCK, hash_state

SIZE = 2 * BLOCK + 96


def make_words(count: int, zero: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.zeros(SIZE, np.float32) if zero else rng.standard_normal(SIZE, np.float32) for _ in range(count)]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_single_bit_of_every_word_counts(count, zero):
    words = make_words(count, zero)
    seen = {hash_state(words, 0)}
    positions = [0, 1, 2, 511, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, SIZE - 2, SIZE - 1]
    for word in words:
        bits = word.view(np.uint32)
        for position in positions:
            for bit in range(32):
                bits[position] ^= np.uint32(1 << bit)
                seen.add(hash_state(words, 0))
                bits[position] ^= np.uint32(1 << bit)
    assert len(seen) == 1 + count * len(positions) * 32


def test_every_position_has_its_own_key():
    words, seen = [np.zeros(SIZE, np.float32) for _ in range(3)], set()
    for word in words:
        for position in range(SIZE):
            word[position] = 1
            seen.add(hash_state(words, 0))
            word[position] = 0
    assert len(seen) == 3 * SIZE


def test_changes_that_would_cancel_in_a_plain_sum_are_noticed():
    words = make_words(3, zero=False)
    reference = hash_state(words, 0)
    for a, b in [(0, 1), (0, 2), (1, BLOCK + 1), (5, 2 * BLOCK + 5)]:
        swapped = [word.copy() for word in words]
        swapped[0][[a, b]] = swapped[0][[b, a]]
        assert hash_state(swapped, 0) != reference
        opposite = [word.copy() for word in words]
        opposite[2][[a, b]] *= -1
        assert hash_state(opposite, 0) != reference
    assert hash_state([words[1], words[0], words[2]], 0) != reference
    assert hash_state(words, BLOCK) != reference


def test_it_is_a_sum_over_any_cut_at_blocks():
    words = make_words(3, zero=False)
    base = 7 * BLOCK
    parts = [(0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, SIZE)]
    total = sum(hash_state([word[a:b] for word in words], base + a) for a, b in parts)
    assert total % 2**64 == hash_state(words, base)


def test_it_is_the_same_everywhere():
    words = [(np.arange(SIZE) * (k + 1) / 7).astype(np.float32) for k in range(3)]
    assert f"{hash_state(words, 0):016x}" == "e67d2784f3a3c335"


@pytest.mark.parametrize("base", [-BLOCK, 1, BLOCK // 2])
def test_a_base_inside_a_block_is_refused(base):
    with pytest.raises(ValueError, match="multiple of"):
        hash_state([np.zeros(64, np.float32)], base)
