"""What `make train` runs: the default GPT on the standard library's own source. It has to learn, and to write code."""

from __future__ import annotations

import ast
import json
import math
import textwrap
import warnings
from pathlib import Path

import pytest

from tests.support.launched import launched

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(600)]


def parses(block: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return bool(ast.parse(block).body)
        except (SyntaxError, ValueError):
            return False


def test_the_default_job_learns_and_writes_python(tmp_path: Path) -> None:
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    with launched("train", tmp_path / "run", arguments) as run:
        assert run.finish(timeout_s=580.0) == 0, run.output()
    manifest = json.loads(sorted((run.run_dir / "checkpoints").glob("*/manifest.json"))[-1].read_text())
    parameters = sum(math.prod(shape) for _, shape, _ in manifest["table"])
    assert parameters >= 3_000_000
    evaluations = [line for line in run.metrics() if line["kind"] == "evaluation"]
    assert evaluations[-1]["bits_per_byte"] <= 2.2
    output = run.output()
    for what in ("perplexity", "bits per byte", "run folder", "checkpoint", "logs", "windlass resume"):
        assert what in output
    sample = textwrap.dedent(output.split("a sample of its writing", 1)[1].split(":\n", 1)[1].split("run folder")[0])
    assert any(parses(block) for block in sample.split("\n\n")), sample
