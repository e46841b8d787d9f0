"""The commands of a job's roles, for people: to paste into shells, unit files or other hosts."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from ps.errors import ConfigError, StartupError
from workers.config import JobConfig

#: Gives each listener of a cluster its port.
NextPort = Callable[[], int]
LAST_PORT = 65_535


def program() -> list[str]:
    """How windlass was called, so that it can be called from another shell and folder."""
    called = Path(sys.argv[0])
    if called.name == "windlass":
        return [str(called.absolute())]
    return [sys.executable, "-P", "-m", "workers.cli.main"]


def role_commands(
    job: JobConfig,
    arguments: Sequence[str],
    first_port: int | None = None,
) -> list[str]:
    """Return the command lines of a cluster, quoted for a shell, the coordinator's first.

    Args:
        job: the resolved job.
        arguments: the job file and overrides that it was resolved from.
        first_port: the first of consecutive ports; None: ports that are free on this host now.

    Raises:
        ConfigError: there are not so many ports after `first_port`.
        StartupError: `launch.host` is not an address of this host, so that no free port can be found on it.
    """
    host = job.launch.host
    count = _listeners(job)
    if first_port is None:
        numbers = _free_ports(host, count)
    elif first_port + count - 1 > LAST_PORT:
        raise ConfigError(
            f"--first-port={first_port}: this cluster has {count} listeners, and the last port is {LAST_PORT}; "
            f"choose at most {LAST_PORT - count + 1}"
        )
    else:
        numbers = list(range(first_port, first_port + count))
    ports = iter(numbers)
    told = socket.gethostname() if host in ("0.0.0.0", "[::]") else host
    lines = []
    for words in _roles(job, arguments, told, lambda: next(ports)):
        lines.append(shlex.join([*program(), *words]))
    return lines


def _roles(job: JobConfig, arguments: Sequence[str], told: str, port: NextPort) -> Iterator[list[str]]:
    coordinator = port()
    # The run folder's default is named after the time, which has to be the same for all.
    named = [] if any(text.startswith("run_dir=") for text in arguments) else [f"run_dir={job.run_dir.absolute()}"]
    yield ["coordinator", *arguments, *named, *_listen(job, coordinator, port)]
    security = job.security
    to = ["--coordinator", f"{told}:{coordinator}"]
    to += ["--certificates", str(security.certificates)] if security.certificates else []
    to += ["--insecure"] if security.insecure else []
    for index in range(job.cluster.shards):
        for _ in range(1 + job.cluster.standbys):
            yield ["shard", *to, "--index", str(index), *_listen(job, port(), port)]
    for _ in range(job.cluster.workers):
        yield ["worker", *to, *_listen(job, port(), port)]


def _listen(job: JobConfig, port: int, next_port: NextPort) -> list[str]:
    flags = ["--listen", f"{job.launch.host}:{port}"]
    if job.telemetry.metrics:
        flags += ["--metrics-listen", f"{job.telemetry.metrics_host}:{next_port()}"]
    return flags


def _listeners(job: JobConfig) -> int:
    roles = 1 + job.cluster.shards * (1 + job.cluster.standbys) + job.cluster.workers
    return 2 * roles if job.telemetry.metrics else roles


def _free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody has at this moment, all held at once so that they differ."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            held = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            try:
                held.bind((host.strip("[]"), 0))
            except OSError as error:
                raise StartupError(
                    f"launch.host={host}: {error.strerror or error}; name an address of this host, or give --first-port"
                ) from None
            ports.append(int(held.getsockname()[1]))
        return ports
