"""Headers are refused by the name of the field that is missing, of a wrong type, or out of range."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ps.errors import MalformedFrame, PsError
from ps.wire import frame, messages
from ps.wire.messages import MAX_TOKENS, Header, Push, parse_to_shard, parse_to_worker

IDENTITY: dict[str, Any] = {"run": "r", "term": 1, "epoch": 2, "rank": 0, "incarnation": 9}
HEADERS: list[Header] = [
    messages.Hello(**IDENTITY, plan="p"),
    Push(
        **IDENTITY,
        step=3,
        contribution=1,
        chunk=4,
        slots=2,
        loss_scale=1024.0,
        dtype="fp16",
        hash=bytes(8),
        present=b"\x01",
        loss_sum=1.5,
        tokens=7,
    ),
    messages.PushPlaced(
        **IDENTITY,
        step=3,
        contribution=1,
        slots=2,
        loss_scale=1024.0,
        dtype="fp16",
        loss_sum=1.5,
        tokens=7,
        greeting=2,
        chunks=[[4, 64, bytes(8), b"\x01"], [5, 128, bytes(8), b"\x03"]],
    ),
    messages.Attach(**IDENTITY, nonce=bytes(16)),
    messages.Initialize(**IDENTITY, chunk=1, hash=bytes(8)),
    messages.Pull(**IDENTITY, version=3, applied=-1),
    messages.Welcome(0, 9, 1, 2, 3, 3, [[0, b"\x01"]]),
    messages.Ack(3, 1, 4),
    messages.Weights(3, 4, "fp16"),
    messages.Placed(3, "fp16", [[4, 64, 1, 2], [5, 128, 3, 2]]),
    messages.Unchanged(3, 2),
    messages.Refused("WRONG_HASH", "why", 3, 1, 4),
]
FIELDS = [(header, field.name) for header in HEADERS for field in fields(header)]


def parse(header: Header, record: dict[str, Any]) -> Header:
    to_shard = isinstance(header, messages.Fenced)
    return parse_to_shard(record) if to_shard else parse_to_worker(record)


def test_every_kind_is_here() -> None:
    kinds = {header.kind for header in HEADERS}
    assert kinds == set(messages._TO_SHARD) | set(messages._TO_WORKER)


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.kind)
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    assert parse(header, header.pack()) == header
    # A later version may say more.
    assert parse(header, {**header.pack(), "new": 1}) == header


@pytest.mark.parametrize(("header", "name"), FIELDS, ids=lambda value: getattr(value, "kind", value))
def test_every_field_is_needed_and_has_a_type(header: Header, name: str) -> None:
    record = header.pack()
    without = {key: value for key, value in record.items() if key != name}
    with pytest.raises(MalformedFrame, match=f"{header.kind}.*'{name}' is missing"):
        parse(header, without)
    right = type(record[name])
    for wrong in (None, 1, 1.5, True, "text", b"bytes", [], {}, 2**63, -2):
        if isinstance(wrong, right) and not isinstance(wrong, bool) and wrong not in (2**63, -2):
            continue
        if right is bool and isinstance(wrong, bool):
            continue
        with pytest.raises(MalformedFrame, match=name):
            parse(header, {**record, name: wrong})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("loss_scale", [0.0, -1.0, float("nan"), float("inf"), -float("inf")]),
        ("hash", [b"", bytes(7), bytes(9)]),
        ("incarnation", [-1, 2**63]),
        ("tokens", [-1, MAX_TOKENS + 1]),
        ("run", ["x" * 4097]),
        ("step", [-2, 2**63]),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(MalformedFrame, match=name):
            parse_to_shard({**HEADERS[1].pack(), name: value})


BAD_ROWS: list[list[Any]] = [
    [],
    [4],
    [4, 64, bytes(8), b"", 1],
    [4, 64, bytes(7), b""],
    [4, 64, 2, 2],
    ["4", 64, bytes(8), b""],
    [4, -2, bytes(8), b""],
    [4, True, bytes(8), b""],
    [2**63, 64, bytes(8), b""],
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=repr)
def test_a_row_that_does_not_say_where_a_chunk_is(row: list[Any]) -> None:
    placed = next(header for header in HEADERS if isinstance(header, messages.PushPlaced)).pack()
    with pytest.raises(MalformedFrame, match="does not say where a chunk is"):
        parse_to_shard({**placed, "chunks": [*placed["chunks"], row]})
    if len(row) != 4 or row[2] != 2:
        with pytest.raises(MalformedFrame, match="does not say where a chunk is"):
            parse_to_worker({**messages.Placed(3, "fp16", []).pack(), "chunks": [row]})


def test_a_push_of_places_is_one_push_for_each() -> None:
    placed = next(header for header in HEADERS if isinstance(header, messages.PushPlaced))
    pushes = list(placed.pushes())
    assert [(push.chunk, push.present, place) for push, place in pushes] == [(4, b"\x01", 64), (5, b"\x03", 128)]
    for push, _ in pushes:
        assert push == replace(HEADERS[1], chunk=push.chunk, present=push.present)


def test_the_longest_frame_of_places_can_be_read() -> None:
    """A header has a bound; whoever tells of many places tells of so many at most."""
    most = [[2**31, 2**62, 2**31, 2**62] for _ in range(messages.MAX_PLACES)]
    told = messages.Placed(2**31, "fp16", most)
    assert parse_to_worker(frame.decode(frame.encode(told.pack()))[0]) == told


def test_kinds_that_are_not_known() -> None:
    for kind in (None, 1, "ack", "weights", "", b"push", ["push"], {"push": 1}):
        with pytest.raises(MalformedFrame, match="not known here"):
            parse_to_shard({**HEADERS[1].pack(), "kind": kind})
    with pytest.raises(MalformedFrame, match="not known here"):
        parse_to_worker(HEADERS[1].pack())
    with pytest.raises(MalformedFrame, match="not known here"):
        parse_to_shard({})


def test_a_refused_frame_becomes_the_error_that_was_raised() -> None:
    error: PsError = messages.Refused("WRONG_HASH", "chunk 3 was damaged", 1, 2, 3).error()
    assert type(error).code == "WRONG_HASH"
    assert error.message == "chunk 3 was damaged"
