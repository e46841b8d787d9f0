"""The files of a run folder that follow the run."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ps.coordinator.members import MemberState
from ps.coordinator.recorder import Recorder
from ps.types import Role


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 1.0}


def evaluation(version: int) -> dict[str, Any]:
    return {"kind": "evaluation", "version": version, "loss": 1.0}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def test_lines_are_appended(folder: Path) -> None:
    recorder = Recorder(folder, "run")
    recorder.record(step(0))
    Recorder(folder, "run").record(step(1))
    assert lines(folder) == [step(0), step(1)]


def test_a_rewind_drops_what_will_be_computed_again(folder: Path) -> None:
    recorder = Recorder(folder, "run")
    recorder.rewind(0)
    for line in (step(0), step(1), evaluation(2), step(2), evaluation(3), step(3)):
        recorder.record(line)
    recorder.rewind(2)
    # The evaluation of version 2 is of the state that is gone back to.
    assert lines(folder) == [step(0), step(1), evaluation(2)]
    recorder.record(step(2))
    recorder.rewind(0)
    assert lines(folder) == []


@pytest.mark.parametrize("torn", ["{", '{"kind": "step", "st', '{"kind": "step", "step": 1}'])
def test_half_a_line_is_cut(folder: Path, torn: str) -> None:
    Recorder(folder, "run").record(step(0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    recorder = Recorder(folder, "run")
    recorder.record(step(1))
    assert lines(folder) == [step(0), step(1)]
    recorder.rewind(1)
    assert lines(folder) == [step(0)]


@contextmanager
def full() -> Iterator[None]:
    """No file can grow beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_cannot_be_written_is_written_later(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for people must not end a run; and the lines stay in order, each of them once."""
    monkeypatch.setattr("ps.coordinator.recorder.RETRY_S", 600.0)
    recorder = Recorder(folder, "run")
    recorder.record(step(0))
    with full():
        for number in (1, 2, 3):
            recorder.record(step(number))
        assert recorder.behind == 4
        assert lines(folder) == [step(0)]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert re.search(r"metrics\.jsonl cannot be written: File too large; training goes on", record.getMessage())
    # Not with each line, only now and then.
    recorder.record(step(4))
    assert recorder.behind == 5
    recorder.close()
    assert recorder.behind == 0
    assert lines(folder) == [step(number) for number in range(5)]
    recorder.record(step(5))
    assert lines(folder)[-1] == step(5)


def test_a_rewind_that_cannot_be_written_is_carried_out_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.coordinator.recorder.RETRY_S", 0.0)
    recorder = Recorder(folder, "run")
    for number in range(4):
        recorder.record(step(number))

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr("ps.coordinator.recorder._lines_backwards", fail)
        recorder.rewind(2)
        # Made again, and gone back once more.
        for number in (2, 3):
            recorder.record({**step(number), "again": True})
        recorder.rewind(3)
        assert lines(folder) == [step(number) for number in range(4)]
    recorder.catch_up()
    assert recorder.behind == 0
    assert lines(folder) == [step(0), step(1), {**step(2), "again": True}]


def test_a_coordinator_starts_where_the_file_cannot_be_written(folder: Path) -> None:
    Recorder(folder, "run").record(step(0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{")
    with full():
        recorder = Recorder(folder, "run")
        recorder.keep(set(), set())
    recorder.close()
    assert lines(folder) == []


def test_a_line_that_is_not_written_when_the_run_ends_is_lost(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(folder, "run")
    with full():
        recorder.record(step(0))
        recorder.close()
    assert "metrics.jsonl lacks 1 lines: they are lost" in caplog.text


def test_numbers_that_json_does_not_have_are_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Recorder(folder, "run").record({"kind": "step", "step": 0, "loss": float("nan")})


def test_members_and_targets(folder: Path) -> None:
    members = [
        MemberState(Role.COORDINATOR, 0, 0, 10, "here", "127.0.0.1:1", "127.0.0.1:2"),
        MemberState(Role.SHARD, 1, 5, 11, "there", "127.0.0.1:3", ""),
    ]
    recorder = Recorder(folder, "run-7")
    recorder.members(members)
    assert json.loads((folder / "cluster.json").read_text()) == [
        {
            "role": "coordinator",
            "rank": 0,
            "pid": 10,
            "host": "here",
            "address": "127.0.0.1:1",
            "metrics_address": "127.0.0.1:2",
        },
        {
            "role": "shard",
            "rank": 1,
            "pid": 11,
            "host": "there",
            "address": "127.0.0.1:3",
            "metrics_address": "",
        },
    ]
    assert json.loads((folder / "targets.json").read_text()) == [
        {"targets": ["127.0.0.1:2"], "labels": {"role": "coordinator", "rank": "0", "run": "run-7"}}
    ]
    recorder.members([])
    assert json.loads((folder / "cluster.json").read_text()) == []
    assert sorted(path.name for path in folder.iterdir()) == ["cluster.json", "targets.json"]


def test_lines_that_the_journal_does_not_confirm_are_dropped(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "run")
    for step in range(4):
        recorder.record({"kind": "step", "step": step})
        recorder.record({"kind": "evaluation", "version": step + 1})
    recorder.keep({0, 1, 2}, {1, 2})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 1, 2]
    assert [line["version"] for line in lines if line["kind"] == "evaluation"] == [1, 2]


@pytest.mark.parametrize("block", [1, 7, 60, 10_000])
def test_only_the_end_of_a_long_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("ps.coordinator.recorder._BLOCK_BYTES", block)
    recorder = Recorder(folder, "run")
    for number in range(40):
        recorder.record(step(number))
    whole = (folder / "metrics.jsonl").read_bytes()
    recorder.rewind(37)
    assert lines(folder) == [step(number) for number in range(37)]
    # What comes before is not even looked at.
    (folder / "metrics.jsonl").write_bytes(b"?\n" + whole[2:] + b"torn")
    again = Recorder(folder, "run")
    assert (folder / "metrics.jsonl").read_bytes() == b"?\n" + whole[2:]
    again.rewind(0)
    assert lines(folder) == []
