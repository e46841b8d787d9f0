"""Between the frozen dataclasses of `ps.types` and the generated protobuf messages, by field name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
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


def to_proto(value: Any) -> Any:
    """Turn a dataclass of `ps.types` into its protobuf message."""
    message = _MESSAGES[type(value)]()
    for field in fields(value):
        content = getattr(value, field.name)
        if is_dataclass(content):
            getattr(message, field.name).CopyFrom(to_proto(content))
        elif isinstance(content, tuple):
            getattr(message, field.name).extend(to_proto(c) if is_dataclass(c) else c for c in content)
        else:
            setattr(message, field.name, content)
    return message


def from_proto(cls: type[Value], message: Message) -> Value:
    """The reverse of `to_proto`."""
    hints = get_type_hints(cls)
    return cls(**{name: _value(hint, getattr(message, name)) for name, hint in hints.items()})


def to_record(value: Any) -> Any:
    """Turn a dataclass into plain maps and lists, for a journal."""
    if is_dataclass(value):
        return {field.name: to_record(getattr(value, field.name)) for field in fields(value)}
    return [to_record(item) for item in value] if isinstance(value, tuple) else value


def from_record(cls: type[Value], record: dict[str, Any]) -> Value:
    """The reverse of `to_record`."""
    hints = get_type_hints(cls)
    return cls(**{name: _plain(hint, record[name]) for name, hint in hints.items()})


def _value(hint: Any, content: Any) -> Any:
    if is_dataclass(hint):
        return from_proto(hint, content)  # type: ignore[arg-type]
    if get_args(hint):
        item = get_args(hint)[0]
        return tuple(_value(item, c) for c in content)
    return content


def _plain(hint: Any, content: Any) -> Any:
    if is_dataclass(hint):
        return from_record(hint, content)  # type: ignore[arg-type]
    if get_args(hint):
        item = get_args(hint)[0]
        return tuple(_plain(item, c) for c in content)
    return content
