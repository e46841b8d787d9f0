"""The hash of a payload: one value, however it is taken; every word counts."""

from __future__ import annotations

import numpy as np
import pytest

from ps.kernels.convert import encode
from ps.kernels.digest import hash_payload
from ps.kernels.hashing import MAX_WORDS, block_keys
from ps.types import WireDtype

WORDS_PER_BLOCK = 256
MODULUS = 2**64


def block_key(block: int) -> int:
    state = (block + 1) * 0x9E3779B97F4A7C15 % MODULUS
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % MODULUS
    return (state ^ (state >> 31)) | 1


def in_plain_python(payload: bytes) -> bytes:
    """The formula, word by word."""
    keys = block_keys(MAX_WORDS - 1).view(np.uint64)
    value = 0
    for index, word in enumerate(np.frombuffer(payload, np.uint64)):
        block, offset = divmod(index, WORDS_PER_BLOCK)
        keyed = int(word) ^ int(keys[offset])
        value += block_key(block) * ((keyed & 0xFFFFFFFF) * (keyed >> 32) + keyed)
    return (value % MODULUS).to_bytes(8, "big")


@pytest.mark.parametrize("size", [0, 32, 2048, 2080, 3 * 2048 + 64])
def test_it_is_the_formula(size):
    payload = np.random.default_rng(size).bytes(size)
    assert hash_payload(memoryview(payload)) == in_plain_python(payload)


@pytest.mark.parametrize("dtype", list(WireDtype))
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 1024, 2048, 5008])
def test_encoding_returns_the_hash_of_what_it_wrote(dtype, size):
    source = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    out = np.empty(size, dtype.numpy)
    digest = encode(source, 3, dtype, out)
    assert digest == hash_payload(out) == hash_payload(memoryview(out.tobytes()))


def test_it_does_not_matter_where_the_payload_lies():
    payload = np.random.default_rng(0).bytes(4096)
    shifted = memoryview(b"?" + payload)[1:]
    assert hash_payload(shifted) == hash_payload(memoryview(payload))


def test_every_bit_counts():
    payload = bytearray(np.random.default_rng(1).bytes(2 * 2048 + 32))
    seen = {hash_payload(memoryview(payload))}
    for bit in range(0, 8 * len(payload), 7):
        payload[bit // 8] ^= 1 << bit % 8
        seen.add(hash_payload(memoryview(payload)))
        payload[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + len(range(0, 8 * len(payload), 7))


def test_where_a_word_is_counts():
    zeros = np.zeros(4096, np.uint16)
    seen = set()
    for index in range(0, zeros.size, 4):
        zeros[index] = 1
        seen.add(hash_payload(zeros))
        zeros[index] = 0
    assert len(seen) == zeros.size // 4
