"""`windlass coordinator`, `shard`, `worker`: one role each, by hand or under the launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ps import failpoints
from ps.config import RunConfig, from_json
from ps.errors import ConfigError
from ps.lifeline import Lifeline
from ps.telemetry import logs
from ps.types import Role
from ps.wire.security import load_security, refuse_exposure
from workers.cli.arguments import Certificates, Device, Job, Level, require_worker_extra
from workers.config import JobConfig
from workers.launch import environment, gpus, jobs
from workers.launch.folder import RunFolder

log = logging.getLogger(__name__)

Coordinator = Annotated[
    str, typer.Option(envvar="WINDLASS_COORDINATOR", metavar="HOST:PORT", help="Where the coordinator is.")
]
Listen = Annotated[
    str,
    typer.Option(envvar="WINDLASS_LISTEN", metavar="HOST:PORT", help="Where to serve; port 0: any free one."),
]
MetricsListen = Annotated[
    str | None,
    typer.Option(
        envvar="WINDLASS_METRICS_LISTEN",
        metavar="HOST:PORT",
        help="Where to serve Prometheus metrics; port 0: any free one. Default: nowhere.",
    ),
]
Advertise = Annotated[
    str | None,
    typer.Option(
        envvar="WINDLASS_ADVERTISE",
        metavar="HOST",
        help="The host that others are told. Default: that of --listen, or this host's name if it listens everywhere.",
    ),
]
LogLevel = Annotated[
    Level | None,
    typer.Option(envvar="WINDLASS_LOG_LEVEL", help="How much is logged. Default: info."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", envvar="WINDLASS_INSECURE", help="Serve other hosts without certificates."),
]


def coordinator(
    job: Job = None,
    listen: Listen = "127.0.0.1:0",
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            envvar="WINDLASS_METRICS_LISTEN",
            metavar="HOST:PORT",
            help="Where to serve Prometheus metrics; port 0: any free one. Default: as the job says.",
        ),
    ] = None,
    advertise: Advertise = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", envvar="WINDLASS_RESUME", help="The run folder's job may be replaced by this one."),
    ] = False,
    linger: Annotated[
        float,
        typer.Option(
            envvar="WINDLASS_LINGER",
            metavar="SECONDS",
            min=0,
            help="Stay so long after the end of the run: a role that is only starting then hears of it, and ends too.",
        ),
    ] = 0.0,
    certificates: Certificates = None,
    insecure: Insecure = False,
    log_level: LogLevel = None,
) -> int:
    """Start the coordinator, which decides.

    It keeps membership, the step clock and the journal of decisions.
    """
    resolved = jobs.resolve(*jobs.given(job or (), os.environ))
    _check_address("--listen", listen)
    _check_address("--metrics-listen", metrics_listen)
    _check_host("--advertise", advertise)
    _begin(Role.COORDINATOR, None, log_level or Level(resolved.launch.log_level))
    for doubt in resolved.doubts:
        log.warning("%s", doubt)
    wanted = resolved.security
    security = load_security(certificates or wanted.certificates, insecure or wanted.insecure, Role.COORDINATOR)
    # Before the job is written: with another one, the folder would hold another run.
    refuse_exposure(listen, security)
    text = _settle(resolved, resume).model_dump_json()

    from ps.coordinator import app

    return _end(app.run(from_json(RunConfig, text), text, listen, security, metrics_listen, advertise, linger))


def shard(
    coordinator: Coordinator,
    index: Annotated[int, typer.Option(envvar="WINDLASS_INDEX", min=0, help="Which shard: 0..S-1.")],
    listen: Listen = "127.0.0.1:0",
    metrics_listen: MetricsListen = None,
    advertise: Advertise = None,
    certificates: Certificates = None,
    insecure: Insecure = False,
    log_level: LogLevel = None,
) -> int:
    """Start a shard, which keeps weights.

    It holds a part of the master weights and of the optimizer's state, and updates them.
    """
    _check_address("--coordinator", coordinator)
    _check_address("--listen", listen)
    _check_address("--metrics-listen", metrics_listen)
    _check_host("--advertise", advertise)
    _begin(Role.SHARD, index, log_level)
    security = load_security(certificates, insecure, Role.SHARD)

    from ps.shard import app

    return _end(app.run(coordinator, index, listen, metrics_listen, security, advertise))


def worker(
    coordinator: Coordinator,
    rank: Annotated[
        int | None,
        typer.Option(
            envvar="WINDLASS_RANK", min=0, help="Its number: a worker that has it is replaced. Default: a free one."
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(envvar="WINDLASS_DEVICE", help="Where to compute. Default: as the job says."),
    ] = None,
    gpu_locks: Annotated[
        Path | None,
        typer.Option(
            envvar="WINDLASS_GPU_LOCKS",
            metavar="DIR",
            help="Take a GPU that no other worker with this folder has taken. Default: the first one.",
        ),
    ] = None,
    listen: Listen = "127.0.0.1:0",
    metrics_listen: MetricsListen = None,
    advertise: Advertise = None,
    certificates: Certificates = None,
    insecure: Insecure = False,
    log_level: LogLevel = None,
) -> int:
    """Start a worker, which computes gradients."""
    _check_address("--coordinator", coordinator)
    _check_address("--listen", listen)
    _check_address("--metrics-listen", metrics_listen)
    _check_host("--advertise", advertise)
    require_worker_extra("a worker")
    _begin(Role.WORKER, rank, log_level)
    security = load_security(certificates, insecure, Role.WORKER)
    if gpu_locks is not None:
        os.environ[gpus.VISIBLE] = gpus.claim(gpus.visible_gpus(os.environ), gpu_locks)

    from workers.engine import app

    return _end(app.run(coordinator, rank, device, listen, metrics_listen, security, advertise))


def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the role listens.")],
    certificates: Certificates = None,
) -> int:
    """Ask a role whether it serves: exit code 0 if it does."""
    _check_address("HOST:PORT", address)

    from ps.wire import probe

    probe.check(address, certificates)
    print(f"{address} serves")
    return 0


def _begin(role: Role, rank: int | None, log_level: Level | None) -> None:
    """What every role does first: its environment, its log, its tie to the launcher."""
    environment.enter(role)
    logs.configure(role.value, rank, log_level or Level.INFO)
    failpoints.enter(role.value if rank is None else f"{role.value}-{rank}")
    lifeline = Lifeline.from_environment()
    if lifeline is not None:
        lifeline.watch(_launcher_gone)


def _end(code: int) -> int:
    """Leave at once: a role closes what it opened, and taking torch and grpc apart takes a second and more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launcher_gone() -> None:
    log.warning("the launcher is gone; ending")
    os.kill(os.getpid(), signal.SIGTERM)


def _check_address(flag: str, address: str | None) -> None:
    if address is None:
        return
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{flag}={address}: not HOST:PORT with a port of 0 to 65535")


def _check_host(flag: str, host: str | None) -> None:
    if host is not None and (not host or "/" in host or (":" in host and not host.endswith("]"))):
        raise ConfigError(f"{flag}={host}: not a host's name or address; the port is that of --listen")


def _settle(job: JobConfig, resume: bool) -> JobConfig:
    """Write the job into the run folder, or see that it is the one that is there; returns the job of the run."""
    folder = RunFolder(Path(job.run_dir))
    if folder.holds_run():
        previous = folder.read_job()
        if resume:
            # Left out, C follows from the number of workers, which may change; the run's C may not.
            batch = job.batch.model_copy(update={"contributions_per_step": previous.contributions})
            job = job.model_copy(update={"batch": batch})
            jobs.check_same_run(previous, job, folder.path)
        found = jobs.differences(previous, job)
        if not found:
            return job
        if not resume:
            raise ConfigError(
                f"run_dir={folder.path} holds a run with another job ({found[0]}); start it with the same "
                f"job, with --resume to replace the job, or choose another folder with run_dir=..."
            )
    folder.write_job(job)
    return job
