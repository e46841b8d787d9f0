"""What the shell offers at <TAB>: job files, keys of a job, and their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from workers.config import JobConfig
from workers.launch.guidance import runs_in
from workers.launch.job_file import Key, keys

_JOB_FILES = (".yaml", ".yml", ".json")


def complete_job(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer job files, keys and values."""
    words = _words(context)
    # A job file comes first or not at all; after it, and in a value, files only stand in the way.
    return [*([] if words else _job_files(incomplete)), *offer(words, incomplete)]


def complete_override(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer keys and values."""
    return offer(_words(context), incomplete)


def complete_run(incomplete: str) -> list[tuple[str, str]]:
    """Offer run folders: those in the folder that was begun, and those in its folders."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    found = [*runs_in(folder), *(run for entry in below for run in runs_in(entry))]
    return [(str(run), "a run folder") for run in found if str(run).startswith(incomplete)]


def offer(before: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    """Offer keys that begin so, or the values of the one that is there.

    bash takes an equals sign for a word of its own: then the key is among the words before, and its values
    stand alone.

    Args:
        before: the complete words.
        incomplete: what there is of the word to complete.

    Returns:
        (text, help).
    """
    known = {key.name: key for key in keys(JobConfig)}
    words = [word for word in before if word != "="]
    if words and words[-1] in known:
        return [(value, "") for value in _values(known[words[-1]]) if value.startswith(incomplete)]
    name, equals, begun = incomplete.partition("=")
    if equals:
        key = known.get(name)
        values = _values(key) if key else ()
        return [(f"{name}={value}", key.meaning) for value in values if key and value.startswith(begun)]
    found = [key for key in known.values() if key.name.startswith(incomplete)]
    if len(found) == 1:
        # A shell puts a space after a single answer: it has to be whole.
        return [(f"{found[0].name}={value}", found[0].meaning) for value in _values(found[0])]
    return [(f"{key.name}=", key.meaning) for key in found]


def _words(context: typer.Context) -> list[str]:
    """The words of an argument that takes several."""
    lists = (value for value in context.params.values() if isinstance(value, list | tuple))
    return [str(word) for value in lists for word in value]


def _values(key: Key) -> tuple[str, ...]:
    return key.choices or (key.default,)


def _job_files(incomplete: str) -> Iterator[tuple[str, str]]:
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        found = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return
    for entry in found:
        text = f"{entry}/" if entry.is_dir() else str(entry)
        if text.startswith(incomplete) and (entry.suffix in _JOB_FILES or (entry.is_dir() and incomplete)):
            yield text, "a folder" if entry.is_dir() else "a job file"
