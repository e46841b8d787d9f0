"""Keys of a job that were typed as something else: with a space for the equals sign, or as an option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ps.config import field_names
from ps.errors import ConfigError
from workers.config import JobConfig


def refuse_loose_keys(arguments: Sequence[str]) -> None:
    """See that no key stands apart from its value.

    Raises:
        ConfigError: one does; says how to write it.
    """
    known = set(field_names(JobConfig))
    for index, key in enumerate(arguments):
        if key in known and not (index == 0 and Path(key).is_file()):
            rest = [text.removeprefix("=") for text in arguments[index + 1 : index + 3] if text != "="]
            value = rest[0] if rest and "=" not in rest[0] else "VALUE"
            raise ConfigError(f"{key} is a key without a value; write {key}={value}, without a space")


def hint_for_option(option: str | None, arguments: Sequence[str]) -> str:
    """How to write a key that was given as an option; empty: it is none."""
    key = option.lstrip("-") if option else ""
    if option is None or key not in set(field_names(JobConfig)):
        return ""
    values = [text.partition("=")[2] for text in arguments if text.startswith(f"{option}=")]
    if not values and option in arguments:
        values = list(arguments[list(arguments).index(option) + 1 :])
    return f"; it is a key of a job: write {key}={values[0] if values else 'VALUE'}, without --"
