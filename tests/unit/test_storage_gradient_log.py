"""ps.storage.gradient_log: what is read is what was written, the lock, and what a crash leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ps.errors import JournalDamaged, StorageError
from ps.kernels.digest import hash_payload
from ps.storage.gradient_log import GradientLog, segment_path

Record = tuple[bytes, bytes]


def records(first: int, count: int) -> list[Record]:
    return [(b"head %d" % n, bytes([n % 256]) * (7 * n % 50)) for n in range(first, first + count)]


def opened(folder: Path) -> GradientLog:
    return GradientLog.open(folder, hash_payload)


def write(folder: Path, *segments: tuple[int, Sequence[Record]]) -> None:
    """Write files: (version, records), of which the first is a head alone."""
    log = opened(folder)
    for number, (version, rows) in enumerate(segments):
        log.begin(version, rows[0][0], anew=number == 0)
        for head, payload in rows[1:]:
            log.append(head, payload)
    log.close()


def read(log: GradientLog, version: int = 0) -> list[Record]:
    return [(entry.head, bytes(entry.payload)) for entry in log.read(version)]


FIRST: list[Record] = [(b"base 0", b""), *records(0, 5)]
SECOND: list[Record] = [(b"base 10", b""), *records(5, 3)]


def test_records_come_back_in_order_and_go_on(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST), (10, SECOND))
    log = opened(tmp_path)
    assert log.versions == [0, 10]
    assert read(log) == FIRST + SECOND
    log.append(b"after", b"x")
    log.close()
    log = opened(tmp_path)
    assert read(log, 10) == [*SECOND, (b"after", b"x")]
    assert log.size == sum(path.stat().st_size for path in tmp_path.glob("from-*"))
    assert log.newest_size == segment_path(tmp_path, 10).stat().st_size
    log.close()


def test_only_one_process_writes(tmp_path: Path) -> None:
    log = opened(tmp_path)
    with pytest.raises(StorageError, match=r"held by another process.*journal\.dir"):
        opened(tmp_path)
    log.close()
    opened(tmp_path).close()


def test_what_lies_before_a_state_is_removed(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST), (10, SECOND), (20, [(b"base 20", b"")]))
    log = opened(tmp_path)
    assert log.trim(9) == []
    assert log.trim(15) == [0], "the file of version 10 leads on from 15"
    assert log.trim(20) == [10]
    assert read(log) == [(b"base 20", b"")]
    log.close()


def test_a_new_beginning_removes_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST), (10, SECOND))
    log = opened(tmp_path)
    log.begin(5, b"base 5", anew=True)
    log.close()
    log = opened(tmp_path)
    assert log.versions == [5]
    assert read(log) == [(b"base 5", b"")]
    log.close()


@pytest.mark.parametrize("left", [0, 1, 39, 45])
def test_a_file_that_was_only_begun_leaves_the_one_before(tmp_path: Path, left: int) -> None:
    write(tmp_path, (0, FIRST), (10, [(b"base 10", b"")]))
    os.truncate(segment_path(tmp_path, 10), left)
    log = opened(tmp_path)
    assert read(log) == FIRST
    log.append(b"on", b"")
    log.close()
    log = opened(tmp_path)
    assert log.versions == [0]
    assert read(log) == [*FIRST, (b"on", b"")]
    log.close()


def test_a_partial_record_in_the_middle_is_damage(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST), (10, SECOND))
    path = segment_path(tmp_path, 0)
    os.truncate(path, path.stat().st_size - 1)
    log = opened(tmp_path)
    with pytest.raises(JournalDamaged, match="a partial record, and there is a file after this one"):
        read(log)
    log.close()


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST), (10, SECOND), (20, [(b"base 20", b"")]))
    segment_path(tmp_path, 10).unlink()
    log = opened(tmp_path)
    with pytest.raises(JournalDamaged, match="record 10 where 6 is due"):
        read(log)
    log.close()


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, (0, FIRST))
    log = opened(tmp_path)
    read(log)
    whole = os.writev

    def full(fd: int, parts: Sequence[bytes]) -> int:
        if os.fstat(fd).st_size > log.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(fd, [bytes(b"".join(parts))[:20]])

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StorageError, match="No space left"):
        log.append(b"lost", bytes(100))
    monkeypatch.undo()
    log.append(b"kept")
    log.close()
    log = opened(tmp_path)
    assert read(log) == [*FIRST, (b"kept", b"")]
    log.close()


def test_nothing_is_written_before_a_beginning(tmp_path: Path) -> None:
    log = opened(tmp_path)
    assert read(log) == []
    with pytest.raises(StorageError, match="is closed"):
        log.append(b"head")
    log.close()


class Vanishing(dict[int, int]):
    """Files that are removed while somebody looks at which there are."""

    def __iter__(self) -> Iterator[int]:
        found = list(super().__iter__())
        self.clear()
        return iter(found)


def test_its_size_can_be_asked_for_while_files_are_removed(tmp_path: Path) -> None:
    write(tmp_path, (0, FIRST))
    log = opened(tmp_path)
    size = log.newest_size
    log._sizes = Vanishing(log._sizes)
    assert log.newest_size == size > 0
    log.close()
