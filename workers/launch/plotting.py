"""Drawing curves with matplotlib, which is imported with this module: the extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

from ps.errors import StorageError
from ps.storage.files import reason
from workers.launch.curves import Curve, Curves, smooth

#: Colours that people with any kind of colour vision can tell apart (Okabe and Ito); more runs begin again.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SKIPPED_COLOR = "#c1121f"
_WIDTH, _HEIGHT, _DPI = 11.0, 8.5, 120
_INK, _QUIET, _GRID = "#222222", "#666666", "#e6e6e6"


def draw(runs: Sequence[Curves], out: Path) -> None:
    """Draw runs over each other and write a PNG.

    Raises:
        StorageError: the file cannot be written.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, height_ratios=(2.2, 1, 1))
    axes = [figure.add_subplot(grid[0, :])]
    axes += [figure.add_subplot(grid[row, column], sharex=axes[0]) for row in (1, 2) for column in (0, 1)]
    for axis in axes:
        _style(axis)
    loss, rate, norm, scale, speed = axes
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        _loss(loss, run, color, alone=len(runs) == 1)
        rate.plot(run.learning_rate.x, run.learning_rate.y, color=color, linewidth=1.5)
        _noisy(norm, run.gradient_norm, color)
        scale.step(run.loss_scale.x, run.loss_scale.y, where="post", color=color, linewidth=1.5)
        _noisy(speed, run.tokens_per_s, color)
    _name(loss, "loss (nats)", _plain)
    _name(rate, "learning rate", _small)
    _name(norm, "gradient norm, before clipping", _logarithmic)
    _name(scale, "loss scale", _powers_of_two)
    _name(speed, "tokens/s", _from_zero)
    _mark_skipped(norm, scale, runs)
    for axis in (scale, speed):
        axis.set_xlabel("step", color=_QUIET)
    for axis in (rate, norm):
        axis.tick_params(labelbottom=False)
    loss.legend(frameon=False, loc="upper right", fontsize=9, labelcolor=_INK)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {reason(error)}") from error


# -- Curves ---------------------------------------------------------------------------------------


def _loss(axis: Any, run: Curves, color: str, alone: bool) -> None:
    window = _noisy(axis, run.loss, color, "training" if alone else run.name)
    if window > 1 and alone:
        axis.lines[-1].set_label(f"training, mean of {window} steps")
    if run.held_out.x:
        axis.plot(
            run.held_out.x,
            run.held_out.y,
            color=COLORS[1] if alone else color,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="held-out" if alone else f"{run.name}, held-out",
            zorder=4,
        )


def _noisy(axis: Any, curve: Curve, color: str, label: str | None = None) -> int:
    """Draw every point faintly and their mean on top; returns over how many points."""
    mean, window = smooth(curve)
    if window > 1:
        axis.plot(curve.x, curve.y, color=color, linewidth=0.7, alpha=0.25)
    axis.plot(mean.x, mean.y, color=color, linewidth=1.6, label=label, zorder=3)
    return window


def _mark_skipped(norm: Any, scale: Any, runs: Sequence[Curves]) -> None:
    """A tick at the foot of the norm, which an overflow has none of, and a cross on the loss scale."""
    steps = [step for run in runs for step in run.skipped]
    if not steps:
        return
    norm.plot(
        steps,
        [0.03] * len(steps),
        transform=norm.get_xaxis_transform(),
        linestyle="none",
        marker="|",
        markersize=9,
        markeredgewidth=1.4,
        color=SKIPPED_COLOR,
        label=f"skipped: {len(steps)}",
    )
    for run in runs:
        at = dict(zip(run.loss_scale.x, run.loss_scale.y, strict=True))
        known = [step for step in run.skipped if step in at]
        scale.plot(
            known,
            [at[step] for step in known],
            linestyle="none",
            marker="x",
            markersize=6,
            markeredgewidth=1.4,
            color=SKIPPED_COLOR,
            zorder=5,
        )
    norm.legend(frameon=False, loc="upper right", fontsize=8, labelcolor=_INK)


# -- Axes -----------------------------------------------------------------------------------------


def _style(axis: Any) -> None:
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#bbbbbb")
    axis.tick_params(colors=_QUIET, labelsize=9, length=3)
    axis.margins(x=0.01)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _name(axis: Any, title: str, scale: Callable[[Any], None]) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=_INK)
    scale(axis)


def _plain(axis: Any) -> None:
    axis.margins(y=0.06)


def _small(axis: Any) -> None:
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _logarithmic(axis: Any) -> None:
    axis.set_yscale("log")
    low, high = _span(axis)
    axis.set_ylim(low / 1.3, high * 1.3)
    if high / low < 1000:
        # Too few powers of ten to read a value from.
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _powers_of_two(axis: Any) -> None:
    axis.set_yscale("log", base=2)
    low, high = _span(axis)
    # A scale that never changed is a line in the middle.
    axis.set_ylim(2 ** math.floor(math.log2(low) - 1), 2 ** math.ceil(math.log2(high) + 1))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _from_zero(axis: Any) -> None:
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))


def _span(axis: Any) -> tuple[float, float]:
    """The least and the greatest value that is drawn."""
    values = [float(y) for line in axis.lines for y in line.get_ydata() if math.isfinite(y) and y > 0]
    return (min(values), max(values)) if values else (1.0, 1.0)
