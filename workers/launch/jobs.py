"""How a job comes about: from the command line, and again at a resume. Pure but for reading job files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ps.config import nest, parse_override
from ps.errors import ConfigError
from workers.config import JobConfig, load_job
from workers.launch.slips import refuse_loose_keys

#: What a resumed run may change: none of it is part of which run it is.
MAY_CHANGE = (
    "run_dir",
    "determinism",
    "durability",
    "data.cache_dir",
    "cluster.",
    "training.",
    "evaluation.",
    "checkpoint.",
    "journal.",
    "membership.",
    "telemetry.",
    "trace.",
    "security.",
    "worker.",
    "launch.",
)


class Difference(NamedTuple):
    """A key on which two jobs differ."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} is {self.old}, not {self.new}"


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Tell `[job.yaml] [key=value ...]` apart: a job file has no `=` in its name, or exists.

    Raises:
        ConfigError: a key stands apart from its value.
    """
    refuse_loose_keys(arguments)
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return Path(arguments[0]), list(arguments[1:])
    return None, list(arguments)


def given(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Path | None, list[str]]:
    """The job file and the overrides of a command: $WINDLASS_JOB and $WINDLASS_OVERRIDES, then what it is called with.

    Raises:
        ConfigError: $WINDLASS_OVERRIDES has an open quote.
    """
    job_file, overrides = split_arguments(arguments)
    if job_file is None and environment.get("WINDLASS_JOB"):
        job_file = Path(environment["WINDLASS_JOB"])
    text = environment.get("WINDLASS_OVERRIDES", "")
    try:
        return job_file, [*shlex.split(text), *overrides]
    except ValueError as error:
        raise ConfigError(
            f"WINDLASS_OVERRIDES={text}: {error}; separate key=value by spaces, and quote as in a shell"
        ) from None


def resolve(job_file: Path | None, overrides: Sequence[str], base: dict[str, Any] | None = None) -> JobConfig:
    """Build a job and fix what is computed at the first start.

    Raises:
        ConfigError: one line that names the key, the value and what is allowed.
    """
    job = load_job(job_file, overrides, base)
    batch = job.batch.model_copy(update={"contributions_per_step": job.contributions})
    # A run is evaluated, sampled and resumed from anywhere.
    paths = {"paths": tuple(path.absolute() for path in job.data.paths), "cache_dir": job.data.cache_dir.absolute()}
    folder = job.security.certificates
    security = job.security.model_copy(update={"certificates": folder.absolute() if folder else None})
    return job.model_copy(update={"batch": batch, "data": job.data.model_copy(update=paths), "security": security})


def resume(previous: JobConfig, run_dir: Path, overrides: Sequence[str]) -> JobConfig:
    """Build the job with which a run goes on.

    `training.stop_at` is forgotten unless it is given again, and the folder may have moved.

    Raises:
        ConfigError: an override is wrong, or would make another run.
    """
    refuse_loose_keys(overrides)
    if "run_dir" in nest([parse_override(text) for text in overrides]):
        raise ConfigError(f"run_dir=...: a resumed run stays in its folder, {run_dir}")
    base = previous.model_dump(mode="json")
    base["run_dir"] = str(run_dir)
    base["training"]["stop_at"] = None
    job = resolve(None, overrides, base)
    check_same_run(previous, job, run_dir)
    return job


def check_same_run(previous: JobConfig, job: JobConfig, run_dir: Path) -> None:
    """See that a job differs from a run's only in what may change.

    Raises:
        ConfigError: with it the run would be another one.
    """
    other = [found for found in differences(previous, job) if not found.key.startswith(MAY_CHANGE)]
    if other:
        raise ConfigError(
            f"{other[0].key}={other[0].new} would make another run than the one in {run_dir}, where it is "
            f"{other[0].old}; choose a new folder with run_dir=..."
        )


def differences(old: JobConfig, new: JobConfig) -> list[Difference]:
    """The keys on which two jobs differ, as values of a job file."""
    return list(_compare(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[Difference]:
    for name in old:
        before, after = old[name], new[name]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _compare(before, after, f"{prefix}{name}.")
        elif before != after:
            yield Difference(prefix + name, before, after)
