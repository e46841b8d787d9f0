"""`windlass train`, `resume` and `prepare`: a whole cluster on this host."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import ConfigError
from ps.lifeline import Lifeline
from ps.storage.layout import checkpoints
from ps.wire.security import CLIENT, PROCESSES, Security, load_security, refuse_exposure
from workers.cli import report
from workers.cli.arguments import Job, Overrides, Run, require_worker_extra
from workers.config import JobConfig
from workers.launch import jobs
from workers.launch.by_hand import LAST_PORT, role_commands
from workers.launch.device_check import refuse_missing_device
from workers.launch.folder import RunFolder
from workers.launch.launcher import Launcher, refuse_run
from workers.launch.processes import ERROR_PREFIX, RoleCommands, windlass
from workers.launch.progress import choose_display


def train(
    job: Job = None,
    print_commands: Annotated[
        bool,
        typer.Option("--print-commands", help="Print the command of each role, to start them by hand, and end."),
    ] = False,
    first_port: Annotated[
        int | None,
        typer.Option(min=1, max=LAST_PORT, help="With --print-commands: use ports from here on. Default: free ones."),
    ] = None,
) -> int:
    """Train on this host, with all the roles.

    Starts a coordinator, shards and workers, restarts what dies, and shows how it goes.
    """
    job_file, overrides = jobs.given(job or (), os.environ)
    resolved = jobs.resolve(job_file, overrides)
    if print_commands:
        arguments = [*([str(job_file.absolute())] if job_file else []), *overrides]
        print("\n".join(role_commands(resolved, arguments, first_port)))
        return 0
    if first_port is not None:
        raise ConfigError(f"--first-port={first_port} goes with --print-commands; a launcher takes free ports")
    _refuse_what_validate_refuses(resolved)
    return _launch(resolved, resume=False)


def resume(run: Run, overrides: Overrides = None) -> int:
    """Go on with a run."""
    if run.is_file():
        raise ConfigError(f"{run} is a file; resume takes a run folder")
    folder = RunFolder(run)
    resolved = jobs.resume(folder.read_job(), run, overrides or ())
    folder.refuse_in_use()
    complete = report.completion(folder, resolved)
    if complete:
        print(complete)
        return 0
    return _launch(resolved, resume=True)


def prepare(job: Job = None) -> int:
    """Tokenize the text of a job, ahead of training."""
    require_worker_extra("tokenizing text")
    # The launcher's child: it has nothing to save, so it just ends.
    lifeline = Lifeline.from_environment()
    if lifeline is not None:
        lifeline.watch(lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = jobs.resolve(*jobs.given(job or (), os.environ)).data

    from workers.data.prepare import prepare as prepare_data

    data = prepare_data(config, lambda line: print(f"data: {line}", flush=True))
    print(
        f"data: {data.train_tokens:,} tokens to train on, {data.validation_tokens:,} held out "
        f"({data.validation_bytes:,} bytes), {data.vocab_size:,} vocabulary entries; kept in {data.folder}"
    )
    return 0


def _refuse_what_validate_refuses(job: JobConfig) -> None:
    """See that the run can start, before its folder is made: a start that failed leaves nothing behind.

    Raises:
        ConfigError, DataError, StorageError: it cannot.
    """
    from workers.data.source import collect

    refuse_run(RunFolder(job.run_dir))
    collect(job.data.paths)
    checkpoints(job.checkpoint_dir)


def _launch(job: JobConfig, resume: bool) -> int:
    require_worker_extra("training")
    logging.getLogger("workers").addHandler(logging.NullHandler())
    refuse_missing_device(job.worker.device)
    security = _security(job)
    report.print_doubts(job)
    folder = RunFolder(job.run_dir)
    display = choose_display(sys.stdout, job.launch.progress_every_steps, str(folder.path), security)
    command = RoleCommands(job, folder.config, resume)
    launcher = Launcher(job, folder, command, windlass("prepare", str(folder.config)), display)
    started = time.monotonic()
    end = launcher.run(fresh=not resume)
    if end.error is not None:
        print(f"{ERROR_PREFIX}{end.error} (logs: {folder.logs})", file=sys.stderr)
    added = launcher.added()
    # Who asked it to stop after its last step was too late for that.
    if end.finished or (end.error is None and report.is_at_end(job, added.checkpoint)):
        report.print_result(folder, job, time.monotonic() - started)
        return 0
    if folder.holds_run():
        report.print_unfinished(folder, job, end, added)
    return end.exit_code


def _security(job: JobConfig) -> Security:
    """See that the roles will not be refused their certificates or their address, before the folder holds a run.

    Returns:
        What the launcher itself asks the coordinator with.

    Raises:
        StartupError: they would be.
    """
    given = job.security.certificates or os.environ.get("WINDLASS_CERTIFICATES")
    insecure = job.security.insecure or "WINDLASS_INSECURE" in os.environ
    for role in PROCESSES:
        security = load_security(Path(given) if given else None, insecure, role)
        refuse_exposure(f"{job.launch.host}:0", security)
    return load_security(Path(given) if given else None, insecure, CLIENT)
