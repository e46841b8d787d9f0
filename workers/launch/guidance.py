"""What to say about a path that is no run folder: what it is instead, or which runs there are. Reads, never writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ps.errors import StorageError
from ps.storage.layout import checkpoints
from ps.storage.manifest import MANIFEST_NAME

#: Where `train` puts runs that were not given a folder.
_RUNS = Path("runs")
_NAMED = 3
_JOB_FILES = (".yaml", ".yml", ".json")


def runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder, the newest first; none when it cannot be read."""
    return [path for _, path in sorted(_runs(folder), reverse=True)]


def no_run(path: Path) -> str:
    """Say why a path is no run, and what to name instead."""
    if path.is_file():
        train = f"; to train with it: windlass train {path}" if path.suffix in _JOB_FILES else ""
        return f"{path} is a file, and a run is a folder{train}"
    if (path / MANIFEST_NAME).is_file():
        run = path.absolute().parent.parent
        return f"{path} is a checkpoint, not a run" + (f"; its run is {run}" if _holds_run(run) else "")
    found = _checkpoints(path)
    if found:
        names = ", ".join(str(checkpoint) for checkpoint in reversed(found[-_NAMED:]))
        run = path.absolute().parent
        their_run = f"; their run is {run}" if _holds_run(run) else ""
        return f"{path} holds checkpoints, not a run; name one of them: {names}{their_run}"
    for folder in (path, path.parent, _RUNS):
        runs = runs_in(folder)
        if runs:
            there = ", ".join(str(run) for run in runs[:_NAMED])
            return f"{path} holds no run (there is no {path / 'config.json'}); {_which(len(runs))}: {there}"
    return f"{path} holds no run (there is no {path / 'config.json'}), nor does {_RUNS}; start one with: windlass train"


def export_is_no_run(path: Path) -> str:
    """Say what a folder is that holds another program's config.json."""
    return (
        f"{path} is an export for Hugging Face's transformers, not a run; name the run that it was made from, "
        "or load it with transformers"
    )


def _which(number: int) -> str:
    if number == 1:
        return "there is one"
    return "there are" if number <= _NAMED else f"the newest of {number} are"


def _runs(folder: Path) -> Iterator[tuple[float, Path]]:
    try:
        for path in folder.iterdir():
            if _holds_run(path):
                yield (path / "config.json").stat().st_mtime, path
    except OSError:
        return


def _holds_run(folder: Path) -> bool:
    """An export has a config.json as well."""
    return (folder / "config.json").is_file() and not (folder / "generation_config.json").exists()


def _checkpoints(folder: Path) -> list[Path]:
    try:
        return checkpoints(folder)
    except StorageError:
        return []
