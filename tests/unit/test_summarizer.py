"""Beside the run, the journal gets its summary."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ps.coordinator import summarizer
from ps.coordinator.history import History
from ps.coordinator.summarizer import Summarizer
from ps.storage import Journal
from ps.storage.journal_files import read
from tests.support.eventually import eventually


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summarizer, "EVERY_RECORDS", 10)
    monkeypatch.setattr(summarizer, "CHECK_S", 0.01)


def append(journal: Journal, first: int, count: int) -> None:
    for step in range(first, first + count):
        journal.append({"type": "applied", "step": step, "hashes": []})


def test_a_start_reads_what_has_come_since_the_last_summary(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        beside = Summarizer(journal)
        beside.start()
        append(journal, 0, 5)
        append(journal, 5, 6)
        eventually(lambda: (tmp_path / "summary").exists(), 10.0, "the summary")
        before = (tmp_path / "summary").read_bytes()
        append(journal, 11, 12)
        eventually(lambda: (tmp_path / "summary").read_bytes() != before, 10.0, "the summary")
        beside.stop()
    with Journal.open(tmp_path) as journal:
        records = journal.take_records()
        assert records[0]["type"] == "summary"
        assert len(records) < 10
        assert History("", 0, records).packed() == History("", 0, read(tmp_path)).packed()


def test_a_disk_that_fails_is_said_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "summary").mkdir()
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        beside = Summarizer(journal)
        beside.start()
        with caplog.at_level(logging.WARNING):
            append(journal, 0, 12)
            eventually(lambda: "it is tried again later" in caplog.text, 10.0, "the summary")
        (tmp_path / "summary").rmdir()
        append(journal, 12, 12)
        eventually(lambda: (tmp_path / "summary").is_file(), 10.0, "the summary")
        beside.stop()
