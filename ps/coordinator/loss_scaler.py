"""DeepSpeed's dynamic loss scaler, as a pure function from step to step.

Source: DeepSpeed `runtime/fp16/loss_scaler.py`, DynamicLossScaler (behaviour only). Where DeepSpeed
ends the run because the scale is at its minimum, the scale stays there and the step is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.config import LossScaleConfig, PrecisionConfig
from ps.types import WireDtype


@dataclass(frozen=True)
class LossScaler:
    """The scale for the next step, and what decides how it goes on."""

    scale: float
    hysteresis: int
    #: The step of the last overflow, -1 before the first.
    last_overflow: int = -1

    @classmethod
    def start(cls, precision: PrecisionConfig) -> LossScaler:
        """The scaler before step 0; anything but FP16 on the wire needs no scale."""
        config = precision.loss_scale
        if precision.wire is not WireDtype.FP16:
            return cls(config.static or 1.0, config.hysteresis)
        return cls(config.static or 2.0**config.initial_power, config.hysteresis)

    def after(self, step: int, overflow: bool, config: LossScaleConfig, dynamic: bool) -> LossScaler:
        """The scaler after `step`, counted from 0, skipped steps included."""
        if not dynamic:
            return LossScaler(self.scale, self.hysteresis, step if overflow else self.last_overflow)
        if overflow:
            if config.hysteresis == 1 or self.hysteresis == 1:
                return LossScaler(max(self.scale / 2, config.minimum), self.hysteresis, step)
            return LossScaler(self.scale, self.hysteresis - 1, step)
        hysteresis = config.hysteresis if config.consecutive_hysteresis else self.hysteresis
        stable = step - self.last_overflow - 1
        if stable > 0 and stable % config.window == 0:
            return LossScaler(self.scale * 2, config.hysteresis, self.last_overflow)
        return LossScaler(self.scale, hysteresis, self.last_overflow)


def is_dynamic(precision: PrecisionConfig) -> bool:
    return precision.wire is WireDtype.FP16 and precision.loss_scale.static == 0
