"""The frame codec: exactly the protobuf encoding of `Frame`, written and read by hand.

    message Frame { bytes header = 1; bytes payload = 2; }

The header is a msgpack map, padded so that the payload starts at a multiple of 16 bytes from the
start of the message. Encoding joins once; decoding copies nothing: the payload is a view.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from ps.errors import MalformedFrame

_HEADER_TAG = 0x0A
_PAYLOAD_TAG = 0x12
_ALIGNMENT = 16
#: A header is small: presence maps of 16,384 runs are the largest thing in it.
MAX_HEADER_BYTES = 1 << 16
_PAD = "_"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _prefix(header: Mapping[str, Any], payload_bytes: int) -> bytes:
    """Everything before the payload."""
    if not payload_bytes:
        packed = msgpack.packb(header)
        return b"".join((bytes((_HEADER_TAG,)), _varint(len(packed)), packed))
    tail = bytes((_PAYLOAD_TAG,)) + _varint(payload_bytes)
    # The pad is the last field: its length is the last byte, and its bytes follow. The header's own length counts too.
    packed = msgpack.packb({**header, _PAD: b""})
    for length_bytes in range(1, 4):
        least = -(1 + length_bytes + len(packed) + len(tail)) % _ALIGNMENT
        for pad in (least, least + _ALIGNMENT):
            head = bytes((_HEADER_TAG,)) + _varint(len(packed) + pad)
            if len(head) == 1 + length_bytes:
                return b"".join((head, packed[:-1], bytes((pad,)), bytes(pad), tail))
    raise AssertionError("a header is smaller than 2 MiB, and some pad of 0..31 bytes always aligns")


def encode(header: Mapping[str, Any], payload: bytes | memoryview | np.ndarray = b"") -> bytes:
    """Encode a frame; the payload is copied once."""
    view = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
    if view.nbytes and view.format != "B":
        view = view.cast("B")
    return b"".join((_prefix(header, view.nbytes), view))


class Draft:
    """A frame with room for a payload, to be filled in place before anybody else sees it.

    gRPC takes nothing but `bytes`. Filling one through its buffer, while it has only one owner,
    saves a copy of every published weight and every pushed gradient.
    """

    def __init__(self, header: Mapping[str, Any], dtype: np.dtype, size: int) -> None:
        prefix = _prefix(header, size * dtype.itemsize)
        self._prefix_bytes = len(prefix)
        #: The frame; sent once it is filled.
        self.data: bytes = _new_bytes(None, len(prefix) + size * dtype.itemsize)
        self._room = memoryview((ctypes.c_ubyte * len(self.data)).from_address(id(self.data) + _BYTES_OFFSET)).cast("B")
        self._room[: len(prefix)] = prefix
        #: Writable, dtype[size].
        self.payload = np.frombuffer(self._room, dtype, size, len(prefix))

    def rewrite(self, header: Mapping[str, Any]) -> None:
        """Replace the header by one whose encoding has the same length.

        Raises:
            ValueError: it has another length.
        """
        prefix = _prefix(header, self.payload.nbytes)
        if len(prefix) != self._prefix_bytes:
            raise ValueError(
                f"a header of {len(prefix)} bytes does not fit the {self._prefix_bytes} that were laid out"
            )
        self._room[: len(prefix)] = prefix


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
#: Where the characters of a bytes object start.
_BYTES_OFFSET = bytes.__basicsize__ - 1


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise MalformedFrame(f"a length runs past the frame's end at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def decode(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Split a frame into its header and a view of its payload.

    Raises:
        MalformedFrame: the bytes are not a frame. Nothing else is ever raised.
    """
    view = memoryview(data)
    header: memoryview | None = None
    payload = view[:0]
    position = 0
    while position < len(data):
        tag = data[position]
        length, start = _read_varint(data, position + 1)
        position = start + length
        if position > len(data):
            raise MalformedFrame(f"a field of {length} bytes at byte {start} exceeds the frame's {len(data)} bytes")
        if tag == _HEADER_TAG:
            header = view[start:position]
        elif tag == _PAYLOAD_TAG:
            payload = view[start:position]
        else:
            raise MalformedFrame(f"field tag {tag:#04x}, where a frame has only 0x0a and 0x12")
    if header is None:
        raise MalformedFrame("a frame without a header")
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedFrame(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return _unpack(header), payload


def _unpack(header: memoryview) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(header, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"the header is not msgpack: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise MalformedFrame("the header is not a map with text keys")
    fields.pop(_PAD, None)
    return fields
