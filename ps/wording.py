"""pydantic's mistakes in the words of a job file: what a key takes, and which value was probably meant. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

#: What other programs call the same thing.
_ALSO_CALLED = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "single": "fp32",
    "gpu": "cuda",
    "nvidia": "cuda",
    "metal": "mps",
    "tpu": "xla",
    "warn": "warning",
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}


def in_a_jobs_words(model: type[BaseModel], detail: Mapping[str, Any]) -> tuple[str, str]:
    """Name the key and the reason of a mistake.

    Args:
        model: the configuration that refused.
        detail: one of pydantic's errors.

    Returns:
        The dotted key, and what is wrong with its value.
    """
    location, kind = list(detail["loc"]), detail["type"]
    reason = detail["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if kind in ("model_type", "model_attributes_type"):
        reason = _a_section(model, location) or reason
    elif kind in ("tuple_type", "missing", "too_long", "too_short"):
        # What a list lacks is called by its index; the key is the list's.
        location = [part for part in location if isinstance(part, str)]
        reason = _a_list(model, location) or reason
    elif kind in ("literal_error", "enum"):
        reason += _meant(str(detail["input"]), re.findall(r"'([^']*)'", str(detail["ctx"]["expected"])))
    return ".".join(map(str, location)), reason


def _a_section(model: type[BaseModel], location: Sequence[str | int]) -> str | None:
    field = _field(model, location)
    if field is None or not _is_section(field.annotation):
        return None
    names = list(field.annotation.model_fields)
    return f"a section is needed, with its keys: {', '.join(names)}"


def _a_list(model: type[BaseModel], location: Sequence[str | int]) -> str | None:
    field = _field(model, location)
    if field is None or get_origin(field.annotation) is not tuple:
        return None
    items = get_args(field.annotation)
    if Ellipsis in items:
        return "a list is needed, such as [a,b]"
    example = ",".join(map(str, field.default))
    return f"a list of {_NUMBERS.get(len(items), len(items))} numbers is needed, such as [{example}]"


def _meant(value: str, choices: Sequence[str]) -> str:
    word = value.lower()
    also = _ALSO_CALLED.get(word, "")
    near = [also] if also in choices else difflib.get_close_matches(word, choices, n=3, cutoff=0.6)
    # A wrong letter is a likelier slip than one too many: adamv is adamw, although adam is in it whole.
    near.sort(key=lambda choice: len(choice) != len(word))
    return f"; did you mean {near[0]}?" if near else ""


def _field(model: type[BaseModel], location: Sequence[str | int]) -> FieldInfo | None:
    field: FieldInfo | None = None
    for part in location:
        if field is not None:
            if not _is_section(field.annotation):
                return None
            model = field.annotation
        field = model.model_fields.get(str(part))
        if field is None:
            return None
    return field


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
