"""Between the frozen dataclasses of `ps.types` and the generated protobuf messages, by field name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from google.protobuf.message import Message

from protos.ps.v1 import common_pb2
from ps import types

_MESSAGES: dict[type, Any] = {
    types.Fence: common_pb2.Fence,
    types.GroupScalars: common_pb2.GroupScalars,
    types.Decision: common_pb2.Decision,
    types.ContributionReport: common_pb2.ContributionReport,
    types.Prepared: common_pb2.Prepared,
    types.Applied: common_pb2.Applied,
}

Value = TypeVar("Value")

#: Of a field: its name, the dataclass that it or each of its items is (None: neither is one), and whether it has items.
Layout = tuple[str, Any, bool]


_LAYOUTS: dict[type, list[Layout]] = {}


def _layout(cls: type) -> list[Layout]:
    """A dataclass's fields. Their types are compiled from text, which takes far longer than all the rest."""
    if cls in _LAYOUTS:
        return _LAYOUTS[cls]
    found = _LAYOUTS[cls] = []
    for name, hint in get_type_hints(cls).items():
        arguments = get_args(hint)
        inner = arguments[0] if arguments else hint
        found.append((name, inner if is_dataclass(inner) else None, bool(arguments)))
    return found


def to_proto(value: Any) -> Any:
    """Turn a dataclass of `ps.types` into its protobuf message."""
    message = _MESSAGES[type(value)]()
    for name, inner, several in _layout(type(value)):
        content = getattr(value, name)
        if several:
            getattr(message, name).extend(map(to_proto, content) if inner else content)
        elif inner:
            getattr(message, name).CopyFrom(to_proto(content))
        else:
            setattr(message, name, content)
    return message


def from_proto(cls: type[Value], message: Message) -> Value:
    """The reverse of `to_proto`."""
    return cls(**_values(cls, lambda name: getattr(message, name), from_proto))


def to_record(value: Any) -> dict[str, Any]:
    """Turn a dataclass into plain maps and lists, for a journal."""
    record: dict[str, Any] = {}
    for name, inner, several in _layout(type(value)):
        content = getattr(value, name)
        if several:
            content = [to_record(item) for item in content] if inner else list(content)
        elif inner:
            content = to_record(content)
        record[name] = content
    return record


def from_record(cls: type[Value], record: dict[str, Any]) -> Value:
    """The reverse of `to_record`."""
    return cls(**_values(cls, record.__getitem__, from_record))


def _values(cls: type, content_of: Callable[[str], Any], make: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """A dataclass's fields, from what is elsewhere under their names."""
    values = {}
    for name, inner, several in _layout(cls):
        content = content_of(name)
        if several:
            content = tuple([make(inner, item) for item in content] if inner else content)
        elif inner:
            content = make(inner, content)
        values[name] = content
    return values
