"""What a start has added to a run, told from the checkpoints that were there."""

from __future__ import annotations

import os
from pathlib import Path

from workers.launch.added import Added, last_written, stamps


def write(folder: Path, version: int, at: int) -> Path:
    """A checkpoint that is complete, as far as its folder tells, written at a time of the test's own."""
    checkpoint = folder / f"step-{version:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint / "new"
    temporary.write_text("{}")
    temporary.replace(checkpoint / "manifest.json")
    os.utime(checkpoint / "manifest.json", (at, at))
    return checkpoint


def test_only_what_was_written_since_counts(tmp_path: Path) -> None:
    assert last_written(tmp_path / "none", stamps(tmp_path / "none")) is None
    write(tmp_path, 100, at=1)
    write(tmp_path, 200, at=2)
    before = stamps(tmp_path)
    assert last_written(tmp_path, before) is None
    new = write(tmp_path, 300, at=3)
    (tmp_path / "step-00000400").mkdir()
    assert last_written(tmp_path, before) == new


def test_after_a_rollback_the_last_one_is_not_the_newest(tmp_path: Path) -> None:
    """One of a past that is computed again is there still, and another is written in its old place."""
    write(tmp_path, 100, at=1)
    write(tmp_path, 300, at=2)
    before = stamps(tmp_path)
    again = write(tmp_path, 100, at=3)
    assert last_written(tmp_path, before) == again
    write(tmp_path, 400, at=4)
    last = write(tmp_path, 200, at=5)
    assert last_written(tmp_path, before) == last


def test_a_folder_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert stamps(tmp_path / "file") == {}


def test_a_start_has_added_something_with_its_first_step_or_checkpoint(tmp_path: Path) -> None:
    assert Added(version=200).nothing
    assert not Added(trained=True).nothing
    assert not Added(checkpoint=tmp_path).nothing
