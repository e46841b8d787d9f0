"""A process of the cluster: how it is started, how its end is seen, what its log says about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ps.types import Role
from workers.config import JobConfig
from workers.launch.supervisor import Member

#: How a role says, in its log, why it ends; written by `workers.cli.main`.
ERROR_PREFIX = "windlass: error: "
#: So much of the end of a log is searched for last words, in bytes.
LOG_TAIL_BYTES = 65_536


def windlass(*arguments: str) -> list[str]:
    """The command line of windlass in this environment; -P, or a file in the folder could hide a module."""
    return [sys.executable, "-P", "-m", "workers.cli.main", *arguments]


@dataclass(frozen=True)
class RoleCommands:
    """The commands that start the roles of a job.

    Args:
        job: the resolved job.
        config: the file that holds it.
        resume: whether the run goes on.
    """

    job: JobConfig
    config: Path
    resume: bool = False

    def __call__(self, member: Member, coordinator: str | None) -> list[str]:
        """Return a role's command line, given the coordinator's HOST:PORT; None: it has no port yet."""
        listen = f"{self.job.launch.host}:0"
        security = self._security()
        if member.role is Role.COORDINATOR:
            resume = ["--resume"] if self.resume else []
            return windlass("coordinator", str(self.config), "--listen", coordinator or listen, *resume, *security)
        if coordinator is None:
            raise ValueError(f"{member} cannot start before the coordinator's address is known")
        flags = ["--coordinator", coordinator, *security]
        if self.job.telemetry.metrics:
            flags += ["--metrics-listen", f"{self.job.telemetry.metrics_host}:0"]
        if member.role in (Role.SHARD, Role.STANDBY):
            return windlass("shard", *flags, "--index", str(member.rank), "--listen", listen)
        return windlass("worker", *flags, "--rank", str(member.rank), "--listen", listen)

    def _security(self) -> list[str]:
        """The job's; what it leaves out the roles find in the environment, as the launcher does."""
        security = self.job.security
        flags = ["--certificates", str(security.certificates)] if security.certificates else []
        return [*flags, "--insecure"] if security.insecure else flags


@dataclass
class LoggedProcess:
    """A process in a session of its own, so that Ctrl-C does not reach it, and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    #: Where this process's part of the log begins.
    log_start: int

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        descriptors: Sequence[int],
    ) -> LoggedProcess:
        """Start it.

        Args:
            command: its command line.
            environment: all of its environment.
            log: takes its output, after what is there.
            descriptors: what it inherits besides standard output and error.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=tuple(descriptors),
                start_new_session=True,
            )
            return cls(process, log, log_start)

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, once the process has ended; then nothing that it started is left either."""
        if self.process.returncode is not None:
            return self.process.returncode
        # Seen but not yet reaped: the group's number cannot belong to anybody else.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self._kill_group()
        return self.process.wait()

    def send(self, signum: signal.Signals) -> None:
        """Send a signal, unless the process has been reaped."""
        if self.process.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """End the process and what it started, and wait for it."""
        if self.process.returncode is None:
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def last_words(self) -> tuple[str | None, str]:
        """Why it ended, as `last_words` finds it in its part of the log."""
        return last_words(read_tail(self.log, self.log_start))


class LogLines:
    """Reads the lines that are added to a log, from `start` on."""

    def __init__(self, log: Path, start: int) -> None:
        self._log = log
        self._offset = start

    def poll(self) -> list[str]:
        """The lines that were completed since the last time."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


def errors_in(lines: Sequence[str]) -> list[str]:
    """The messages of a log's records of errors; lines that are no records are left out."""
    return [said for level, said in map(_parse, lines) if level in ("error", "critical")]


def read_tail(log: Path, start: int) -> str:
    """The end of a log, from `start` on."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_words(text: str) -> tuple[str | None, str]:
    """Find why a process ended: its one line of error, and the last line that tells something.

    Returns:
        The error without its prefix (None: there is no such line), and that line, or the last error
        in the log, or the last line of a traceback, or the last message.
    """
    failure = message = ""
    for line in text.splitlines():
        if line.startswith(ERROR_PREFIX):
            error = line.removeprefix(ERROR_PREFIX)
            return error, error
        level, said = _parse(line)
        if level in ("error", "critical", "plain"):
            failure = said or failure
        else:
            message = said or message
    return None, failure or message


def _parse(line: str) -> tuple[str, str]:
    """(level, message) of a line of a log; a line that is not a record is `plain`."""
    try:
        record = json.loads(line)
        level, said = str(record["level"]), str(record["message"])
        trace = str(record.get("exception", "")).strip()
        return level, f"{said}: {trace.splitlines()[-1]}" if trace else said
    except (ValueError, TypeError, KeyError):
        return "plain", line.strip()
