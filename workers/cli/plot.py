"""`windlass plot`: the curves of runs as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import StartupError
from workers.launch.curves import read_curves


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are drawn over each other.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Where to. Default: RUN/curves.png, or curves.png for several runs."),
    ] = None,
) -> int:
    """Draw the curves of runs to a PNG.

    Loss and held-out loss, learning rate, gradient norm, loss scale with the skipped steps, and speed.
    """
    require_plot_extra()
    curves = [read_curves(run, str(run)) for run in runs]
    target = out or (runs[0] / "curves.png" if len(runs) == 1 else Path("curves.png"))

    from workers.launch.plotting import draw

    draw(curves, target)
    print(target)
    return 0


def require_plot_extra() -> None:
    """Say how to install what only plots need.

    Raises:
        StartupError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise StartupError("plotting needs matplotlib: pip install 'windlass[plot]'")
