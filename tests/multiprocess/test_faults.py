"""Whole runs, in one process, that are begun again otherwise than they were left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ps import failpoints
from ps.config import RunConfig, from_json
from ps.coordinator.actions import MembersChanged, WriteManifest
from ps.coordinator.app import CoordinatorApp
from ps.coordinator.decision import TrainingState
from ps.errors import StorageError
from ps.storage import read_manifest
from tests.support.checkpoints import flip, make_arrays, make_table, write_checkpoint
from tests.support.cluster import make_job, train, write_text


def test_a_run_keeps_the_contributions_that_it_began_with(tmp_path: Path) -> None:
    """Who computes may change; how a step is cut may not: workers and shards have to agree on it."""
    text = tmp_path / "text.txt"
    write_text(text, words=6000)
    short = ("training.steps=3", "cluster.shards=1", "cluster.workers=1")
    whole = train(make_job(tmp_path / "whole", text, [*short, "batch.contributions_per_step=4"]))
    begun = make_job(tmp_path / "run", text, [*short, "batch.contributions_per_step=4", "training.stop_at=1"])
    assert train(begun).manifest().version == 1
    again = make_job(tmp_path / "run", text, [*short, "batch.contributions_per_step=2"])
    found = train(again)
    assert found.manifest().contributions == 4
    assert found.digest() == whole.digest()


def test_the_job_that_is_handed_out_has_the_journaled_contributions(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.touch()
    for asked in (4, 2):
        job = make_job(tmp_path / "run", text, [f"batch.contributions_per_step={asked}"])
        job_json = job.model_dump_json()
        app = CoordinatorApp(from_json(RunConfig, job_json), job_json, "127.0.0.1:0")
        try:
            handed_out = json.loads(app._effects._job_json)
        finally:
            app._journal.close()
        assert handed_out["batch"]["contributions_per_step"] == 4


def test_a_list_of_members_that_cannot_be_written_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.touch()
    job = make_job(tmp_path / "run", text, [])
    full = failpoints.Failpoints("write.before~run/cluster.json:error=ENOSPC")
    full.enter("coordinator-0")
    app = CoordinatorApp(from_json(RunConfig, job.model_dump_json()), job.model_dump_json(), "127.0.0.1:0")
    try:
        monkeypatch.setattr(failpoints, "hit", full.hit)
        app._effects.carry_out([MembersChanged()])
        assert "cluster.json cannot be written: No space left on device" in caplog.text
        # At the start it does: nobody could find the coordinator.
        with pytest.raises(StorageError):
            app._effects.members_changed()
    finally:
        app._journal.close()


def test_a_checkpoint_that_is_found_damaged_before_older_ones_go_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.touch()
    job = make_job(tmp_path / "run", text, ["checkpoint.keep=1"])
    table, folder = make_table([100]), tmp_path / "run" / "checkpoints"
    for version in (1, 2):
        write_checkpoint(folder, table, 1, make_arrays(table, []), version)
    newest = folder / "step-00000002"
    flip(newest / "shard-00000-of-00001.safetensors", -1)
    app = CoordinatorApp(from_json(RunConfig, job.model_dump_json()), job.model_dump_json(), "127.0.0.1:0")
    try:
        posted: list[Callable[[float], None]] = []
        monkeypatch.setattr(app._loop, "post", posted.append)
        manifest, _ = read_manifest(newest)
        app._effects._complete_checkpoint(manifest, WriteManifest(TrainingState.start(app._machine.config), ()), [])
        posted[0](0.0)
        assert app._machine.snapshots.rejected == ["step-00000002"]
        assert (folder / "step-00000001").is_dir(), "the good one stays"
    finally:
        app._journal.close()
