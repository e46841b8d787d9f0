"""A real cluster on this host for a `with` block: processes that are all gone at its end, however it ends.

The launcher runs in a thread of this process, so its roles also end when this process is killed.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ps.errors import ConfigError, PsError, StartupError, WaitTimeout
from ps.types import Role
from workers.config import JobConfig
from workers.launch import jobs
from workers.launch.folder import RunFolder
from workers.launch.launcher import Launcher
from workers.launch.processes import RoleCommands, read_tail, windlass
from workers.launch.progress import LineDisplay
from workers.launch.signals import Requests
from workers.launch.supervisor import COORDINATOR, Action, End, Member, Supervisor

log = logging.getLogger(__name__)

#: How often a wait looks.
_LOOK_S = 0.05
#: A role that is killed is gone within this.
_GONE_S = 30.0
#: The launcher hears nothing while it starts a process or reads a file.
_ASK_AGAIN_S = 5.0


class LocalCluster:
    """Coordinator, shards and, if asked for, built-in workers, each a process of its own on free ports.

    Args:
        *overrides: the job, as on the command line: `"training.steps=20"`, `"precision.wire=fp32"`.
        shards: S.
        workers: built-in workers, which train the job's GPT and need torch. 0: yours come with `windlass.Client`.
        run_dir: the run folder, which must hold no run. None: a temporary one, removed at the end.
        start_timeout_s: how long entering may take.

    Concurrency: one thread; the processes are watched by another one.
    """

    def __init__(
        self,
        *overrides: str,
        shards: int = 1,
        workers: int = 0,
        run_dir: Path | str | None = None,
        start_timeout_s: float = 90.0,
    ) -> None:
        self._is_temporary = run_dir is None
        run_dir = run_dir or Path(tempfile.gettempdir(), f"windlass-{secrets.token_hex(8)}")
        placed = [f"run_dir={Path(run_dir).absolute()}", f"cluster.shards={shards}", "telemetry.metrics=false"]
        if workers:
            placed.append(f"cluster.workers={workers}")
        self.job: JobConfig = jobs.resolve(None, [*placed, *overrides])
        self._folder = RunFolder(Path(self.job.run_dir))
        self._members = [COORDINATOR]
        self._members += [Member(Role.SHARD, index) for index in range(self.job.cluster.shards)]
        if self.job.cluster.standbys:
            self._members += [Member(Role.STANDBY, index) for index in range(self.job.cluster.shards)]
        self._members += [Member(Role.WORKER, rank) for rank in range(workers)]
        self._start_timeout_s = start_timeout_s
        self._requests: Requests | None = None
        self._commands = _Counted(RoleCommands(self.job, self._folder.config))
        self._workers = workers
        self._launcher: Launcher | None = None
        self._kills: Counter[Member] = Counter()
        self._away: set[Member] = set()
        self._ended = threading.Event()
        self._end: End | None = None
        self._failure: PsError | None = None

    # -- Its life -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Start the processes and wait until everybody has registered.

        Raises:
            StartupError: a role could not start; its log is printed.
            WaitTimeout: it took too long; says who is missing.
        """
        self._requests = requests = Requests()
        self._thread = threading.Thread(target=self._run, args=[requests], name="local cluster", daemon=True)
        self._thread.start()
        try:
            self.wait_until_complete(self._start_timeout_s)
        except BaseException:
            self._print_logs()
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process; on a failure, print the ends of all logs.

        Raises:
            PsError: nothing else was raised, and the run failed.
        """
        failure = self._failed() if self._ended.is_set() else None
        if kind is not None or failure is not None or self._died():
            self._print_logs()
        self.close()
        if kind is None and failure is not None:
            raise failure

    def close(self) -> None:
        """Kill what is left, and wait for it. Idempotent."""
        if self._requests is None:
            return
        while self._thread.is_alive():
            # The first asks for a checkpoint, the second does not wait for it.
            self._requests.ask(signal.SIGTERM)
            self._requests.ask(signal.SIGTERM)
            self._thread.join(_ASK_AGAIN_S)
        self._requests.close()
        if self._is_temporary:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _run(self, requests: Requests) -> None:
        """The thread's work: what `windlass train` does, without a terminal and without signals."""
        try:
            self._folder.logs.mkdir(parents=True, exist_ok=True)
            prepare = windlass("prepare", str(self._folder.config)) if self._workers else None
            with self._folder.log("launcher").open("w") as lines:
                display = LineDisplay(lines, self.job.launch.progress_every_steps)
                self._launcher = Launcher(
                    self.job, self._folder, self._commands, prepare, display, lambda: requests, self._workers
                )
                self._end = self._launcher.run(fresh=True)
        except PsError as failure:
            self._failure = failure
        except Exception as failure:
            log.exception("the cluster's thread failed")
            self._failure = StartupError(f"the cluster in {self.run_dir} failed: {failure}")
        finally:
            self._ended.set()

    # -- What tests look at ---------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """The run folder: metrics.jsonl, logs/, checkpoints/."""
        return self._folder.path

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator, the same for all its lives."""
        for member in self._folder.members():
            if member.get("role") == Role.COORDINATOR.value:
                return str(member["address"])
        raise StartupError(f"the coordinator of {self.run_dir} is not there yet; enter the cluster first")

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by name: `coordinator-0`, `shard-1`, `worker-0`."""
        launcher = self._launcher
        return {str(member): pid for member, pid in launcher.pids().items()} if launcher is not None else {}

    def logs(self) -> str:
        """The end of every role's log."""
        texts = [f"--- {log.name}\n{read_tail(log, 0)}" for log in sorted(self._folder.logs.glob("*.log"))]
        return "\n".join(texts)

    # -- What tests do --------------------------------------------------------------------------

    def kill(self, role: str, index: int = 0, restart: bool = True) -> int:
        """Kill a process with SIGKILL and wait until it is gone; returns its pid.

        Args:
            role: "coordinator", "shard", "standby" (the second process of a shard, whichever of the two serves) or
                "worker".
            index: which shard or worker.
            restart: start it again at once, as `windlass train` does. False: `start` does that.

        Raises:
            ConfigError: there is no such role in this cluster.
            WaitTimeout: it does not run, or does not die.
        """
        member = self._member(role, index)
        self._await(lambda: str(member) in self.pids, _GONE_S, f"{member} to run")
        pid = self.pids[str(member)]
        self._kills[member] += 1
        if not restart:
            self._away.add(member)
        # No death in the supervisor's eyes: it does not count towards launch.restart_limit.
        self._change(lambda supervisor: supervisor.dismiss(member))
        self._await(lambda: self.pids.get(str(member)) != pid, _GONE_S, f"{member} to die")
        if restart:
            self._change(lambda supervisor: supervisor.recall(time.monotonic(), member))
        return pid

    def start(self, role: str, index: int = 0) -> None:
        """Start again what `kill(..., restart=False)` killed; returns at once.

        Raises:
            ConfigError: it was not killed so.
        """
        member = self._member(role, index)
        if member not in self._away:
            raise ConfigError(f"{member} was not killed with restart=False")
        self._away.remove(member)
        self._change(lambda supervisor: supervisor.recall(time.monotonic(), member))

    def wait_until_complete(self, timeout_s: float = 90.0) -> None:
        """Wait until every process that should run has registered with the coordinator.

        Raises:
            WaitTimeout: says who is missing.
            StartupError: the cluster ended instead.
        """
        self._await(lambda: not self._missing(), timeout_s, lambda: f"{', '.join(map(str, self._missing()))}")

    def wait(self, timeout_s: float = 600.0) -> None:
        """Wait until the run is over and every process has ended.

        Raises:
            WaitTimeout: it is not over in time.
            PsError: the run failed.
        """
        if not self._ended.wait(timeout_s):
            raise WaitTimeout(f"waited {timeout_s:g} s for the run in {self.run_dir} to end; its logs say why")
        failure = self._failed()
        if failure is not None:
            raise failure

    # -- Inside ---------------------------------------------------------------------------------

    def _member(self, role: str, index: int) -> Member:
        found = [member for member in self._members if (member.role.value, member.rank) == (role, index)]
        if not found:
            raise ConfigError(f"{role} {index} is not in this cluster: {', '.join(map(str, self._members))}")
        return found[0]

    def _change(self, change: Callable[[Supervisor], Sequence[Action]]) -> None:
        assert self._launcher is not None, "it was entered"
        assert self._requests is not None, "it was entered"
        self._launcher.change(change)
        self._requests.ask(signal.SIGCHLD)

    def _missing(self) -> list[Member]:
        running = self.pids
        listed = {member.get("pid") for member in self._folder.members()}
        expected = [member for member in self._members if member not in self._away]
        return [member for member in expected if running.get(str(member)) not in listed]

    def _await(self, reached: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self._ended.wait(_LOOK_S):
                raise self._failed() or StartupError(f"the run in {self.run_dir} is over; training.steps is how long")
            if time.monotonic() >= deadline:
                named = what if isinstance(what, str) else what()
                raise WaitTimeout(f"waited {timeout_s:g} s for {named}; see the logs in {self._folder.logs}")

    def _failed(self) -> PsError | None:
        if self._failure is None and self._end is not None and self._end.error is not None:
            return StartupError(self._end.error)
        return self._failure

    def _died(self) -> bool:
        """Whether a role was started more often than `kill` explains."""
        return any(starts - 1 > self._kills[member] for member, starts in self._commands.starts.items())

    def _print_logs(self) -> None:
        sys.stderr.write(f"\nthe cluster in {self.run_dir}:\n{self.logs()}\n")


class _Counted:
    """The commands of the roles, and how often each was started."""

    def __init__(self, commands: RoleCommands) -> None:
        self._commands = commands
        self.starts: Counter[Member] = Counter()

    def __call__(self, member: Member, coordinator: str | None) -> list[str]:
        self.starts[member] += 1
        return self._commands(member, coordinator)
