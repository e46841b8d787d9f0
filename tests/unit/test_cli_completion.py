"""What <TAB> offers, as the shells ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers.cli.completion import _job_files, complete_run, offer
from workers.cli.main import main


def texts(offered: list[tuple[str, str]]) -> list[str]:
    return [text for text, _ in offered]


def test_keys_begin_as_typed_and_wait_for_a_value() -> None:
    offered = texts(offer([], "optim"))
    assert "optimizer.lr=" in offered
    assert all(text.startswith("optimizer.") and text.endswith("=") for text in offered)
    assert texts(offer([], "precision.loss_scale.w")) == ["precision.loss_scale.window=1000"]
    assert len(offer([], "")) > 50
    assert offer([], "no.such") == []


def test_values_that_can_be_named_are() -> None:
    assert texts(offer([], "optimizer.name=ad")) == ["optimizer.name=adamw", "optimizer.name=adam"]
    assert texts(offer([], "precision.wire")) == [f"precision.wire={v}" for v in ("fp16", "bf16", "fp32")]
    assert texts(offer([], "telemetry.metrics=")) == ["telemetry.metrics=true", "telemetry.metrics=false"]
    assert texts(offer([], "no.such=")) == []


@pytest.mark.parametrize(
    ("words", "number"), [("optimizer.name =", 4), ("optimizer.name = ", 5), ("optimizer.name = s", 5)]
)
def test_bash_cuts_words_at_the_equals_sign(words: str, number: int) -> None:
    assert ask(f"windlass train seed=1 {words}", number)[-1] == "sgd"


def test_job_files_and_folders_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("seed.yaml", "notes.txt", "jobs/b.json"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert texts(list(_job_files("se"))) == ["seed.yaml"]
    assert texts(list(_job_files("jo"))) == ["jobs/"]
    assert texts(list(_job_files("jobs/"))) == ["jobs/b.json"]
    assert texts(list(_job_files(""))) == ["seed.yaml"]
    assert ask("windlass train see", 2) == ["seed.yaml", "seed=1"]


def test_an_empty_value_is_completed_by_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert ask("windlass train optimizer.name =", 3) == ["adamw", "adam", "sgd"]
    assert ask("windlass train job.yaml optimizer.name =", 4) == ["adamw", "adam", "sgd"]
    assert ask("windlass resume RUN optimizer.name =", 4) == ["adamw", "adam", "sgd"]


def test_runs_are_offered_where_a_run_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/a", "runs/b", "mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert set(texts(complete_run(""))) == {"mine", "runs/a", "runs/b"}
    assert set(texts(complete_run("runs/"))) == set(texts(complete_run("ru"))) == {"runs/a", "runs/b"}
    assert texts(complete_run("d")) == texts(complete_run("no/such/")) == []
    assert ask("windlass resume m", 2) == ["mine"]
    assert ask("windlass checkpoint verify m", 3) == ["mine"]


def ask(words: str, number: int) -> list[str]:
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_WINDLASS_COMPLETE": "complete_bash"}
    asked = subprocess.run(
        [sys.executable, "-m", "workers.cli.main"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.split()


def test_a_shell_is_answered() -> None:
    assert "schedule.warmup_steps=" in ask("windlass train schedule.", 2)
    assert ask("windlass resume RUN optimizer.name=s", 3) == ["optimizer.name=sgd"]
    assert {"train", "validate", "init", "export"} <= set(ask("windlass ", 1))
    assert ask("windlass checkpoint v", 2) == ["verify"]
    assert "float16" in ask("windlass export RUN --dtype fl", 4)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_bash_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit, match="0"):
        main(["--show-completion", "bash"])
    assert "complete -o default -F" in capsys.readouterr().out
