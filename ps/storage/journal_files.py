"""The files of a coordinator's journal, and how they are read: all of them, or from the last summary on.

    journal/term-000001.log   records; the first is {"type": "term", "term": 1}
    journal/summary           one record: what those before some place in the segments amount to

A summary only saves reading. One that is damaged, or does not fit to what follows, is passed over, and everything is
read; records are never removed.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ps.errors import JournalDamaged, StorageError
from ps.storage import segment
from ps.storage.files import reason, write_atomic
from ps.storage.segment import Record

logger = logging.getLogger(__name__)

_SEGMENT_NAME = re.compile(r"term-(\d{6,})\.log")
_SUMMARY_NAME = "summary"
_WAY_OUT = "restore it, or move the journal folder away and resume from a checkpoint"


@dataclass(frozen=True)
class Place:
    """A place between two records."""

    term: int
    #: In the segment of the term, in bytes.
    offset: int
    #: Records before it, of all terms.
    sequence: int


START = Place(1, 0, 0)


@dataclass
class Found:
    """What was read of a journal."""

    terms: int
    #: Records that a summary stands for.
    summarized: int = 0
    #: Where the last whole record ends.
    end: Place = START
    #: First, if there is one, a record {"type": "summary", "of": ...} in the place of those that were not read.
    records: list[Record] = field(default_factory=list)


def segment_path(folder: Path, term: int) -> Path:
    """Where the records of a term are."""
    return folder / f"term-{term:06d}.log"


def read(folder: Path) -> list[Record]:
    """Return the records of all terms, of a journal that its coordinator may be writing: a torn tail is left out.

    Raises:
        JournalDamaged: a record before the tail cannot be read; names file and offset.
        StorageError: the folder cannot be read.
    """
    try:
        return find(folder).records
    except OSError as error:
        raise StorageError(f"the journal {folder} cannot be read: {reason(error)}") from error


def find(folder: Path, *, settle: bool = False, summarized: bool = False, until: Place | None = None) -> Found:
    """Read a journal.

    Args:
        settle: cut a torn tail, and have the last segment on disk.
        summarized: leave out what there is a summary of.
        until: read up to this place only.

    Raises:
        JournalDamaged: as `read`.
        OSError: the folder cannot be read.
    """
    terms = sorted(int(m[1]) for entry in folder.iterdir() if (m := _SEGMENT_NAME.fullmatch(entry.name)))
    for expected, term in enumerate(terms, 1):
        if term != expected:
            raise JournalDamaged(
                f"the journal {folder} has {segment_path(folder, term).name} but no "
                f"{segment_path(folder, expected).name}; {_WAY_OUT}"
            )
    last = until.term if until is not None else len(terms)
    summary = _read_summary(folder) if summarized else None
    if summary is not None:
        try:
            return _find_from(folder, last, summary, until, settle)
        except JournalDamaged as error:
            # Of the two the summary is not needed.
            logger.warning("%s does not fit to what follows it, and is not used: %s", _summary_path(folder), error)
    return _find_from(folder, last, None, until, settle)


def write_summary(folder: Path, place: Place, of: Record) -> None:
    """Write what the records before a place amount to, which are on disk.

    Raises:
        StorageError: it is not written; one that was there stays.
    """
    record = {"type": "summary", "term": place.term, "offset": place.offset, "of": of}
    write_atomic(_summary_path(folder), segment.encode(record, place.sequence))


def _summary_path(folder: Path) -> Path:
    return folder / _SUMMARY_NAME


def _read_summary(folder: Path) -> tuple[Place, Record] | None:
    path = _summary_path(folder)
    try:
        sequence, record = segment.read_one(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read, and is not used: %s", path, reason(error))
        return None
    if record is None or record["type"] != "summary":
        logger.warning("%s is damaged, and not used: the whole journal is read", path)
        return None
    return Place(record["term"], record["offset"], sequence), record


def _find_from(
    folder: Path, last: int, summary: tuple[Place, Record] | None, until: Place | None, settle: bool
) -> Found:
    found = Found(last)
    if summary is not None:
        found.end, record = summary
        found.summarized = found.end.sequence
        found.records.append(record)
        if found.end.term > last:
            raise JournalDamaged(f"{segment_path(folder, found.end.term)} is missing; {_WAY_OUT}")
    for term in range(found.end.term, last + 1):
        start = found.end if term == found.end.term else Place(term, 0, found.end.sequence)
        stop = until.offset if until is not None and term == until.term else None
        found.end = _read_segment(folder, start, stop, found.records, last=term == last, settle=settle)
    return found


def _read_segment(
    folder: Path, start: Place, stop: int | None, records: list[Record], *, last: bool, settle: bool
) -> Place:
    """Read the records of a segment from a place on; returns where they end."""
    path = segment_path(folder, start.term)
    with path.open("rb") as file:
        file.seek(start.offset)
        data = file.read() if stop is None else file.read(stop - start.offset)
        size = os.fstat(file.fileno()).st_size
    if start.offset > size:
        raise JournalDamaged(f"{path} ends at {size}, before offset {start.offset}; {_WAY_OUT}")
    found = segment.scan(data, start.sequence)
    # The first record was on disk before the segment had its name: without it, nothing was torn.
    if not start.offset and (not found.records or found.records[0] != {"type": "term", "term": start.term}):
        raise JournalDamaged(
            f"{path}, offset 0: {found.problem or 'nothing'} instead of the record of term {start.term}; {_WAY_OUT}"
        )
    if start.offset and found.problem is not None and not found.records:
        # A torn tail, or no place between two records: only who reads from the beginning can tell.
        raise JournalDamaged(f"{path}, offset {start.offset}: {found.problem}; {_WAY_OUT}")
    end = start.offset + found.end
    if found.problem is not None and (not last or found.more):
        raise JournalDamaged(f"{path}, offset {end}: {found.problem}; {_WAY_OUT}")
    if settle and last:
        _settle(path, size, end, found.problem)
    records.extend(found.records)
    return Place(start.term, end, start.sequence + len(found.records))


def _settle(path: Path, size: int, end: int, problem: str | None) -> None:
    """Cut the torn tail, and put the rest on disk before a newer segment can be."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if end < size:
            logger.warning(
                "%s: %s at offset %d, %d bytes cut: the tail was torn when its writer died",
                path, problem, end, size - end,
            )  # fmt: skip
            os.ftruncate(fd, end)
        os.fsync(fd)
    finally:
        os.close(fd)
