"""The dataclasses of ps.types and the protobuf messages are the same, field by field."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor

from ps import types
from ps.types import ContributionReport, Decision, Fence, GroupScalars, Prepared
from ps.wire import proto
from ps.wire.proto import from_proto, from_record, to_proto, to_record

TYPES = {
    int: {FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT64},
    float: {FieldDescriptor.TYPE_DOUBLE},
    bool: {FieldDescriptor.TYPE_BOOL},
}
PAIRS = list(proto._MESSAGES.items())


@pytest.mark.parametrize(("cls", "message"), PAIRS, ids=lambda value: value.__name__)
def test_names_and_types_agree(cls: type, message: Any) -> None:
    hints = get_type_hints(cls)
    described = {field.name: field for field in message.DESCRIPTOR.fields}
    assert list(hints) == list(described)
    for name, hint in hints.items():
        field = described[name]
        item = get_args(hint)[0] if get_args(hint) else hint
        assert field.is_repeated == bool(get_args(hint)), name
        if is_dataclass(item):
            assert field.message_type is proto._MESSAGES[item].DESCRIPTOR
        else:
            assert field.type in TYPES[item], name


def test_every_dataclass_that_is_reported_has_a_message() -> None:
    assert {cls.__name__ for cls, _ in PAIRS} == {
        "Fence",
        "GroupScalars",
        "Decision",
        "ContributionReport",
        "Prepared",
        "Applied",
    }


def test_what_is_nested_travels() -> None:
    report = Prepared(Fence(1, 2), 3, 4, (1.0, float("inf")), (ContributionReport(0, 1.5, 10, -1, 2**63 - 1),) * 2)
    assert from_proto(Prepared, to_proto(report)) == report
    assert from_record(Prepared, to_record(report)) == report


def test_a_record_may_say_more() -> None:
    """A journal's record of a decision also has a type and the owners."""
    scalars = GroupScalars(0.1, 0.01)
    assert from_record(GroupScalars, {**to_record(scalars), "type": "x"}) == scalars


def test_a_number_that_the_message_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="out of range"):
        to_proto(Fence(-1, 0))


def test_a_decision_says_its_version() -> None:
    names = get_type_hints(Decision)
    values = dict.fromkeys(names, 1) | {"fence": Fence(1, 1), "groups": (), "step": 41}
    assert Decision(**values).version == 42


@pytest.mark.parametrize(("slots", "contributions"), [(1, 1), (4, 2), (8, 3), (13, 12), (8192, 7), (5, 5)])
def test_contributions_partition_the_slots(slots: int, contributions: int) -> None:
    ranges = [types.slot_range(c, contributions, slots) for c in range(contributions)]
    assert [slot for part in ranges for slot in part] == list(range(slots))
    lengths = {len(part) for part in ranges}
    assert max(lengths) - min(lengths) <= 1


def test_a_table_is_packed_without_loss() -> None:
    table = types.ParameterTable((types.TensorSpec("a", (2, 3), 1), types.TensorSpec("b", (), 0)))
    assert types.ParameterTable.unpack(table.packed()) == table
    assert table.num_parameters == 7
    assert len(table.digest) == 64
