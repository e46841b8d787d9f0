"""ps.storage.journal: terms, durability, the lock, and what a crash leaves behind."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ps.errors import JournalDamaged, StorageError, WaitTimeout
from ps.storage import Journal
from ps.storage.files import append_all
from ps.storage.journal_files import read, segment_path
from ps.storage.segment import Record, encode, read_one
from tests.support.checkpoints import names_in
from tests.support.eventually import eventually


def decision(step: int) -> dict[str, object]:
    return {"type": "decision", "step": step, "norm": 0.1 * step, "lr": [1e-3], "raw": b"\x00\xff"}


def write(folder: Path, *terms: int) -> list[dict[str, object]]:
    """Write one term for each number of decisions, and return all records."""
    records: list[dict[str, object]] = []
    for count in terms:
        with Journal.open(folder) as journal:
            assert journal.take_records() == records
            records.append({"type": "term", "term": journal.begin_term()})
            for step in range(count):
                journal.append(decision(step))
                records.append(decision(step))
    return records


def test_records_come_back_in_order_over_terms(tmp_path: Path) -> None:
    records = write(tmp_path / "journal", 3, 0, 2)
    with Journal.open(tmp_path / "journal") as journal:
        assert journal.take_records() == records
        assert journal.begin_term() == 4
        assert journal.term == 4
    assert names_in(tmp_path / "journal") == [
        "lock", "term-000001.log", "term-000002.log", "term-000003.log", "term-000004.log",
    ]  # fmt: skip


def test_two_terms_of_one_opening(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        assert [journal.begin_term(), journal.begin_term()] == [1, 2]
        journal.append(decision(0))
    with Journal.open(tmp_path) as journal:
        assert [record["type"] for record in journal.take_records()] == ["term", "term", "decision"]


def test_a_second_opener_is_told_who_holds_it(tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path),
        pytest.raises(JournalDamaged, match=f"held by process {os.getpid()}: .*alive on this host"),
    ):
        Journal.open(tmp_path)
    Journal.open(tmp_path).close()


def test_the_lock_is_free_again_after_a_failed_open(tmp_path: Path) -> None:
    write(tmp_path, 1)
    good = segment_path(tmp_path, 1).read_bytes()
    segment_path(tmp_path, 1).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(JournalDamaged, match="offset 0"):
            Journal.open(tmp_path)
    segment_path(tmp_path, 1).write_bytes(good)
    Journal.open(tmp_path).close()


def test_a_record_is_readable_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process appended survives it: it is written when append returns."""
    release = threading.Event()
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (release.wait(10), fsync(fd)))
        before = segment_path(tmp_path, 1).stat().st_size
        journal.append(decision(0))
        assert segment_path(tmp_path, 1).read_bytes()[before:] == encode(decision(0), 1)
        with pytest.raises(WaitTimeout, match=r"term-000001\.log: 1 records are not on disk"):
            journal.sync(timeout_s=0.01)
        release.set()
        journal.sync()


def test_the_background_syncs_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
        journal.append(decision(0))
        size = segment_path(tmp_path, 1).stat().st_size
        eventually(lambda: size in synced, 10, "the background fsync")


def test_a_synced_append_has_been_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.fstat(fd).st_size)))
        for step in range(3):
            journal.append(decision(step), sync=True)
            assert synced[-1] == segment_path(tmp_path, 1).stat().st_size


def test_begin_term_is_on_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.open(tmp_path) as journal:
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (fsync(fd), synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
        )
        journal.begin_term()
        assert ".term-000001.log." in synced[0]
        assert synced[1] == str(tmp_path)


