"""A run folder stands by itself: its tokenizer outlives the text and the cache."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from tests.support.untrained import make_run, write_model
from workers.cli.main import main
from workers.data import kept
from workers.data.prepare import prepare
from workers.launch.folder import RunFolder

TEXT = "".join(f"Line {n}: {n * n} is the square of {n}.\n" for n in range(4000))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = make_run(tmp_path, TEXT)
    job = folder.read_job()
    write_model(folder, job, 40)
    kept.keep_where_the_run_is(job, prepare(job.data))
    return folder


def lose_text(run: RunFolder) -> None:
    (run.path.parent / "text.txt").unlink()


def lose_cache(run: RunFolder) -> None:
    shutil.rmtree(run.path.parent / "cache")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def test_a_run_writes_and_is_exported_without_text_and_cache(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sample", str(run.path), "--tokens", "12")
    before = call(capsys, *arguments)
    lose_text(run)
    lose_cache(run)
    assert call(capsys, *arguments) == before
    assert before[0] == 0
    # A run folder may move, and a checkpoint in it is as good.
    moved = run.path.rename(run.path.with_name("moved"))
    checkpoint = moved / "checkpoints" / "step-00000040"
    assert call(capsys, "sample", str(checkpoint), "--tokens", "12") == before
    assert call(capsys, "export", str(moved), "--out", str(moved.parent / "out"))[0] == 0


def test_evaluating_needs_the_text_or_the_cache(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = call(capsys, "evaluate", str(run.path))
    assert before[0] == 0
    lose_text(run)
    assert call(capsys, "evaluate", str(run.path)) == before
    lose_cache(run)
    code, _, err = call(capsys, "evaluate", str(run.path))
    assert code == 1
    assert err.count("\n") == 1
    for words in ("held-out text", str(run.path.parent / "cache"), "text.txt does not exist"):
        assert words in err


def test_another_text_is_not_evaluated(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lose_cache(run)
    (run.path.parent / "text.txt").write_text(TEXT.replace("square", "circle"))
    code, _, err = call(capsys, "evaluate", str(run.path))
    assert code == 1
    assert "has changed" in err


def test_without_a_tokenizer_one_can_be_named(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = run.path / kept.TOKENIZER_NAME
    elsewhere = tokenizer.rename(run.path.parent / "mine.json")
    lose_text(run)
    lose_cache(run)
    for command in (["sample"], ["export", "--out", str(run.path.parent / "out")]):
        code, _, err = call(capsys, *command, str(run.path))
        assert code == 1
        assert err.splitlines()[-1].startswith("windlass: error: ")
        assert "--tokenizer FILE" in err
        code, _, _ = call(capsys, *command, str(run.path), "--tokenizer", str(elsewhere))
        assert code == 0
    for wrong in (run.config, run.path / "nothing.json"):
        code, _, err = call(capsys, "sample", str(run.path), "--tokenizer", str(wrong))
        assert code == 2
        assert f"--tokenizer={wrong}" in err


def test_a_damaged_tokenizer_is_made_again_from_the_text(
    run: RunFolder, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("sample", str(run.path), "--tokens", "12")
    before = call(capsys, *arguments)
    tokenizer = run.path / kept.TOKENIZER_NAME
    tokenizer.write_text(tokenizer.read_text().replace("square", "circle", 1) + " ")
    with caplog.at_level(logging.WARNING):
        assert call(capsys, *arguments) == before
    assert str(tokenizer) in caplog.text
    # The next worker puts it right.
    job = run.read_job()
    tokenizer.unlink()
    kept.keep_where_the_run_is(job, prepare(job.data))
    assert tokenizer.is_file()


def test_a_worker_without_the_run_folder_writes_nothing(tmp_path: Path, run: RunFolder) -> None:
    job = run.read_job()
    elsewhere = job.model_copy(update={"run_dir": tmp_path / "elsewhere"})
    kept.keep_where_the_run_is(elsewhere, prepare(job.data))
    assert not (tmp_path / "elsewhere").exists()
    # A folder of the same name that holds another run is left alone.
    RunFolder(tmp_path / "elsewhere").write_job(job.model_copy(update={"seed": 7}))
    kept.keep_where_the_run_is(elsewhere, prepare(job.data))
    assert not (tmp_path / "elsewhere" / kept.TOKENIZER_NAME).exists()
