"""compose/prometheus/local.sh: links the targets of runs, then starts Prometheus beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

SOURCE = Path(__file__).parents[2] / "compose" / "prometheus"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with two runs and a folder that is none, and a `prometheus` that says how it was started."""
    shutil.copytree(SOURCE, tmp_path / "compose" / "prometheus")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "targets.json").write_text(f'["{name}"]')
    (tmp_path / "runs" / "empty").mkdir()
    program = tmp_path / "bin" / "prometheus"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def start(root: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / "compose" / "prometheus" / "local.sh"), *arguments],
        env={**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}"},
        cwd=cwd or root,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )


def linked(root: Path) -> dict[str, str]:
    """What the discovery of local.yml finds, where it looks."""
    config = root / "compose" / "prometheus" / "local.yml"
    (pattern,) = yaml.safe_load(config.read_text())["scrape_configs"][0]["file_sd_configs"][0]["files"]
    found = (config.parent / pattern).parent.resolve().glob(Path(pattern).name)
    return {path.name: path.read_text() for path in found}


def test_without_arguments_it_is_every_run(root: Path) -> None:
    started = start(root)
    assert linked(root) == {"a.json": '["a"]', "b.json": '["b"]'}
    assert "empty/ has no targets.json" in started.stderr
    assert f"--config.file={root}/compose/prometheus/local.yml" in started.stdout
    assert "--web.listen-address=127.0.0.1:9090" in started.stdout


def test_runs_may_be_anywhere_and_are_followed(root: Path, tmp_path: Path) -> None:
    start(root, "a", cwd=root / "runs")
    assert linked(root) == {"a.json": '["a"]'}
    # The coordinator replaces the file whenever a member comes or goes.
    fresh = root / "runs" / "a" / "fresh"
    fresh.write_text("[]")
    fresh.replace(root / "runs" / "a" / "targets.json")
    assert linked(root) == {"a.json": "[]"}
    start(root, str(tmp_path / "runs" / "b"))
    assert sorted(linked(root)) == ["a.json", "b.json"]
