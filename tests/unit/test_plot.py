"""Curves out of metrics.jsonl, and the picture of them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from workers.cli import plot
from workers.cli.main import main
from workers.launch.curves import Curve, collect, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def step(number: int, skipped: bool = False) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": 5.0 - number / 100,
        "learning_rate": 1e-3,
        "gradient_norm": None if skipped else 1.0 + number % 3,
        "loss_scale": 65536.0 / (2 if number > 5 else 1),
        "skipped": skipped,
        "tokens": 400,
        "step_seconds": 0.5 if number else None,
    }


def evaluation(version: int) -> dict[str, Any]:
    return {"kind": "evaluation", "version": version, "loss": 4.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 150 steps, of which one was skipped, with an evaluation."""
    return write(tmp_path / "a", [*(step(number, number == 5) for number in range(150)), evaluation(100)])


def write(run_dir: Path, records: list[dict[str, Any]]) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def test_records_become_curves() -> None:
    curves = collect([step(0), step(1, skipped=True), evaluation(2), step(2)], "a")
    assert (curves.loss.x, curves.loss.y) == ([0, 1, 2], [5.0, 4.99, 4.98])
    assert (curves.held_out.x, curves.held_out.y) == ([2], [4.5])
    assert math.isnan(curves.gradient_norm.y[1])
    assert curves.skipped == [1]
    # The first step after a start has no duration.
    assert (curves.tokens_per_s.x, curves.tokens_per_s.y) == ([1, 2], [800.0, 800.0])


def test_a_smoothed_curve_is_the_mean_of_its_surroundings() -> None:
    few = Curve([0, 1], [1.0, 3.0])
    assert smooth(few) == (few, 1)
    many = Curve(list(range(200)), [float(x) for x in range(200)])
    many.y[50] = math.nan
    mean, window = smooth(many)
    assert window == 5
    assert mean.x == many.x
    assert mean.y[100] == 100.0
    assert mean.y[0] == 1.0
    assert mean.y[50] == 50.0
    assert mean.y[51] == pytest.approx((49 + 51 + 52 + 53) / 4)


def test_plot_writes_a_picture_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"
    picture = imread(run / "curves.png")
    assert picture.shape == (1020, 1320, 4)
    assert (run / "curves.png").read_bytes().startswith(PNG)
    colours = {tuple((pixel[:3] * 255).round().astype(int)) for pixel in picture.reshape(-1, 4)[::3]}
    # Training, held-out, and the step that was skipped.
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xC1, 0x12, 0x1F)} <= colours


@pytest.mark.usefixtures("run")
def test_several_runs_are_drawn_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b", [step(0)])
    assert main(["plot", "a", "b"]) == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert main(["plot", "a", "b", "--out", "both.png"]) == 0
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_a_diverged_run_can_be_drawn(tmp_path: Path) -> None:
    nothing = {"loss": None, "gradient_norm": None, "skipped": True}
    assert main(["plot", str(write(tmp_path / "c", [{**step(number), **nothing} for number in range(5)]))]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plot"], 2, "RUN"),
        (["plot", "nowhere"], 2, "nowhere has nothing to plot"),
        (["plot", "a", "--out", "no/such/folder.png"], 1, "no/such/folder.png cannot be written: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(run.parent)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_matplotlib_it_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(plot, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["plot", str(run)]) == 1
    assert "pip install 'windlass[plot]'" in capsys.readouterr().err
