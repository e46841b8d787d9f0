"""Conversion kernels against numpy and torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ps.kernels.convert import decode, encode
from ps.kernels.formats import float_to_half_portable, half_to_float_portable
from ps.kernels.jit import kernel
from ps.kernels.vectors import WIDTH, load, start_of, store
from ps.types import WireDtype

ALL_BITS = np.arange(65536, dtype=np.uint16)
TORCH = {WireDtype.FP16: torch.float16, WireDtype.BF16: torch.bfloat16}


@kernel
def _widen_portably(bits, out):
    for i in range(0, bits.size, WIDTH):
        store(start_of(out), i, half_to_float_portable(load(start_of(bits), i)))


@kernel
def _narrow_portably(values, out):
    for i in range(0, values.size, WIDTH):
        store(start_of(out), i, float_to_half_portable(load(start_of(values), i)))


def awkward_floats() -> np.ndarray:
    """Every half, every tie between two halves and its neighbours, denormals, overflows, random bits."""
    halves = ALL_BITS.view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    edges = np.array([65504, 65519.996, 65520, 65536, 1e38, 2.0**-25, 2.0**-25.001, 1e-45, 2.0**-126], np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([halves, ties, *around, edges, -edges, random])


def encoded(values: np.ndarray, dtype: WireDtype, divisor: int = 1) -> np.ndarray:
    out = np.empty(values.size, dtype.numpy)
    encode(values, divisor, dtype, out)
    return out


def reference(values: np.ndarray, dtype: WireDtype) -> np.ndarray:
    if dtype is WireDtype.FP32:
        return values
    return torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.uint16).numpy()


def assert_same_numbers(bits: np.ndarray, expected: np.ndarray, nan: np.ndarray, dtype: WireDtype) -> None:
    integer = np.uint32 if dtype is WireDtype.FP32 else np.uint16
    np.testing.assert_array_equal(bits.view(integer)[~nan], expected.view(integer)[~nan])
    back = np.empty(bits.size, np.float32)
    decode(bits, dtype, back)
    np.testing.assert_array_equal(np.isnan(back), nan)


@pytest.mark.parametrize("dtype", WireDtype)
def test_encode_rounds_to_nearest_even(dtype):
    values = awkward_floats()
    assert_same_numbers(encoded(values, dtype), reference(values, dtype), np.isnan(values), dtype)


@pytest.mark.parametrize("dtype", WireDtype)
@pytest.mark.parametrize("divisor", [2, 3, 8192])
def test_encode_divides_in_float32_and_rounds_once_more(dtype, divisor):
    values = awkward_floats()
    with np.errstate(all="ignore"):
        quotient = values / np.float32(divisor)
    assert_same_numbers(encoded(values, dtype, divisor), reference(quotient, dtype), np.isnan(quotient), dtype)


def test_fp16_agrees_with_numpy_too():
    values = awkward_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(encoded(values, WireDtype.FP16)[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [WireDtype.FP16, WireDtype.BF16])
def test_decode_is_exact_on_all_65536_values(dtype):
    out = np.empty(65536, np.float32)
    decode(ALL_BITS, dtype, out)
    expected = torch.from_numpy(ALL_BITS.copy()).view(TORCH[dtype]).float().numpy()
    nan = np.isnan(expected)
    assert nan.sum() > 100
    np.testing.assert_array_equal(out.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(out[nan]).all()


def test_portable_half_conversion_agrees_with_the_processor_bit_for_bit():
    widened, expected = np.empty(65536, np.float32), np.empty(65536, np.float32)
    _widen_portably(ALL_BITS, widened)
    decode(ALL_BITS, WireDtype.FP16, expected)
    np.testing.assert_array_equal(widened.view(np.uint32), expected.view(np.uint32))
    values = awkward_floats()
    values = values[: values.size // WIDTH * WIDTH]
    narrowed = np.empty(values.size, np.uint16)
    _narrow_portably(values, narrowed)
    np.testing.assert_array_equal(narrowed, encoded(values, WireDtype.FP16))


def test_a_readonly_payload_needs_no_second_compilation():
    from ps.kernels import convert

    payload, out = np.frombuffer(bytes(64), np.uint16), np.empty(32, np.float32)
    decode(payload, WireDtype.FP16, out)
    decode(payload.copy(), WireDtype.FP16, out)
    halves = [s for s in convert._decode.signatures if s[0].dtype.name == "uint16"]
    assert len(halves) == 1


@pytest.mark.parametrize(
    ("source", "divisor", "out", "names"),
    [
        (np.zeros(4), 1, np.zeros(4, np.uint16), "source"),
        (np.zeros(4, np.float32), 1, np.zeros(5, np.uint16), "out"),
        (np.zeros(4, np.float32), 1, np.zeros(4, np.int16), "out"),
        (np.zeros(8, np.float32)[::2], 1, np.zeros(4, np.uint16), "source"),
        (np.zeros(4, np.float32), 1, np.frombuffer(bytes(8), np.uint16), "out"),
        (np.frombuffer(bytes(17), np.uint8)[1:].view(np.float32), 1, np.zeros(4, np.uint16), "source"),
        (np.zeros(4, np.float32), 0, np.zeros(4, np.uint16), "divisor"),
    ],
)
def test_encode_refuses_what_it_would_misread(source, divisor, out, names):
    with pytest.raises(ValueError, match=names):
        encode(source, divisor, WireDtype.FP16, out)
