"""`windlass chaos` on runs that are over: it says what there was to see, and that nothing was tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ps.errors import WaitTimeout
from ps.storage.journal import Journal
from tests.support.checkpoints import make_arrays, make_table, write_checkpoint
from tests.support.fake_run import FakeRun, make_config
from workers.cli.main import main
from workers.launch.alive import Process
from workers.launch.chaos import Struck, await_end
from workers.launch.faults import Kind, Plan
from workers.launch.folder import RunFolder
from workers.launch.jobs import resolve

TABLE = make_table([131_072, 300])
STEPS = 6


def ended(path: Path, saved: int = STEPS, seed: int = 0) -> RunFolder:
    """A run of six steps that is over, whose last checkpoint is of this version."""
    folder = RunFolder(path)
    folder.write_job(resolve(None, [f"run_dir={path}", f"training.steps={STEPS}"]))
    write_checkpoint(path / "checkpoints", TABLE, 2, make_arrays(TABLE, [], seed=seed), saved)
    made = FakeRun(make_config(path))
    made.everybody()
    made.run()
    with Journal.open(folder.journal) as journal:
        journal.begin_term()
        for record in [{"type": "run", "run": "run", "contributions": 2}, *made.records]:
            journal.append(record)
    return folder


def judged(capsys: pytest.CaptureFixture[str], folder: RunFolder, *arguments: str) -> tuple[int, str]:
    code = main(["chaos", str(folder.path), "--faults", "2", "--every", "0.1", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def two_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run had been under way, and two faults had been carried out."""
    fault = Struck(Plan(Kind.KILL, 0.0, 0.0, 0.0, 0.0), Process("shard", 0, 12), at=0.0)
    monkeypatch.setattr("workers.cli.chaos.strike_all", lambda *_: iter([fault, fault]))


def test_a_run_that_was_over_has_come_through_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = judged(capsys, ended(tmp_path / "run"))
    assert code == 1
    assert "WRONG: the run was over after 0 of 2 faults" in out
    assert out.count("WRONG") == 1


@pytest.mark.usefixtures("two_faults")
def test_a_run_that_came_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm, other = ended(tmp_path / "calm"), ended(tmp_path / "other", seed=1)
    code, out = judged(capsys, ended(tmp_path / "run"), "--same-as", str(calm.path))
    assert code == 0
    assert "kill shard: 2" in out
    assert "every contribution of 6 steps was counted once by every shard" in out
    assert "the same as without faults" in out
    code, out = judged(capsys, RunFolder(tmp_path / "run"), "--same-as", str(other.path))
    assert code == 1
    assert "WRONG: without faults the digest is " in out


@pytest.mark.usefixtures("two_faults")
def test_a_run_that_did_not_reach_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ended(tmp_path / "run", saved=4)
    code, out = judged(capsys, folder)
    assert code == 1
    assert f"WRONG: the run ended at step 4 of 6: the logs in {folder.logs} say why" in out


def test_a_run_that_records_nothing_is_given_up(tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    lock = folder.try_lock()
    assert lock is not None
    try:
        with pytest.raises(WaitTimeout, match="has recorded no step for 0 s, and is not over"):
            await_end(folder, hangs_s=0.0)
    finally:
        os.close(lock)
    await_end(folder, hangs_s=0.0)
