"""The learning rate of a step: a pure function of the committed steps before it."""

from __future__ import annotations

import math

from ps.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, applied: int, steps: int) -> float:
    """Return what the peak learning rate is multiplied by.

    Rises as 1/warmup, 2/warmup, ..., 1 over the warm-up; then falls to `min_ratio`, which the last
    of `steps` steps has.

    Args:
        applied: committed steps before this one.
        steps: committed steps of the whole run.
    """
    if applied < config.warmup_steps:
        return (applied + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    progress = min(1.0, (applied - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    falling = 1.0 - progress if config.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_ratio + (1.0 - config.min_ratio) * falling
