"""What a path is that is no run, and what to name instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ps.errors import ConfigError
from workers.cli.main import main
from workers.launch.folder import RunFolder


def make_runs(folder: Path, *names: str) -> None:
    for age, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        os.utime(folder / name / "config.json", (1000 - age, 1000 - age))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        RunFolder(Path(path)).read_job()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_newest_runs_are_named(inside: Path) -> None:
    assert said("runs/nope").endswith("start one with: windlass train")
    make_runs(inside / "runs", "d", "c", "b", "a")
    newest = "the newest of 4 are: runs/d, runs/c, runs/b"
    # Misspelt, the folder of the runs, and somewhere else: the runs are the same.
    for path in ("runs/nope", "runs", "elsewhere/x"):
        assert said(path).startswith(f"{path} holds no run")
        assert said(path).endswith(newest)


def test_a_folder_of_checkpoints_names_them(inside: Path) -> None:
    make_runs(inside, "run")
    for version in (10, 20):
        folder = inside / "run" / "checkpoints" / f"step-{version:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    names = "run/checkpoints/step-00000020, run/checkpoints/step-00000010"
    assert said("run/checkpoints") == (
        f"run/checkpoints holds checkpoints, not a run; name one of them: {names}; their run is {inside / 'run'}"
    )
    assert f"is a checkpoint, not a run; its run is {inside / 'run'}" in said("run/checkpoints/step-00000010")


def test_an_export_and_a_file_are_called_so(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inside / "gpt").mkdir()
    (inside / "gpt" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (inside / "gpt" / "generation_config.json").write_text("{}")
    (inside / "job.yaml").write_text("seed: 1\n")
    for command in (["evaluate"], ["sample"], ["digest"], ["resume"], ["export", "--out", "x"]):
        assert main([*command, "gpt"]) == 2
        assert "gpt is an export for Hugging Face's transformers, not a run" in capsys.readouterr().err
    assert "job.yaml is a file, and a run is a folder; to train with it: windlass train job.yaml" in said("job.yaml")
    # An export is no run to offer.
    assert said("nope").endswith("windlass train")
