"""The exact mean and its statistics against a plain numpy computation, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ps.kernels.convert import decode, encode
from ps.kernels.reduce import fold, reduce
from ps.types import SEGMENT, WireDtype

SIZES = [1, 64, 255, 256, 1000, 1024, SEGMENT, SEGMENT + 64, 3 * SEGMENT - 1]


def make_gradients(count: int, size: int, dtype: WireDtype, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    gradients = []
    for _ in range(count):
        values = rng.standard_normal(size, dtype=np.float32) * np.exp2(rng.uniform(-20, 15, size))
        gradients.append(np.empty(size, dtype.numpy))
        encode(np.clip(values, -60000, 60000).astype(np.float32), 1, dtype, gradients[-1])
    return gradients


def widened(gradient: np.ndarray, dtype: WireDtype) -> np.ndarray:
    out = np.empty(gradient.size, np.float32)
    decode(gradient, dtype, out)
    return out.astype(np.float64)


def expected_sum(gradients, weights, accumulator, dtype):
    total = np.zeros(gradients[0].size) if accumulator is None else accumulator.copy()
    for gradient, weight in zip(gradients, weights, strict=True):
        total += weight * widened(gradient, dtype)
    return total


def expected_square_sums(mean):
    sums = []
    for start in range(0, mean.size, SEGMENT):
        segment = mean[start : start + SEGMENT].astype(np.float64)
        lanes = np.zeros(256)
        for row in range(0, segment.size, 256):
            part = segment[row : row + 256]
            lanes[: part.size] += part * part
        total = 0.0
        for lane in lanes:
            total += lane
        sums.append(total)
    return np.array(sums)


def reduced(gradients, weights, accumulator, total, dtype, size=None):
    size = gradients[0].size if size is None else size
    mean, square_sums = np.full(size, np.nan, np.float32), np.full(-(-size // SEGMENT), np.nan)
    reduce(gradients, weights, accumulator, total, dtype, mean, square_sums)
    return mean, square_sums


@pytest.mark.parametrize("dtype", WireDtype)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("with_accumulator", [False, True])
@pytest.mark.parametrize("total", [8, 7])
def test_mean_and_statistics_equal_numpy_bit_for_bit(dtype, count, with_accumulator, total):
    weights = [1, 3, 2, 5][:count]
    for size in SIZES[:-1] if total == 8 else SIZES[-1:]:
        gradients = make_gradients(count, size, dtype)
        accumulator = np.random.default_rng(1).standard_normal(size) if with_accumulator else None
        mean, square_sums = reduced(gradients, weights, accumulator, total, dtype)
        expected = (expected_sum(gradients, weights, accumulator, dtype) / total).astype(np.float32)
        np.testing.assert_array_equal(mean.view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(square_sums, expected_square_sums(expected))


@pytest.mark.parametrize("total", [49, 107, 187])
def test_the_mean_is_divided_and_not_multiplied_by_a_reciprocal(total):
    """Exact quotients halfway between two floats, where the reciprocal's error would show."""
    odd = 2 * np.random.default_rng(0).integers(0, 2**23, 3000) + 1
    ties = 1 + odd * 2.0**-24
    assert ((ties * total * (1 / total)).astype(np.float32) != ties.astype(np.float32)).any()
    mean, _ = reduced([], [], ties * total, total, WireDtype.FP32, 3000)
    np.testing.assert_array_equal(mean, ties.astype(np.float32))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fp16_is_the_same_in_every_order(count):
    gradients, weights = make_gradients(count, 5000, WireDtype.FP16), [8000, 1, 150, 41][:count]
    results = set()
    for order in itertools.permutations(range(count)):
        mean, sums = reduced([gradients[i] for i in order], [weights[i] for i in order], None, 8192, WireDtype.FP16)
        results.add(mean.tobytes() + sums.tobytes())
    assert len(results) == 1


def test_fp16_extremes_are_summed_exactly():
    smallest, largest = np.full(8, 1, np.uint16), np.full(8, 0x7BFF, np.uint16)
    negative = np.full(8, 0xFBFF, np.uint16)
    mean, _ = reduced([largest, smallest, negative], [4000, 1, 4000], None, 1, WireDtype.FP16)
    np.testing.assert_array_equal(mean, np.float32(2.0**-24))


