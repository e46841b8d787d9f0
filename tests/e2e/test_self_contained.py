"""A trained run stands by itself: it writes and is exported when text and cache are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.launched import train, windlass
from workers.models.evaluate import evaluate_windows

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


def test_a_trained_run_is_exported_without_its_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from workers.data.batches import HeldOut
    from workers.data.prepare import prepare
    from workers.engine import restore

    run = train(tmp_path, "run", "training.steps=20")
    evaluated = windlass("evaluate", str(run.run_dir))
    restored = restore.load_model(run.run_dir)
    windows = HeldOut(prepare(restored.job.data), 32, 8, parts=1).part(0)
    expected, tokens = evaluate_windows(restored.model, windows, 4)
    (tmp_path / "text.txt").unlink()
    shutil.rmtree(tmp_path / "cache")

    sample = windlass("sample", str(run.run_dir), "--tokens", "5")
    assert sample.returncode == 0, sample.stderr
    gone = windlass("evaluate", str(run.run_dir))
    assert (evaluated.returncode, gone.returncode) == (0, 1)
    assert "held-out text" in gone.stderr
    out = tmp_path / "out"
    done = windlass("export", str(run.run_dir), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "of step 20 in float32" in done.stdout

    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    inputs = torch.from_numpy(windows)
    with torch.no_grad():
        # transformers shifts the labels itself.
        loss = float(model(inputs, labels=inputs).loss)
    # The master weights, where the workers computed with FP16 ones.
    assert loss == pytest.approx(expected / tokens, rel=1e-3)
