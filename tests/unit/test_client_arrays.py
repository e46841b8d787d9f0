"""Named arrays as a source: what is refused, and what lands in the flat buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ps.client.arrays import DECAYED, NOT_DECAYED, NamedArrays, copy_of, table_of
from ps.errors import ConfigError, GradientError
from ps.sharding import make_plan
from ps.types import WireDtype

PARAMETERS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.ones(3, np.float32),
    "scale": np.float32(2.0),
}


def arrays(wire: WireDtype = WireDtype.FP32) -> NamedArrays:
    values = copy_of(PARAMETERS)
    return NamedArrays(values, make_plan(table_of(values, None), 1), wire)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "at least one"),
        ({"w": np.zeros(2)}, "parameter 'w' is float64, not float32"),
        ({"w": np.array([1.0, np.nan], np.float32)}, "initial value of parameter 'w' is not finite"),
    ],
)
def test_parameters_that_cannot_be_used(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        copy_of(parameters)


def test_initial_values_are_copied() -> None:
    given = {"w": np.zeros(2, np.float32)}
    values = copy_of(given)
    given["w"][:] = 7
    assert values["w"].tolist() == [0, 0]


def test_matrices_decay_unless_somebody_says_otherwise() -> None:
    values = copy_of(PARAMETERS)
    assert [tensor.group for tensor in table_of(values, None).tensors] == [DECAYED, NOT_DECAYED, NOT_DECAYED]
    assert [tensor.group for tensor in table_of(values, ["bias"]).tensors] == [NOT_DECAYED, DECAYED, NOT_DECAYED]
    with pytest.raises(ConfigError, match=r"'biass'.*did you mean 'bias'"):
        table_of(values, ["biass"])


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"wieght": np.zeros((2, 3), np.float32)}, r"'wieght'.*did you mean 'weight'\? \(it has: weight, bias, scale"),
        ({"weight": np.zeros((3, 2), np.float32)}, r"'weight' has shape \[3, 2\], its parameter \[2, 3\]"),
        ({"bias": np.zeros(3)}, "'bias' is float64, not float32"),
        ({"bias": [1, 2, 3]}, "'bias' is int64, not float32"),
        ({"weight": np.zeros((3, 2), np.float32).T}, "'weight' is not C-contiguous"),
    ],
)
def test_gradients_that_cannot_be_pushed(gradients: dict[str, Any], message: str) -> None:
    with pytest.raises(GradientError, match=message):
        arrays().check(gradients)


def test_a_gradient_is_scaled_and_divided_once() -> None:
    for wire, tolerance in ((WireDtype.FP32, 0.0), (WireDtype.FP16, 2**-10)):
        source = arrays(wire)
        chunk = source._plan.chunks[0]
        gradient = np.full((2, 3), 3.3, np.float32)
        source.fill(source.check({"weight": gradient, "scale": np.float32(5.0)}), 1024.0)
        room = np.zeros(chunk.size, wire.numpy)
        present = source.encode(chunk, 3, room).present
        sent = (room if wire is WireDtype.FP32 else room.view(np.float16)).astype(np.float32)
        expected = gradient.reshape(-1) * np.float32(1024) / np.float32(3)
        np.testing.assert_allclose(sent[:6], expected, rtol=tolerance)
        # One bit per run; the bias has no gradient, and zeros stand in its place.
        assert present == bytes([0b101])
        assert not sent[64:67].any()
        assert sent[128] == pytest.approx(5 * 1024 / 3, rel=2**-10)


def test_what_was_left_out_is_not_the_contribution_before() -> None:
    source = arrays()
    chunk = source._plan.chunks[0]
    source.fill({"bias": np.ones(3, np.float32)}, 1.0)
    source.fill({}, 1.0)
    room = np.ones(chunk.size, np.float32)
    assert source.encode(chunk, 1, room).present == bytes(1)
    assert not room.any()


def test_an_overflow_is_infinite_and_no_warning() -> None:
    source = arrays()
    chunk = source._plan.chunks[0]
    source.fill({"bias": np.full(3, 1e38, np.float32)}, 65536.0)
    room = np.zeros(chunk.size, np.float32)
    source.encode(chunk, 1, room)
    assert np.isinf(room[64:67]).all()


def test_weights_are_views_that_nobody_writes() -> None:
    source = arrays()
    chunk = source._plan.chunks[0]
    room = np.zeros(chunk.size, np.float32)
    source.initial(chunk, room)
    source.decode(chunk, room)
    for name, value in PARAMETERS.items():
        np.testing.assert_array_equal(source.weights[name], value)
        with pytest.raises(ValueError, match="read-only"):
            source.weights[name][...] = 0


def test_one_text_is_no_list_of_names() -> None:
    values = copy_of({"w": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match="list of names"):
        table_of(values, "wb")


@pytest.mark.parametrize("name", [1, ""])
def test_names_are_texts(name: Any) -> None:
    with pytest.raises(ConfigError, match="is named"):
        copy_of({name: np.zeros(3, np.float32)})


def test_a_parameter_has_elements() -> None:
    with pytest.raises(ConfigError, match="no elements"):
        copy_of({"w": np.zeros((0, 3), np.float32)})
