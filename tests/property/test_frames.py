"""The hand-written codec against protobuf's own, and against anything at all."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos.ps.v1.frame_pb2 import Frame
from ps import types
from ps.errors import MalformedFrame
from ps.wire import frame, messages
from ps.wire.messages import Header, parse_to_shard, parse_to_worker
from ps.wire.proto import from_proto, from_record, to_proto, to_record

QUICK = settings(max_examples=150, deadline=None)
KEYS = st.text(max_size=12).filter(lambda key: key != "_")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
HEADERS = st.dictionaries(KEYS, VALUES, max_size=8)
#: Around the places where a length takes another byte.
BIG = st.sampled_from([0, 90, 100, 110, 127, 128, 16_300, 16_350, 16_383, 16_384, 50_000])
#: Small bytes, or the length of zeros: what is drawn has to be small enough to be shown.
PAYLOADS = st.binary(max_size=300) | st.sampled_from([127, 128, 16_383, 16_384, 1 << 21])


@given(HEADERS, BIG, PAYLOADS)
@QUICK
def test_protobuf_reads_what_the_codec_writes(header: dict[str, Any], big: int, payload: bytes | int) -> None:
    payload = bytes(payload)
    header = {**header, "big": bytes(big)}
    data = frame.encode(header, payload)
    parsed = Frame.FromString(data)
    assert parsed.payload == payload
    fields_read = msgpack.unpackb(parsed.header)
    fields_read.pop("_", None)
    assert fields_read == header
    assert parsed.SerializeToString() == data
    if payload:
        assert (len(data) - len(payload)) % 16 == 0
    read, view = frame.decode(data)
    assert read == header
    assert view == payload


@given(HEADERS, PAYLOADS)
@QUICK
def test_the_codec_reads_what_protobuf_writes(header: dict[str, Any], payload: bytes | int) -> None:
    payload = bytes(payload)
    data = Frame(header=msgpack.packb(header), payload=payload).SerializeToString()
    # The canonical form of no header at all is to leave it out; a frame must have one.
    read, view = frame.decode(data)
    assert read == header
    assert view == payload
    # As protobuf demands, fields may come in any order, and of several the last one counts.
    only_payload = Frame(payload=payload).SerializeToString()
    only_header = Frame(header=msgpack.packb(header)).SerializeToString()
    assert frame.decode(only_payload + only_header) == (header, memoryview(payload))
    assert frame.decode(Frame(header=b"junk").SerializeToString() + data) == (header, memoryview(payload))


@given(HEADERS, st.sampled_from(["<f4", "<u2", "u1"]), st.integers(0, 70))
@QUICK
def test_a_draft_is_the_frame_that_encode_makes(header: dict[str, Any], dtype: str, size: int) -> None:
    draft = frame.Draft(header, np.dtype(dtype), size)
    assert draft.payload.shape == (size,)
    assert draft.payload.flags.writeable
    assert draft.payload.flags.aligned
    draft.payload[:] = np.arange(size) + 1
    assert draft.data == frame.encode(header, draft.payload)
    if size:
        assert (len(draft.data) - draft.payload.nbytes) % 16 == 0
        # In memory as well: a bytes object's characters start at a multiple of 16.
        assert draft.payload.ctypes.data % 16 == 0


@given(HEADERS, HEADERS, st.integers(0, 20))
@QUICK
def test_rewriting_a_draft_keeps_its_length(first: dict[str, Any], second: dict[str, Any], size: int) -> None:
    draft = frame.Draft(first, np.dtype("<u2"), size)
    draft.payload[:] = np.arange(size)
    before = bytes(draft.data)
    expected = frame.encode(second, draft.payload)
    if len(expected) == len(before):
        draft.rewrite(second)
        assert draft.data == expected
    else:
        with pytest.raises(ValueError, match="does not fit"):
            draft.rewrite(second)
        assert draft.data == before


def test_rewriting_the_hash_and_the_presence_map() -> None:
    """What the client does: lay out, fill, hash, write the header again."""
    header = {"hash": bytes(8), "present": bytes(5), "chunk": 3}
    draft = frame.Draft(header, np.dtype("<u2"), 7)
    draft.payload[:] = 9
    draft.rewrite({**header, "hash": b"12345678", "present": b"abcde"})
    read, payload = frame.decode(draft.data)
    assert read == {"hash": b"12345678", "present": b"abcde", "chunk": 3}
    assert payload == draft.payload.tobytes()


def _wrapped(inside: bytes) -> bytes:
    return Frame(header=inside, payload=b"xy").SerializeToString()


@given(st.binary(max_size=200) | st.binary(max_size=60).map(_wrapped))
@settings(max_examples=1500, deadline=None)
@example(_wrapped(b"\xd4\xff\x00"))  # a timestamp of a wrong length
@example(_wrapped(b"\xc7\x0c\xff" + b"\xff" * 12))  # one with too many nanoseconds
@example(_wrapped(b"\x81\x90\x01"))  # a list as a key
@example(_wrapped(b"\x81\x01\x01"))
@example(_wrapped(b"\x81\xa1\xff\x01"))  # not UTF-8
@example(_wrapped(b"\x81\xa1k" + b"\x91" * 2000 + b"\x01"))  # nested deeply
@example(_wrapped(b"\xdf\xff\xff\xff\xff"))  # a map that says it is huge
@example(_wrapped(b"\x80\x80"))
@example(_wrapped(b"\xc1"))
@example(b"\x0a" + b"\xff" * 9 + b"\x01")
@example(b"\x0a" + b"\x80" * 20)
def test_decode_raises_nothing_but_malformed_frame(data: bytes) -> None:
    try:
        header, payload = frame.decode(data)
    except MalformedFrame:
        return
    assert isinstance(header, dict)
    assert all(isinstance(key, str) for key in header)
    assert isinstance(payload, memoryview)
    for parse in (parse_to_shard, parse_to_worker):
        with suppress(MalformedFrame):
            assert isinstance(parse(header), Header)


def test_a_header_has_a_bound() -> None:
    assert frame.decode(frame.encode({"x": bytes(65_000)}))[0] == {"x": bytes(65_000)}
    with pytest.raises(MalformedFrame, match="at most 65536"):
        frame.decode(frame.encode({"x": bytes(65_600)}))


# -- Headers ------------------------------------------------------------------------------------

INTS = st.integers(0, 2**48)
OF_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "int": INTS,
    "float": st.floats(min_value=1e-300, allow_infinity=False),
    "str": st.text(max_size=50),
    "bytes": st.binary(max_size=40),
    "bool": st.booleans(),
    "list[list[Any]]": st.lists(st.tuples(INTS, st.binary(max_size=5)).map(list), max_size=3),
}
EIGHT = st.binary(min_size=8, max_size=8)
ROWS: dict[type[Header], st.SearchStrategy[Any]] = {
    messages.PushPlaced: st.tuples(INTS, INTS, EIGHT, st.binary(max_size=5)),
    messages.Placed: st.tuples(INTS, INTS, INTS, INTS),
}
TO_SHARD = [
    messages.Hello,
    messages.Attach,
    messages.Push,
    messages.PushPlaced,
    messages.Initialize,
    messages.Pull,
]
TO_WORKER = [
    messages.Welcome,
    messages.Ack,
    messages.Weights,
    messages.Placed,
    messages.Unchanged,
    messages.Refused,
]


def header_strategy(cls: type[Header]) -> st.SearchStrategy[Header]:
    special: dict[str, st.SearchStrategy[Any]] = {"hash": EIGHT}
    if cls in ROWS:
        special["chunks"] = st.lists(ROWS[cls].map(list), max_size=3)
    return st.builds(
        cls, **{f.name: special[f.name] if f.name in special else OF_TYPE[str(f.type)] for f in fields(cls)}
    )


@pytest.mark.parametrize("cls", TO_SHARD + TO_WORKER)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_headers_travel(cls: type[Header], data: st.DataObject) -> None:
    header = data.draw(header_strategy(cls))
    read, payload = frame.decode(frame.encode(header.pack(), b"12"))
    mine, other = (parse_to_shard, parse_to_worker) if cls in TO_SHARD else (parse_to_worker, parse_to_shard)
    assert mine(read) == header
    assert payload == b"12"
    with pytest.raises(MalformedFrame, match=f"'{cls.kind}'"):
        other(read)


# -- Records ------------------------------------------------------------------------------------

DATACLASSES = [
    types.Fence,
    types.GroupScalars,
    types.Decision,
    types.ContributionReport,
    types.Prepared,
    types.Applied,
]
SIGNED = {"rank", "next_hysteresis", "next_last_overflow"}


def value_strategy(hint: Any, name: str) -> st.SearchStrategy[Any]:
    if hint is int:
        return st.integers(-(2**63), 2**63 - 1) if name in SIGNED else st.integers(0, 2**64 - 1)
    if hint is float:
        return st.floats()
    if hint is bool:
        return st.booleans()
    if get_args(hint):
        return st.lists(value_strategy(get_args(hint)[0], name), max_size=4).map(tuple)
    return dataclass_strategy(hint)


def dataclass_strategy(cls: Any) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: value_strategy(hint, name) for name, hint in get_type_hints(cls).items()})


@pytest.mark.parametrize("cls", DATACLASSES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_values_travel_and_are_journaled(cls: Any, data: st.DataObject) -> None:
    value = data.draw(dataclass_strategy(cls))
    message = to_proto(value)
    # repr, so that NaN equals NaN.
    assert repr(from_proto(cls, type(message).FromString(message.SerializeToString()))) == repr(value)
    record = msgpack.unpackb(msgpack.packb(to_record(value)))
    assert repr(from_record(cls, record)) == repr(value)
