"""The run folder: where everything is that a run writes.

config.json          the resolved job
metrics.jsonl        a line per step and per evaluation
tokenizer.json       the tokenizer, kept by a worker that has the folder (workers.data.kept)
data.json            what else must be known of the text
cluster.json         who serves where, rewritten by the coordinator at each change
targets.json         the same for Prometheus (file_sd)
trace.json           a timeline of the steps that `trace.steps` names
logs/<role>-<rank>.log
checkpoints/         unless checkpoint.dir names another place
journal/             what the coordinator has decided
.lock                held by the launcher and its roles
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ps.config import validate
from ps.errors import CheckpointDamaged, CheckpointNotFound, ConfigError, PsError, StartupError
from ps.storage.files import make_directory, reason, write_atomic
from ps.storage.layout import checkpoints, is_complete, newest
from workers.config import JobConfig
from workers.launch import guidance

Used = TypeVar("Used")


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run folder, and what is done with them as a whole."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.json"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def holds_run(self) -> bool:
        """Whether there is a job in it.

        Raises:
            ConfigError: it cannot be looked into.
        """
        try:
            return self.config.exists()
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {reason(error)}") from None

    def read_job(self) -> JobConfig:
        """Read the resolved job.

        Raises:
            ConfigError: there is none, or it cannot be used.
        """
        try:
            mapping = json.loads(self.config.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(guidance.no_run(self.path)) from None
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {reason(error)}") from None
        except ValueError as error:
            raise ConfigError(f"{self.config} cannot be read: {error}") from None
        if not isinstance(mapping, dict):
            raise ConfigError(f"{self.config} holds a {type(mapping).__name__}, not a job")
        if "architectures" in mapping:
            raise ConfigError(guidance.export_is_no_run(self.path))
        return validate(JobConfig, mapping)

    def write_job(self, job: JobConfig) -> None:
        """Write the resolved job, whole or not at all.

        Raises:
            StorageError: the folder cannot be written.
        """
        make_directory(self.path)
        write_atomic(self.config, (job.model_dump_json(indent=2) + "\n").encode())

    def members(self) -> list[dict[str, Any]]:
        """Who serves, as the coordinator last wrote it; empty before it has."""
        try:
            found = json.loads(self.cluster.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [member for member in found if isinstance(member, dict)] if isinstance(found, list) else []

    def try_lock(self) -> int | None:
        """Take the folder for one launcher; None while another one, or a role of it, has it.

        The launcher hands the descriptor to its roles: the folder is free again when all of them are
        gone, not when the launcher is. Closing the descriptor gives it back.

        Raises:
            StartupError: the folder cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StartupError(f"the run folder {self.path} cannot be written: {reason(error)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def is_held(self) -> bool:
        """Whether a launcher or a role of it has the folder, on this host."""
        return _is_locked(self._lock)

    def journal_is_held(self) -> bool:
        """Whether a coordinator on this host, however it was started, has the journal."""
        return _is_locked(self.journal / "lock")

    def refuse_in_use(self) -> None:
        """See that no launcher has the folder, before anything is said about a run that is still under way.

        The roles of a launcher that was killed do not count: they end by themselves, and the next one waits for that.

        Raises:
            StartupError: a launcher has it.
        """
        holder = self.holder()
        if self.is_held() and holder.isdigit() and _lives(int(holder)):
            raise StartupError(
                f"the run folder {self.path} is in use by the launcher with pid {holder}; end that run first"
            )

    def holder(self) -> str:
        """The pid of the launcher that took the folder last, for messages."""
        try:
            return self._lock.read_text(encoding="utf-8").strip() or "unknown"
        except OSError:
            return "unknown"

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"


def _is_locked(file: Path) -> bool:
    try:
        lock = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def find_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run folder, or `path` if it is a checkpoint itself.

    Raises:
        CheckpointNotFound: there is none.
        ConfigError: `path` is no run folder either.
        StorageError: a folder cannot be read.
    """
    if is_complete(path):
        return path
    job = RunFolder(path).read_job().model_copy(update={"run_dir": path})
    found = newest(job.checkpoint_dir)
    if found is None:
        raise CheckpointNotFound(f"{path} has no complete checkpoint yet (looked in {job.checkpoint_dir})")
    return found


def from_newest(path: Path, use: Callable[[Path], Used]) -> Used:
    """Use a checkpoint as `find_checkpoint` finds it; where a running job removes it meanwhile, the next one.

    Raises:
        CheckpointNotFound, ConfigError: as `find_checkpoint`.
        PsError: as `use`, of a checkpoint that is still there; of a damaged one with the one before it.
    """
    while True:
        folder = find_checkpoint(path)
        try:
            return use(folder)
        except PsError as error:
            # Retention takes the manifest first. A newer one is complete by then, so this comes to an end.
            if folder != path and not is_complete(folder):
                continue
            before = [other for other in checkpoints(folder.parent) if folder != path and other < folder]
            if not isinstance(error, CheckpointDamaged) or not before:
                raise
            raise CheckpointDamaged(f"{error.message}; the one before it is {before[-1]}") from error
