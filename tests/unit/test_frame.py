"""The frame codec's small print; what holds for every frame is in tests/property/test_frames.py."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from protos.ps.v1.frame_pb2 import Frame
from ps.errors import MalformedFrame
from ps.wire import frame


@pytest.mark.parametrize("payload_bytes", [1, 16, 127, 128, 16_383, 16_384, (1 << 21) - 1, 1 << 21])
def test_the_payload_is_aligned_whatever_the_header(payload_bytes: int) -> None:
    payload = bytes(payload_bytes)
    for length in [*range(40), *range(85, 130), *range(16_320, 16_390)] if payload_bytes < 1000 else range(20):
        data = frame.encode({"x": "x" * length}, payload)
        assert (len(data) - payload_bytes) % 16 == 0
        draft = frame.Draft({"x": "x" * length}, np.dtype("u1"), payload_bytes)
        assert len(draft.data) == len(data)
        parsed = Frame.FromString(data)
        assert msgpack.unpackb(parsed.header)["x"] == "x" * length
        assert len(parsed.payload) == payload_bytes


def test_a_frame_without_payload_is_not_padded() -> None:
    data = frame.encode({"a": 1})
    assert data == b"\x0a\x04\x81\xa1a\x01"
    assert frame.decode(data) == ({"a": 1}, memoryview(b""))


def test_decoding_copies_nothing() -> None:
    data = frame.encode({"a": 1}, bytes(64))
    _, payload = frame.decode(data)
    assert payload.obj is data
    assert payload.readonly


def test_arrays_of_any_dtype_are_encoded_as_their_bytes() -> None:
    for values in (
        np.arange(5, dtype="<f4"),
        np.arange(5, dtype="<u2"),
        np.zeros(0, "<f4"),
        np.arange(6).reshape(2, 3),
    ):
        _, payload = frame.decode(frame.encode({}, values))
        assert payload == values.tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "without a header"),
        (b"\x12\x01x", "without a header"),
        (b"\x0a", "past the frame's end"),
        (b"\x0a\x05\x80", "exceeds the frame's 3 bytes"),
        (b"\x0a\x01\x80\x12\x80", "past the frame's end"),
        (b"\x08\x00", "tag 0x08"),
        (b"\x0a\x01\x80\x1a\x00", "tag 0x1a"),
        (b"\x0a\x01\xc0", "not a map"),
        (b"\x0a\x03\x81\x01\x01", "msgpack"),
        (b"\x0a\x02\x80\x80", "msgpack"),
        (b"\x0a\x05\x81\xc4\x01k\x01", "text keys"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, words: str) -> None:
    with pytest.raises(MalformedFrame, match=words):
        frame.decode(data)


def test_a_draft_can_only_be_rewritten_in_its_length() -> None:
    draft = frame.Draft({"a": 1}, np.dtype("<f4"), 3)
    draft.payload[:] = 1.5
    with pytest.raises(ValueError, match="does not fit"):
        draft.rewrite({"a": "something much longer than there is room for"})
    draft.rewrite({"a": 2})
    assert frame.decode(draft.data) == ({"a": 2}, memoryview(np.full(3, 1.5, "<f4").tobytes()))
