"""What is printed when a run has ended: how good it is, what it writes, and where everything is."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import warnings
from pathlib import Path

from ps.errors import ConfigError, PsError, StorageError
from ps.storage.layout import checkpoints, newest, version_of
from ps.storage.manifest import Manifest, read_manifest
from workers.config import JobConfig
from workers.launch.added import Added
from workers.launch.folder import RunFolder
from workers.launch.metrics import clock, evaluation_line, last_evaluation
from workers.launch.supervisor import End

_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_K = 100, 0.4, 40
#: Of Python, so many samples are drawn, and the one with most code that parses is shown.
_PYTHON_SAMPLES = 4


def completion(folder: RunFolder, job: JobConfig) -> str | None:
    """Say that a run has nothing left to do, and how to go on; None: it has.

    Raises:
        ConfigError: the job ends before what is done.
    """
    checkpoint = newest(job.checkpoint_dir)
    if checkpoint is None:
        return None
    try:
        manifest, _ = read_manifest(checkpoint)
    except StorageError:
        # The coordinator names it, and goes back to the one before.
        return None
    for name, end in (("steps", job.training.steps), ("stop_at", job.training.stop_at)):
        if end is not None and end < manifest.version:
            raise ConfigError(f"training.{name}={end} is behind step {manifest.version} of {folder.path}")
    if manifest.version >= job.training.steps:
        return (
            f"{folder.path} is complete: {manifest.version} of {job.training.steps} steps; "
            f"to go on: windlass resume {folder.path} training.steps={2 * manifest.version}"
        )
    if _meets_target(job, manifest):
        return (
            f"{folder.path} is complete: its held-out loss {manifest.evaluation:.4f} is at most "
            f"training.target_loss={job.training.target_loss}; to go on: "
            f"windlass resume {folder.path} training.target_loss=null"
        )
    return None


def is_at_end(job: JobConfig, checkpoint: Path | None) -> bool:
    """Whether the checkpoint with which a run has ended is where the job ends."""
    try:
        manifest = read_manifest(checkpoint)[0] if checkpoint is not None else None
    except StorageError:
        return False
    return manifest is not None and (manifest.version >= job.training.end or _meets_target(job, manifest))


def _meets_target(job: JobConfig, manifest: Manifest) -> bool:
    target, reached = job.training.target_loss, manifest.evaluation
    return target is not None and reached is not None and reached <= target


def print_doubts(job: JobConfig) -> None:
    """Warn of what a job may wait for in vain."""
    for doubt in job.doubts:
        print(f"windlass: warning: {doubt}", file=sys.stderr)


def print_unfinished(folder: RunFolder, job: JobConfig, end: End, added: Added) -> None:
    """Print what is left of a run that was stopped, or failed, and how to go on."""
    if end.error is not None and added.nothing:
        # Another start would fail as this one has; the error says what to do.
        return
    checkpoint = added.checkpoint or _newest_passed(job, added.version)
    kept = f"{_kept(checkpoint, end, added)}; " if checkpoint is not None else ""
    print(f"{kept}go on with: windlass resume {folder.path}")


def _newest_passed(job: JobConfig, version: int) -> Path | None:
    """The newest checkpoint that a run at this version may have come from: it went back from newer ones."""
    try:
        found = checkpoints(job.checkpoint_dir)
    except StorageError:
        return None
    return next((folder for folder in reversed(found) if (version_of(folder) or 0) <= version), None)


def _kept(checkpoint: Path, end: End, added: Added) -> str:
    behind = added.version - (version_of(checkpoint) or 0)
    # A run that failed may have made steps of which no file tells.
    if checkpoint == added.checkpoint and behind <= 0 and end.error is None:
        return f"saved {checkpoint.name}"
    back = f", {behind} step{'s' if behind > 1 else ''} back" if behind > 0 else ""
    return f"the newest checkpoint is {checkpoint.name}{back}"


def print_result(folder: RunFolder, job: JobConfig, seconds: float) -> None:
    """Print a run's result."""
    checkpoint = newest(job.checkpoint_dir)
    version = read_manifest(checkpoint)[0].version if checkpoint else 0
    print(f"\ndone: {version} of {job.training.steps} steps; this took {clock(seconds)}")
    evaluation = last_evaluation(folder.metrics)
    if evaluation is not None:
        print(f"held-out: {evaluation_line(evaluation)}")
    if checkpoint is not None:
        _print_sample(folder, job)
    for what, where in (
        ("run folder", folder.path),
        ("checkpoint", checkpoint or "none"),
        ("metrics", folder.metrics),
        ("logs", folder.logs),
        *([("trace", folder.trace)] if job.trace.steps and folder.trace.exists() else []),
    ):
        print(f"{what:<11} {where}")
    print(f"{'go on':<11} windlass resume {folder.path}{_how_to_go_on(job, version)}")
    print(f'{"sample":<11} windlass sample {folder.path} --prompt "{"" if job.data.paths else "def "}"')


def _how_to_go_on(job: JobConfig, version: int) -> str:
    return "" if version < job.training.steps else f" training.steps={2 * version}"


def _prompt(job: JobConfig) -> str:
    """The standard library's own source is the default text; of another text nothing is known."""
    return "" if job.data.paths else "import os\nimport sys\n"


def _print_sample(folder: RunFolder, job: JobConfig) -> None:
    from workers.engine import restore

    python = not job.data.paths
    try:
        restored = restore.load_model(folder.path)
        samples = [
            restore.write(restored, _prompt(job), _SAMPLE_TOKENS, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_K, job.seed + number)
            for number in range(_PYTHON_SAMPLES if python else 1)
        ]
    except PsError as error:
        # The run is done and saved; that it cannot be shown must not make it look failed.
        print(f"no sample: {error.message}")
        return
    except KeyboardInterrupt:
        # The run is done; who has seen enough still hears where it is.
        print("no sample: interrupted")
        return
    text = max(samples, key=_code_that_parses)
    chosen = f" (of {len(samples)}, the one with most code that parses)" if python else ""
    print(f"\na sample of its writing{chosen}:\n")
    # A small model has learned blank lines first of all.
    print(textwrap.indent(re.sub(r"\n\s*\n\s*\n+", "\n\n\n", text).strip(), "    "))
    print()


def _code_that_parses(text: str) -> int:
    """Count the characters in blocks, between blank lines, that are Python with at least one statement."""
    total = 0
    for block in text.split("\n\n"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                total += len(block) if ast.parse(block).body else 0
        except (SyntaxError, ValueError):
            continue
    return total
