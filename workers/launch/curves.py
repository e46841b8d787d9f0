"""The curves of a run, out of its metrics.jsonl, ready to be drawn. Pure but for reading the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ps.errors import ConfigError
from workers.launch.metrics import Record, Tail

#: A curve with more points than this is drawn smoothed over its points as well.
SMOOTH_FROM = 100


@dataclass
class Curve:
    """Points with ascending x; what is not known is left out, or nan where the line is to break."""

    x: list[int] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: int, y: float | None) -> None:
        if y is not None:
            self.x.append(x)
            self.y.append(y)


@dataclass
class Curves:
    """One run's."""

    name: str
    loss: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    learning_rate: Curve = field(default_factory=Curve)
    gradient_norm: Curve = field(default_factory=Curve)
    loss_scale: Curve = field(default_factory=Curve)
    tokens_per_s: Curve = field(default_factory=Curve)
    #: Steps that were skipped for overflow.
    skipped: list[int] = field(default_factory=list)


def read_curves(run_dir: Path, name: str) -> Curves:
    """Read a run's curves.

    Raises:
        ConfigError: the folder holds no recorded step.
    """
    path = run_dir / "metrics.jsonl"
    curves = collect(Tail(path).poll()[1], name)
    if not curves.learning_rate.x:
        raise ConfigError(f"{run_dir} has nothing to plot: there is no step in {path}")
    return curves


def collect(records: Iterable[Record], name: str) -> Curves:
    """Sort records into curves."""
    curves = Curves(name)
    for record in records:
        if record.get("kind") == "evaluation":
            curves.held_out.add(int(record["version"]), record.get("loss"))
        elif record.get("kind") == "step":
            _add_step(curves, record)
    return curves


def _add_step(curves: Curves, record: Record) -> None:
    step = int(record["step"])
    curves.loss.add(step, record.get("loss"))
    curves.learning_rate.add(step, record.get("learning_rate"))
    # After an overflow there is no norm: the line breaks there.
    norm = record.get("gradient_norm")
    curves.gradient_norm.add(step, math.nan if norm is None else norm)
    curves.loss_scale.add(step, record.get("loss_scale"))
    seconds, tokens = record.get("step_seconds"), record.get("tokens")
    if seconds and tokens:
        curves.tokens_per_s.add(step, tokens / seconds)
    if record.get("skipped"):
        curves.skipped.append(step)


def smooth(curve: Curve) -> tuple[Curve, int]:
    """The mean over a centred window of a fiftieth of the points, and how many that are; 1: as it is."""
    window = len(curve.x) // 50 if len(curve.x) > SMOOTH_FROM else 1
    half = window // 2
    if not half:
        return curve, 1
    sums = [0.0, *accumulate(value if math.isfinite(value) else 0.0 for value in curve.y)]
    counts = [0, *accumulate(int(math.isfinite(value)) for value in curve.y)]
    means = []
    for at in range(len(curve.y)):
        begin, end = max(0, at - half), min(len(curve.y), at + half + 1)
        count = counts[end] - counts[begin]
        means.append((sums[end] - sums[begin]) / count if count else math.nan)
    return Curve(curve.x, means), 2 * half + 1
