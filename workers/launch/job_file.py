"""A job as text for people: every key with what it means, or every key with where its value comes from. Pure."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_COMMENT_WIDTH = 100
#: How the bounds of a number read.
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Key:
    """One key of a job."""

    #: Dotted.
    name: str
    #: As in a job file.
    default: str
    meaning: str
    #: The values that it may have; empty: too many to name.
    choices: tuple[str, ...]
    #: Such as "at least 1, at most 1024".
    bounds: str


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """All keys of a configuration, in its order."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield _key(prefix + name, field, model)


def commented(model: type[BaseModel]) -> str:
    """Write a job file with every key at its default, and what each means above it.

    The run folder stays a comment: a second run must not go into the folder of the first.
    """
    head = [
        "# A job of windlass: every key there is, at its default. A key that is left out has its default too.",
        "#",
        "#   windlass validate FILE    what it will take; starts nothing",
        "#   windlass train FILE",
        "",
    ]
    return "\n".join([*head, *_commented(model, "")]) + "\n"


def with_origins(values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """Write a resolved job as YAML, a line each, with a comment where a value is not the default.

    Args:
        values: nested, as of a job file.
        origins: by dotted key, where its value comes from.
    """
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from with_origins(value, origins, f"{prefix}{name}.")
        else:
            origin = origins.get(prefix + name)
            yield f"{indent}{name}: {scalar(value)}" + (f"  # {origin}" if origin else "")


def scalar(value: Any) -> str:
    """Write a value as it stands in a job file, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _commented(model: type[BaseModel], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is not None:
            yield ""
            yield from _comment(_first_paragraph(section), indent)
            yield f"{indent}{name}:"
            yield from _commented(section, f"{prefix}{name}.")
            continue
        key = _key(prefix + name, field, model)
        allowed = f"One of {', '.join(key.choices)}." if key.choices else f"{key.bounds.capitalize()}."
        words = [key.meaning, allowed if key.choices or key.bounds else ""]
        yield from _comment(" ".join(word for word in words if word), indent)
        if key.name == "run_dir":
            yield "# Default: runs/ and the time of the start."
            yield "# run_dir: runs/mine"
        else:
            yield f"{indent}{name}: {key.default}"


def _comment(text: str, indent: str) -> list[str]:
    lead = f"{indent}# "
    return textwrap.wrap(text, _COMMENT_WIDTH, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False)


def _first_paragraph(section: type[BaseModel]) -> str:
    """What a section's class says of itself; pydantic's own words where it says nothing."""
    return " ".join((section.__dict__.get("__doc__") or "").split("\n\n")[0].split())


def _key(name: str, field: FieldInfo, model: type[BaseModel]) -> Key:
    meaning = " ".join((field.description or "").split())
    default = model().model_dump(mode="json")[name.rpartition(".")[2]]
    text = scalar(default)
    if default is None and "auto:" in meaning:
        text = "auto"
    return Key(name, text, meaning, tuple(dict.fromkeys(_choices(field.annotation))), _bounds(field))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        yield from (str(member.value) for member in annotation)
    elif get_origin(annotation) in (Union, types.UnionType):
        of_each = [list(_choices(kind)) for kind in get_args(annotation) if kind is not type(None)]
        # One open alternative, and the others are no longer all that there is.
        if all(of_each):
            yield from (choice for choices in of_each for choice in choices)
            if type(None) in get_args(annotation):
                yield "null"


def _bounds(field: FieldInfo) -> str:
    found = [
        f"{words} {bound}"
        for name, words in _BOUNDS.items()
        for constraint in field.metadata
        if (bound := getattr(constraint, name, None)) is not None
    ]
    return ", ".join(found)