def test_the_old_term_is_on_disk_before_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could tear a segment that is no longer the last."""
    write(tmp_path, 2)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))))
    with Journal.open(tmp_path):
        assert str(segment_path(tmp_path, 1)) in synced


@pytest.mark.parametrize("torn", [b"W", b"WLJ1" + bytes(30), encode({"type": "x"}, 3)[:-1]])
def test_a_torn_tail_is_cut_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    records = write(tmp_path, 2)
    path = segment_path(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with caplog.at_level(logging.WARNING), Journal.open(tmp_path) as journal:
        assert journal.take_records() == records
    assert path.read_bytes() == whole
    assert f"{path}" in caplog.text
    assert f"{len(torn)} bytes cut" in caplog.text
    caplog.clear()
    with Journal.open(tmp_path) as journal:
        assert journal.take_records() == records
    assert caplog.text == ""


def test_damage_in_an_older_segment_names_file_and_offset(tmp_path: Path) -> None:
    write(tmp_path, 2, 1)
    path = segment_path(tmp_path, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    offset = len(data) - len(encode(decision(1), 2))
    with pytest.raises(JournalDamaged, match=rf"term-000001\.log, offset {offset}: a partial record"):
        Journal.open(tmp_path)
    assert path.read_bytes() == data[:-1], "damage is left as it is found"


def test_a_record_missing_at_a_segments_end_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 2, 1)
    path = segment_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[: -len(encode(decision(1), 2))])
    with pytest.raises(JournalDamaged, match=r"term-000002\.log, offset 0: record 3 where 2 is due"):
        Journal.open(tmp_path)


def test_a_missing_segment_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 1)
    segment_path(tmp_path, 2).unlink()
    with pytest.raises(JournalDamaged, match=r"has term-000003\.log but no term-000002\.log"):
        Journal.open(tmp_path)


def test_an_exchanged_segment_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    segment_path(tmp_path, 1).write_bytes(encode({"type": "term", "term": 7}, 0))
    with pytest.raises(JournalDamaged, match="instead of the record of term 1"):
        Journal.open(tmp_path)


def test_a_term_that_did_not_get_its_name_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".term-000002.log.0a1b2c3d.windlass-tmp").write_bytes(b"WLJ1")
    with Journal.open(tmp_path) as journal:
        assert journal.begin_term() == 2
    assert names_in(tmp_path) == ["lock", "term-000001.log", "term-000002.log"]


def test_a_full_disk_fails_once_and_for_all(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.begin_term()
    journal.append(decision(0))
    path = segment_path(tmp_path, 1)
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"term-000001\.log cannot be written: File too large"):
            journal.append(decision(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole, "half a record is taken back"
    for call in (lambda: journal.append(decision(1)), journal.sync, journal.begin_term):
        with pytest.raises(StorageError, match=r"unusable: .*File too large"):
            call()
    journal.close()
    with Journal.open(tmp_path) as reopened:
        assert reopened.take_records()[1:] == [decision(0)]


def test_a_failed_background_fsync_is_never_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path)
    journal.begin_term()
    calls = []

    def fail(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="fsync failed: Input/output error"):
        journal.append(decision(0), sync=True)
    with pytest.raises(StorageError, match="unusable"):
        journal.append(decision(1))
    journal.close()
    assert len(calls) == 1, "a second fsync could succeed and lie"


class FullDisk:
    """Writes half of what it is given, and then has no room, so often; else it is `os.write`."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._write = os.write

    def __call__(self, fd: int, data: memoryview) -> int:
        if self.times == 0:
            return self._write(fd, data)
        if len(data) > 1:
            return self._write(fd, data[: len(data) // 2])
        self.times -= 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that does not fit fills it for a moment: no reason to end the run."""
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(times=3))
            journal.append(decision(0))
        journal.append(decision(1))
    with Journal.open(tmp_path) as journal:
        assert journal.take_records()[1:] == [decision(0), decision(1)]


def test_a_disk_that_stays_full_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_all, "__defaults__", (0.1,))
    journal = Journal.open(tmp_path)
    journal.begin_term()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(times=10**9))
        with pytest.raises(StorageError, match=r"term-000001\.log cannot be written: No space left"):
            journal.append(decision(0))
    journal.close()
    with Journal.open(tmp_path) as journal:
        assert len(journal.take_records()) == 1


def test_begin_term_on_a_full_disk_takes_no_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"term-000001\.log cannot be written: No space left"):
            journal.begin_term()
    journal.close()
    with Journal.open(tmp_path) as reopened:
        assert reopened.take_records() == []
        assert reopened.begin_term() == 1


@pytest.mark.parametrize("record", [{}, {"type": 3}, {"type": "x", "value": object()}, {"type": "x", "n": 2**64}])
def test_what_is_no_record_leaves_the_journal_usable(tmp_path: Path, record: dict[str, object]) -> None:
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        with pytest.raises(ValueError, match="record"):
            journal.append(record)
        journal.append(decision(0))
    with Journal.open(tmp_path) as journal:
        assert journal.take_records()[1:] == [decision(0)]


def test_nothing_is_appended_outside_of_a_term(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        with pytest.raises(ValueError, match="begin_term"):
            journal.append(decision(0))
        journal.begin_term()
    with pytest.raises(StorageError, match="closed"):
        journal.append(decision(0))
    journal.close()


def test_appends_of_many_threads_are_all_kept(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.begin_term()

        def append(worker: int) -> None:
            for step in range(50):
                journal.append({"type": "x", "worker": worker, "step": step}, sync=step % 10 == 0)

        threads = [threading.Thread(target=append, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal.open(tmp_path) as journal:
        records = journal.take_records()[1:]
        for worker in range(4):
            steps = [record["step"] for record in records if record["worker"] == worker]
            assert steps == list(range(50))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/journal cannot be created"):
        Journal.open(tmp_path / "file" / "journal")


# -- Summaries --------------------------------------------------------------------------------------


def numbers(records: Sequence[Record]) -> Record:
    """What records amount to: the steps of their decisions."""
    steps: list[int] = []
    for record in records:
        steps += record["of"]["steps"] if record["type"] == "summary" else []
        steps += [record["step"]] if record["type"] == "decision" else []
    return {"steps": steps}


def summarized(folder: Path, *counts: int) -> list[int]:
    """A term for each number of decisions, with a summary in the middle of each; returns the steps of the decisions."""
    steps: list[int] = []
    for count in counts:
        with Journal.open(folder) as journal:
            journal.begin_term()
            for number in range(count):
                if number == count // 2:
                    journal.summarize(numbers)
                journal.append(decision(number))
                steps.append(number)
    return steps


def test_a_journal_is_read_from_its_summary_on(tmp_path: Path) -> None:
    steps = summarized(tmp_path, 4, 0, 6)
    # Nothing before it is looked at.
    for term in (1, 2):
        segment_path(tmp_path, term).write_bytes(b"?")
    with Journal.open(tmp_path) as journal:
        first, *rest = journal.take_records()
        assert first["of"] == {"steps": steps[: 4 + 3]}
        assert rest == [decision(number) for number in (3, 4, 5)]
        assert (journal.length, journal.summarized) == (13, 4 + 1 + 1 + 1 + 3)
        assert journal.begin_term() == 4
        journal.append(decision(9))
    with Journal.open(tmp_path) as journal:
        assert numbers(journal.take_records()) == {"steps": [*steps, 9]}


def test_a_journal_with_a_summary_is_whole_all_the_same(tmp_path: Path) -> None:
    steps = summarized(tmp_path, 4, 6)
    assert numbers(read(tmp_path)) == {"steps": steps}
    assert not [record for record in read(tmp_path) if record["type"] == "summary"]


def damaged(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def elsewhere(data: bytes) -> bytes:
    """Of a place that is not between two records."""
    sequence, record = read_one(data)
    assert record is not None
    return encode({**record, "offset": record["offset"] - 1}, sequence)


def of_another_number(data: bytes) -> bytes:
    sequence, record = read_one(data)
    assert record is not None
    return encode(record, sequence - 1)


def beyond_the_end(data: bytes) -> bytes:
    sequence, record = read_one(data)
    assert record is not None
    return encode({**record, "offset": 1 << 20}, sequence)


def of_a_later_term(data: bytes) -> bytes:
    sequence, record = read_one(data)
    assert record is not None
    return encode({**record, "term": 7, "offset": 0}, sequence)


@pytest.mark.parametrize(
    "spoil",
    [damaged, elsewhere, of_another_number, beyond_the_end, of_a_later_term, lambda _: b"", lambda _: decision_only()],
)
def test_a_summary_that_does_not_fit_is_passed_over(
    tmp_path: Path, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    steps = summarized(tmp_path, 4, 6)
    path = tmp_path / "summary"
    path.write_bytes(spoil(path.read_bytes()))
    with Journal.open(tmp_path) as journal:
        records = journal.take_records()
        assert [record["type"] for record in records] == ["term", *["decision"] * 4, "term", *["decision"] * 6]
        assert numbers(records) == {"steps": steps}
        assert (journal.length, journal.summarized) == (12, 0)
    assert re.search("summary (is damaged|does not fit)", caplog.text)


def test_a_summary_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    records = write(tmp_path, 2)
    (tmp_path / "summary").mkdir()
    with Journal.open(tmp_path) as journal:
        assert journal.take_records() == records


def decision_only() -> bytes:
    return encode(decision(0), 3)


@pytest.mark.parametrize("behind", [1, 2])
def test_a_torn_tail_behind_a_summary_is_cut(tmp_path: Path, behind: int) -> None:
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        journal.append(decision(0))
        journal.summarize(numbers)
        for number in range(behind):
            journal.append(decision(1 + number))
    path = segment_path(tmp_path, 1)
    os.truncate(path, path.stat().st_size - 1)
    with Journal.open(tmp_path) as journal:
        assert numbers(journal.take_records()) == {"steps": list(range(behind))}
    assert path.stat().st_size == sum(len(encode(record, n)) for n, record in enumerate(read(tmp_path)))


def test_a_summary_of_another_journal_cuts_nothing(tmp_path: Path) -> None:
    """An older copy of the segments was put back, and not of the summary; its place is within the last record."""
    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        journal.append({"type": "x", "of": "a" * 40})
        journal.summarize(numbers)
        end = segment_path(tmp_path, 1).stat().st_size
    records = [{"type": "term", "term": 1}, {"type": "x", "of": "b" * 80}]
    other = b"".join(encode(record, number) for number, record in enumerate(records))
    assert len(other) > end
    segment_path(tmp_path, 1).write_bytes(other)
    with Journal.open(tmp_path) as journal:
        assert journal.take_records() == records
    assert segment_path(tmp_path, 1).read_bytes() == other


def test_damage_behind_a_summary_names_file_and_offset(tmp_path: Path) -> None:
    summarized(tmp_path, 6)
    path = segment_path(tmp_path, 1)
    data = path.read_bytes()
    size = len(encode(decision(5), 6))
    path.write_bytes(data[: -size - 1] + bytes([data[-size - 1] ^ 1]) + data[-size:])
    offset = len(data) - size - len(encode(decision(4), 5))
    with pytest.raises(JournalDamaged, match=rf"term-000001\.log, offset {offset}: a damaged record"):
        Journal.open(tmp_path)


def test_a_summary_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal.open(tmp_path) as journal:
        journal.begin_term()
        journal.append(decision(0))
        journal.summarize(numbers)
        journal.append(decision(1), sync=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(StorageError, match="summary cannot be written: No space left"):
                journal.summarize(numbers)
        journal.append(decision(2))
    assert names_in(tmp_path) == ["lock", "summary", "term-000001.log"]
    with Journal.open(tmp_path) as journal:
        assert numbers(journal.take_records()) == {"steps": [0, 1, 2]}
        assert journal.summarized == 2