def test_negative_zeros_make_positive_zero():
    mean, _ = reduced([np.full(300, 0x8000, np.uint16)] * 2, [1, 1], None, 2, WireDtype.FP16)
    assert not np.signbit(mean).any()


@pytest.mark.parametrize("dtype", WireDtype)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_folding_equals_numpy_and_reducing_at_once(dtype, count):
    size, weights = 5000, [3, 1, 4, 2][:count]
    gradients = make_gradients(count, size, dtype)
    accumulator = np.zeros(size)
    fold(accumulator, gradients, weights, dtype)
    np.testing.assert_array_equal(accumulator, expected_sum(gradients, weights, None, dtype))
    mean, sums = reduced([], [], accumulator, 8, dtype, size)
    at_once, sums_at_once = reduced(gradients, weights, None, 8, dtype)
    assert mean.tobytes() == at_once.tobytes()
    assert sums.tobytes() == sums_at_once.tobytes()


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
@pytest.mark.parametrize("position", [0, 255, 1024, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3])
@pytest.mark.parametrize("count", [1, 2])
def test_one_non_finite_value_shows_in_its_segment_only(bits, position, count):
    gradients = make_gradients(count, 2 * SEGMENT + 64, WireDtype.FP16)
    gradients[-1][position] = bits
    mean, square_sums = reduced(gradients, [1] * count, None, count, WireDtype.FP16)
    assert not np.isfinite(mean[position])
    np.testing.assert_array_equal(np.isfinite(square_sums), np.arange(3) != position // SEGMENT)


def test_infinities_that_cancel_are_not_finite():
    gradients = [np.full(64, 0x7C00, np.uint16), np.full(64, 0xFC00, np.uint16)]
    _, square_sums = reduced(gradients, [1, 1], None, 2, WireDtype.FP16)
    assert not np.isfinite(square_sums).any()


def test_readonly_payloads_at_an_offset_need_no_second_compilation():
    from ps.kernels import reduce as module

    message = bytes(16) + np.full(512, 0x3C00, np.uint16).tobytes()
    views = [np.frombuffer(message, np.uint16, offset=16), np.full(512, 0x4000, np.uint16)]
    mean, _ = reduced(views, [1, 1], None, 1, WireDtype.FP16)
    np.testing.assert_array_equal(mean, np.float32(3))
    reduced(views[::-1], [1, 1], np.zeros(512), 1, WireDtype.FP16)
    assert len({s[2].dtype for s in module._reduce.signatures}) == len(module._reduce.signatures)


def test_nothing_to_reduce_is_an_error():
    with pytest.raises(ValueError, match="neither gradients nor an accumulator"):
        reduced([], [], None, 1, WireDtype.FP16, 64)
    with pytest.raises(ValueError, match="no gradients"):
        fold(np.zeros(4), [], [], WireDtype.FP16)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"gradients": [np.zeros(63, np.uint16)]}, "gradient 0"),
        ({"gradients": [np.zeros(64, np.float16)]}, "gradient 0"),
        ({"gradients": [np.zeros(64, np.uint16)] * 5, "weights": [1] * 5}, "at most 4"),
        ({"weights": [1, 1]}, "2 weights"),
        ({"weights": [0]}, "weight of gradient 0"),
        ({"accumulator": np.zeros(64, np.float32)}, "accumulator"),
        ({"total": 0}, "total"),
        ({"mean": np.zeros(64)}, "mean"),
        ({"square_sums": np.zeros(2)}, "square_sums"),
    ],
)
def test_reduce_refuses_what_it_would_misread(changes, names):
    arguments = {
        "gradients": [np.zeros(64, np.uint16)],
        "weights": [1],
        "accumulator": None,
        "total": 1,
        "dtype": WireDtype.FP16,
        "mean": np.zeros(64, np.float32),
        "square_sums": np.zeros(1),
    }
    with pytest.raises(ValueError, match=names):
        reduce(**{**arguments, **changes})
