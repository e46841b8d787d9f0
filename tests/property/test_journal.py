"""Whatever happens to a journal's bytes, what is read of it was written, from the start on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import JournalDamaged
from ps.storage import Journal
from ps.storage.journal_files import segment_path
from ps.storage.segment import encode, scan

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=20)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
bodies = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "type"), values, max_size=4)
records = st.lists(bodies.map(lambda body: {**body, "type": "x"}), min_size=1, max_size=5)


def borders(written: list[dict[str, Any]]) -> list[int]:
    ends = [0]
    for sequence, record in enumerate(written):
        ends.append(ends[-1] + len(encode(record, sequence)))
    return ends


def join(written: list[dict[str, Any]]) -> bytes:
    return b"".join(encode(record, sequence) for sequence, record in enumerate(written))


@given(records)
def test_what_was_written_is_read(written: list[dict[str, Any]]) -> None:
    data = join(written)
    found = scan(data, 0)
    assert list(found.records) == written
    assert (found.end, found.problem) == (len(data), None)


@given(records)
def test_cut_anywhere_a_prefix_is_left(written: list[dict[str, Any]]) -> None:
    data, ends = join(written), borders(written)
    for cut in range(len(data)):
        found = scan(data[:cut], 0)
        whole = sum(end <= cut for end in ends[1:])
        assert list(found.records) == written[:whole]
        assert found.end == ends[whole]
        assert (found.problem is None) == (cut in ends)
        assert not found.more


@given(records, st.integers(1, 255))
def test_a_flipped_byte_never_makes_a_record(written: list[dict[str, Any]], mask: int) -> None:
    data, ends = join(written), borders(written)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= mask
        found = scan(bytes(flipped), 0)
        hit = sum(end <= position for end in ends[1:])
        assert list(found.records) == written[:hit]
        assert found.problem is not None
        assert found.more == (hit < len(written) - 1), "a tail is the last record only"


@given(records, st.binary(min_size=1, max_size=60))
def test_garbage_behind_the_last_record_is_a_torn_tail(written: list[dict[str, Any]], tail: bytes) -> None:
    data = join(written)
    found = scan(data + tail, 0)
    assert list(found.records) == written
    assert found.end == len(data)
    assert not found.more


@settings(max_examples=40)
@given(records, st.data())
def test_a_file_cut_or_flipped_is_opened_or_refused(written: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Journal.open(folder) as journal:
            journal.begin_term()
            for record in written:
                journal.append(record)
        path = segment_path(folder, 1)
        content = bytearray(path.read_bytes())
        everything: list[dict[str, Any]] = [{"type": "term", "term": 1}, *written]
        ends = borders(everything)
        position = data.draw(st.integers(0, len(content) - 1), label="position")
        hit = sum(end <= position for end in ends[1:])
        if data.draw(st.booleans(), label="cut"):
            del content[position:]
            fatal = hit == 0
        else:
            content[position] ^= data.draw(st.integers(1, 255), label="mask")
            fatal = hit < len(written)
        path.write_bytes(content)
        if fatal:
            with pytest.raises(JournalDamaged, match=f"offset {ends[hit]}"):
                Journal.open(folder)
            return
        with Journal.open(folder) as journal:
            assert journal.take_records() == everything[:hit]
            assert journal.begin_term() == 2
            journal.append({"type": "after"})
        with Journal.open(folder) as journal:
            after = [{"type": "term", "term": 2}, {"type": "after"}]
            assert journal.take_records() == everything[:hit] + after
