"""The loss scaler against DeepSpeed's, transcribed from its description, and its golden trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import LossScaleConfig, PrecisionConfig
from ps.coordinator.loss_scaler import LossScaler, is_dynamic
from ps.types import WireDtype

#: (scale, hysteresis) after each step, by DeepSpeed 0.19.6 with a window of 4 and a hysteresis of 2.
PATTERN = "XX.....XX"
GOLDEN = [(65536, 1), (32768, 1), *[(32768, 1)] * 4, (65536, 2), (65536, 1), (32768, 1)]


@dataclass
class Transcribed:
    """DeepSpeed's algorithm, statement by statement, but for the error at the minimum."""

    scale: float
    config: LossScaleConfig

    def __post_init__(self) -> None:
        self.hysteresis = self.config.hysteresis
        self.iteration = 0
        self.last_overflow = -1

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.config.hysteresis == 1 or self.hysteresis == 1:
                self.scale = max(self.scale / 2, self.config.minimum)
            else:
                self.hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            if self.config.consecutive_hysteresis:
                self.hysteresis = self.config.hysteresis
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.config.window == 0:
                if not self.config.consecutive_hysteresis:
                    self.hysteresis = self.config.hysteresis
                self.scale *= 2
        self.iteration += 1


def precision(wire: WireDtype = WireDtype.FP16, **loss_scale: float) -> PrecisionConfig:
    return PrecisionConfig(wire=wire, loss_scale=LossScaleConfig(**loss_scale))  # type: ignore[arg-type]


def trace(chosen: PrecisionConfig, overflows: list[bool]) -> list[LossScaler]:
    """The scaler after each step."""
    scaler, scalers = LossScaler.start(chosen), []
    for step, overflow in enumerate(overflows):
        scaler = scaler.after(step, overflow, chosen.loss_scale, is_dynamic(chosen))
        scalers.append(scaler)
    return scalers


def test_the_golden_trace() -> None:
    chosen = precision(window=4, hysteresis=2)
    scalers = trace(chosen, [mark == "X" for mark in PATTERN])
    assert [(scaler.scale, scaler.hysteresis) for scaler in scalers] == GOLDEN


@given(
    overflows=st.lists(st.booleans(), max_size=80),
    power=st.integers(0, 32),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
    consecutive=st.booleans(),
    minimum=st.sampled_from([1.0, 0.25, 128.0]),
)
def test_it_is_deepspeeds(
    overflows: list[bool], power: int, window: int, hysteresis: int, consecutive: bool, minimum: float
) -> None:
    chosen = precision(
        initial_power=power,
        window=window,
        hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
        minimum=minimum,
    )
    expected = Transcribed(2.0**power, chosen.loss_scale)
    for scaler, overflow in zip(trace(chosen, overflows), overflows, strict=True):
        expected.update(overflow)
        assert (scaler.scale, scaler.hysteresis, scaler.last_overflow) == (
            expected.scale,
            expected.hysteresis,
            expected.last_overflow,
        )
        assert math.frexp(scaler.scale)[0] == 0.5, "unscaling is exact only with a power of two"


def test_at_the_minimum_it_stays() -> None:
    scalers = trace(precision(initial_power=2, hysteresis=1, minimum=1.0), [True] * 10)
    assert [scaler.scale for scaler in scalers] == [2.0, *[1.0] * 9]


def test_a_static_scale_never_moves() -> None:
    chosen = precision(static=512.0, window=2, hysteresis=1)
    scalers = trace(chosen, [True, False, False, False, True] * 3)
    assert {scaler.scale for scaler in scalers} == {512.0}
    assert [scaler.last_overflow for scaler in scalers[:6]] == [0, 0, 0, 0, 4, 5]


@pytest.mark.parametrize("wire", [WireDtype.BF16, WireDtype.FP32])
def test_what_needs_no_scale_has_none(wire: WireDtype) -> None:
    chosen = precision(wire, window=1)
    assert not is_dynamic(chosen)
    assert {scaler.scale for scaler in trace(chosen, [False, True, False, False])} == {1.0}


@pytest.mark.parametrize(("static", "power", "scale"), [(0.0, 16, 65536.0), (0.0, 0, 1.0), (8.0, 16, 8.0)])
def test_the_first_scale(static: float, power: int, scale: float) -> None:
    assert LossScaler.start(precision(static=static, initial_power=power)) == LossScaler(scale, 2, -1)
