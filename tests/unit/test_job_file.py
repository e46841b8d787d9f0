"""`windlass init`, and a job as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ps.config import field_names, load_mapping, validate
from workers.cli.main import main
from workers.config import JobConfig, load_job
from workers.launch import job_file


def leaves() -> set[str]:
    names = field_names(JobConfig)
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def test_every_key_is_listed_with_its_default() -> None:
    found = {key.name: key for key in job_file.keys(JobConfig)}
    assert set(found) == leaves()
    assert all(key.meaning for key in found.values()), [key.name for key in found.values() if not key.meaning]
    assert found["optimizer.name"].choices == ("adamw", "adam", "sgd")
    assert found["precision.wire"].choices == ("fp16", "bf16", "fp32")
    assert found["optimizer.nesterov"].choices == ("true", "false")
    assert found["cluster.shards"].bounds == "at least 1, at most 1024"
    assert found["batch.contributions_per_step"].default == "auto"
    assert found["training.target_loss"].choices == ()


def test_an_initial_job_file_has_every_key_and_is_the_default_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path)]) == 0
    text = path.read_text()
    mapping = load_mapping(path)
    assert validate(JobConfig, mapping) == JobConfig()
    # Each section is there with each of its keys; the run folder alone is a comment.
    assert set(_dotted(mapping)) == leaves() - {"run_dir"}
    assert "# run_dir: " in text
    assert max(len(line) for line in text.splitlines()) <= 105
    assert f"windlass validate {path}" in capsys.readouterr().out
    assert main(["validate", str(path), f"run_dir={tmp_path / 'run'}"]) == 0
    assert not (tmp_path / "run").exists()


def _dotted(mapping: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in mapping.items():
        found += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


def test_folders_are_not_made_for_a_job_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for parent in ("none", "file"):
        assert main(["init", str(tmp_path / parent / "job.yaml")]) == 2
        assert f"there is no folder {tmp_path / parent};" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("seed: 3\n")
    assert main(["init", str(path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == "seed: 3\n"
    assert main(["init", str(path), "--force"]) == 0
    assert load_job(path, []).seed == 1
    assert main(["init", str(tmp_path), "--force"]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_the_name_is_job_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_origins_are_comments_of_valid_yaml() -> None:
    values = {"seed": 2, "data": {"paths": ["书 1.txt", "a: b"], "vocab_size": 300}, "stop_at": None}
    text = "\n".join(job_file.with_origins(values, {"seed": "my.yaml", "data.paths": "command line"}))
    assert yaml.safe_load(text) == values
    assert "seed: 2  # my.yaml" in text
    assert "书 1.txt" in text
    assert text.count("#") == 2
