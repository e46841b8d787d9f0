"""The bytes of a journal segment: records that say whether they are whole. Pure.

A record is a header of 24 bytes and a msgpack map:

    magic "WLJ1" | length u32 | sequence u64 | CRC-32 of the map u32 | CRC-32 of the 20 bytes before u32

The header has a CRC of its own, so that a damaged length is not taken for the end of the file; the
sequence number runs on from segment to segment, so that no record can be missing in between.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgpack

Record = dict[str, Any]

MAGIC = b"WLJ1"
_FIELDS = struct.Struct("<4sIQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size


@dataclass(frozen=True)
class Scan:
    """What was read of a segment."""

    records: tuple[Record, ...]
    #: The offset behind the last whole record.
    end: int
    #: Why reading stopped at `end`, or None when that is the end of the segment.
    problem: str | None
    #: Whether a whole record stands somewhere behind `end`: then this is no torn tail.
    more: bool


def encode(record: Record, sequence: int) -> bytes:
    """Return a record's bytes.

    Raises:
        ValueError: it has no "type", or holds what msgpack cannot encode.
    """
    if not isinstance(record.get("type"), str):
        raise ValueError(f"a journal record needs a text under 'type', not {record.get('type')!r}")
    try:
        payload = bytes(msgpack.packb(record))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a {record['type']!r} record cannot be encoded: {error}") from error
    fields = _FIELDS.pack(MAGIC, len(payload), sequence, crc32(payload))
    return fields + _CRC.pack(crc32(fields)) + payload


def scan(data: bytes, sequence: int) -> Scan:
    """Read records until the end or the first that is not whole.

    Args:
        data: the whole segment.
        sequence: what its first record must carry.
    """
    records: list[Record] = []
    position = 0
    while position < len(data):
        found, payload, problem = _payload_at(data, position)
        if problem is None and found != sequence:
            # Both checksums hold: a record that belongs elsewhere, so nothing was torn here.
            return Scan(tuple(records), position, f"record {found} where {sequence} is due", more=True)
        if problem is None:
            record = _decode(payload)
            if record is None:
                return Scan(tuple(records), position, "a record that is not a map with a 'type'", more=True)
            records.append(record)
            position += HEADER_BYTES + len(payload)
            sequence += 1
            continue
        return Scan(tuple(records), position, problem, more=_whole_record_after(data, position))
    return Scan(tuple(records), position, None, more=False)


def read_one(data: bytes) -> tuple[int, Record | None]:
    """Return the sequence number and the record of bytes that should be one record; None: they are not."""
    sequence, payload, problem = _payload_at(data, 0)
    whole = problem is None and HEADER_BYTES + len(payload) == len(data)
    return sequence, _decode(payload) if whole else None


def _payload_at(data: bytes, position: int) -> tuple[int, bytes, str | None]:
    """Return (sequence, payload, problem) of the record at `position`."""
    start = position + HEADER_BYTES
    if start > len(data):
        return 0, b"", "a partial header"
    magic, length, sequence, payload_crc = _FIELDS.unpack_from(data, position)
    (header_crc,) = _CRC.unpack_from(data, position + _FIELDS.size)
    if magic != MAGIC or header_crc != crc32(data[position : position + _FIELDS.size]):
        return 0, b"", "a damaged header"
    payload = data[start : start + length]
    if len(payload) < length:
        return 0, b"", "a partial record"
    if crc32(payload) != payload_crc:
        return 0, b"", "a damaged record"
    return sequence, payload, None


def _decode(payload: bytes) -> Record | None:
    try:
        record = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, msgpack.UnpackException):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("type"), str) else None


def _whole_record_after(data: bytes, position: int) -> bool:
    while (position := data.find(MAGIC, position + 1)) >= 0:
        if _payload_at(data, position)[2] is None:
            return True
    return False
