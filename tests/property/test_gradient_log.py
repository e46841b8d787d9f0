"""Whatever happens to the bytes of a shard's journal, what is read of it was written, from the start on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import JournalDamaged
from ps.kernels.digest import hash_payload
from ps.storage.gradient_log import HEADER_BYTES, GradientLog, segment_path

rows = st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=70)), min_size=1, max_size=5)


def write(folder: Path, written: list[tuple[bytes, bytes]]) -> list[int]:
    """Write a file; returns where its records end."""
    log = GradientLog.open(folder, hash_payload)
    log.begin(0, b"base", anew=True)
    ends = [0, log.size]
    for head, payload in written:
        log.append(head, payload)
        ends.append(ends[-1] + HEADER_BYTES + len(head) + len(payload))
    assert log.size == ends[-1]
    log.close()
    return ends


def read(folder: Path) -> list[tuple[bytes, bytes]]:
    log = GradientLog.open(folder, hash_payload)
    try:
        return [(entry.head, bytes(entry.payload)) for entry in log.read(0)]
    finally:
        log.close()


@settings(max_examples=8)
@given(rows)
def test_torn_at_any_byte_whole_records_are_left(written: list[tuple[bytes, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends = write(folder, written)
        everything = [(b"base", b""), *written]
        path = segment_path(folder, 0)
        content = path.read_bytes()
        for cut in range(ends[1], ends[-1]):
            path.write_bytes(content[:cut])
            whole = sum(end <= cut for end in ends[1:])
            assert read(folder) == everything[:whole]
            assert path.stat().st_size == ends[whole]


@settings(max_examples=8)
@given(rows, st.integers(1, 255))
def test_a_flipped_byte_is_never_read(written: list[tuple[bytes, bytes]], mask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends = write(folder, written)
        path = segment_path(folder, 0)
        content = path.read_bytes()
        everything = [(b"base", b""), *written]
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= mask
            path.write_bytes(flipped)
            hit = sum(end <= position for end in ends[1:])
            found: list[tuple[bytes, bytes]] = []
            log = GradientLog.open(folder, hash_payload)
            with pytest.raises(JournalDamaged, match=f"offset {ends[hit]}:"):
                found.extend((entry.head, bytes(entry.payload)) for entry in log.read(0))
            log.close()
            assert found == everything[:hit]
