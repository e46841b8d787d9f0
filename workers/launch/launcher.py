"""The edge of the supervisor: it starts processes, waits for what happens, and carries out the actions."""

from __future__ import annotations

import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ps import failpoints
from ps.errors import ConfigError, StartupError, StorageError
from ps.lifeline import ENVIRONMENT as LIFELINE
from ps.storage.files import remove_tree
from workers.config import JobConfig
from workers.launch.added import Added, Stamp, last_written, stamps
from workers.launch.environment import ROLE_FLAGS, on_glibc, role_environment
from workers.launch.folder import RunFolder
from workers.launch.metrics import Progress, Tail
from workers.launch.processes import ERROR_PREFIX, LoggedProcess, LogLines, errors_in
from workers.launch.progress import Display
from workers.launch.signals import Signals
from workers.launch.supervisor import COORDINATOR, Action, End, Exit, Member, Say, Signal, Start, Supervisor

#: A child's end and a signal wake the loop at once; this is for files: the metrics and cluster.json.
TICK_S = 0.1
#: The roles of a launcher that was killed are gone after this.
ORPHANS_END_S = 8.0

#: The command line of a role, given the coordinator's address (None: it has none yet).
RoleCommand = Callable[[Member, str | None], Sequence[str]]
#: What another thread has the launcher's do with its supervisor.
Change = Callable[[Supervisor], Sequence[Action]]


class Launcher:
    """Runs one job's cluster on this host, from its start to its end.

    Args:
        job: the resolved job; its run folder holds it already when the roles start.
        folder: the run folder.
        command: how each role is started.
        prepare: a command that prepares the data and prints what it does. None: nothing to prepare.
        display: where to say what happens.
        signals: what asks it to stop; `Requests` where the launcher is not the main thread.
        workers: how many are started; None: `cluster.workers`.
    """

    def __init__(
        self,
        job: JobConfig,
        folder: RunFolder,
        command: RoleCommand,
        prepare: Sequence[str] | None,
        display: Display,
        signals: Callable[[], Signals] = Signals,
        workers: int | None = None,
    ) -> None:
        self._job = job
        self._folder = folder
        self._command = command
        self._prepare_command = prepare
        self._display = display
        self._signals = signals
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._supervisor = Supervisor(
            job.cluster.shards,
            job.cluster.workers if workers is None else workers,
            job.launch.restart_limit,
            job.membership.start_timeout_s,
            job.checkpoint.timeout_s,
            standbys=job.cluster.standbys,
        )
        self._processes: dict[Member, LoggedProcess] = {}
        self._listed: set[int] = set()
        self._address: str | None = None
        self._inherited: tuple[int, ...] = ()
        self._environment: dict[str, str] = {}
        #: How many processes were started in each place: what goes wrong on purpose does so in one of them.
        self._lives: Counter[Member] = Counter()
        self._end: End | None = None
        #: What the run was like when this launcher took its folder, and how it has gone on.
        self._checkpoints: dict[Path, Stamp] = {}
        self._progress = Progress(job.training.end)
        self._trained = False
        #: The coordinator's log, of all its lives.
        self._coordinator_log: LogLines | None = None

    def run(self, fresh: bool) -> End:
        """Run the cluster; no process of it is left when this returns, or when this process is killed.

        Args:
            fresh: the folder must not hold a run yet.

        Raises:
            ConfigError: it does.
            StartupError, StorageError: the run folder cannot be used.
        """
        if fresh:
            refuse_run(self._folder)
        with ExitStack() as stack:
            signals = stack.enter_context(self._signals())
            lock = self._lock(signals)
            stack.callback(os.close, lock)
            if fresh:
                refuse_run(self._folder)
                stack.callback(self._take_back, journal_was_there=self._folder.journal.exists())
            self._checkpoints = stamps(self._job.checkpoint_dir)
            self._folder.write_job(self._job)
            # Of a former life: in a container a new process may well have the pid of an old one.
            self._folder.cluster.unlink(missing_ok=True)
            # The write end stays here, closed at exec: the roles see its end when this process is gone.
            lifeline, held = os.pipe()
            stack.callback(os.close, lifeline)
            stack.callback(os.close, held)
            self._inherited = (lifeline, lock)
            self._environment = {
                **{name: value for name, value in os.environ.items() if name not in ROLE_FLAGS},
                LIFELINE: str(lifeline),
                "WINDLASS_LOG_LEVEL": os.environ.get("WINDLASS_LOG_LEVEL", self._job.launch.log_level),
            }
            stopped = self._prepare(signals)
            if stopped is None:
                stack.callback(self._kill_all)
                return self._supervise(signals)
            return stopped

    def added(self) -> Added:
        """What this start has added to the run; for when `run` is over."""
        checkpoint = last_written(self._job.checkpoint_dir, self._checkpoints)
        return Added(checkpoint, self._trained, self._progress.version)

    def change(self, change: Change) -> None:
        """Have the launcher's thread call `change` and carry out what it returns; from any thread."""
        self._changes.put(change)

    def pids(self) -> dict[Member, int]:
        """The processes that were started and have not ended; from any thread."""
        return {member: process.pid for member, process in self._processes.copy().items()}

    def _lock(self, signals: Signals) -> int:
        lock = self._folder.try_lock()
        if lock is not None:
            return lock
        self._display.say(f"{self._folder.path} is in use; waiting for up to {ORPHANS_END_S:g} s")
        deadline = time.monotonic() + ORPHANS_END_S
        while time.monotonic() < deadline and not signals.wait(TICK_S):
            lock = self._folder.try_lock()
            if lock is not None:
                return lock
        raise StartupError(
            f"the run folder {self._folder.path} is in use by the launcher with pid {self._folder.holder()} "
            f"or by its roles; end that run first"
        )

    def _take_back(self, journal_was_there: bool) -> None:
        """Leave the folder to the next `train`, if no run has come about: else it would be refused for its config.json.

        The journal holds the number of contributions and the model of this job, and the next one may have others.
        """
        if not self.added().nothing or self._folder.journal_is_held():
            return
        # That it cannot be done must not hide why the start failed.
        with suppress(OSError, StorageError):
            self._folder.config.unlink(missing_ok=True)
            if not journal_was_there:
                remove_tree(self._folder.journal)

    def _prepare(self, signals: Signals) -> End | None:
        """Prepare the data, in a process of its own: it can be interrupted and leaves no memory behind."""
        if self._prepare_command is None:
            return None
        log = self._folder.log("prepare")
        environment = {**self._environment, "PYTHONUNBUFFERED": "1"}
        process = LoggedProcess.start(self._prepare_command, environment, log, self._inherited)
        lines = LogLines(log, process.log_start)
        try:
            while (code := process.poll()) is None:
                asked = signals.wait(TICK_S)
                if asked:
                    return End(128 + asked[0], None, finished=False)
                self._say_all(lines.poll())
        finally:
            process.kill()
        if code != 0:
            error, last_line = process.last_words()
            return End(code if code in (1, 2) else 1, error or last_line, finished=False)
        self._say_all(lines.poll())
        return None

    def _say_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            # Why it failed is said once, at the end.
            if not line.startswith(ERROR_PREFIX):
                self._display.say(line)

    def _supervise(self, signals: Signals) -> End:
        tail = Tail(self._folder.metrics)
        progress = self._progress
        progress.restart(tail.poll()[1])
        progress.recent.clear()
        self._display.open(progress)
        try:
            self._do(self._supervisor.start(time.monotonic()))
            while self._end is None:
                asked = signals.wait(TICK_S)
                now = time.monotonic()
                for signum in asked:
                    self._do(self._supervisor.interrupt(now, signum))
                while not self._changes.empty():
                    self._do(self._changes.get()(self._supervisor))
                self._look_at_cluster()
                self._do(self._supervisor.tick(now, self._exits()))
                self._say_errors()
                self._follow(tail, progress)
                self._display.refresh()
            return self._end
        finally:
            self._display.close()

    def _exits(self) -> list[Exit]:
        exits = []
        for member, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[member]
                exits.append(Exit(member, code, *process.last_words(), process.pid in self._listed))
        return exits

    def _look_at_cluster(self) -> None:
        members = self._folder.members()
        self._listed.update(pid for member in members if isinstance(pid := member.get("pid"), int))
        coordinator = self._processes.get(COORDINATOR)
        if self._address is not None or coordinator is None:
            return
        for member in members:
            if member.get("role") == COORDINATOR.role.value and member.get("pid") == coordinator.pid:
                self._address = str(member["address"])
                self._display.reachable(self._address)
                self._do(self._supervisor.reachable())

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Start(member):
                    self._start(member)
                case Signal(member, signum):
                    if member in self._processes:
                        self._processes[member].send(signum)
                case Say(text):
                    self._display.say(text)
                case End():
                    self._end = action

    def _start(self, member: Member) -> None:
        if member in self._processes:
            self._processes.pop(member).kill()
        environment = role_environment(self._environment, member.role, on_glibc())
        self._lives[member] += 1
        environment[failpoints.LIFE_VARIABLE] = str(self._lives[member])
        command = self._command(member, self._address)
        log = self._folder.log(str(member))
        try:
            process = LoggedProcess.start(command, environment, log, self._inherited)
            self._processes[member] = process
            if member == COORDINATOR and self._coordinator_log is None:
                self._coordinator_log = LogLines(log, process.log_start)
            self._display.started(member.role.value, member.rank, process.pid)
        except OSError as error:
            raise StartupError(f"{member} cannot be started: {error}") from None

    def _say_errors(self) -> None:
        """Say what the coordinator logs as an error and goes on from: a damaged checkpoint, a full disk."""
        # A log that somebody has removed is no reason to stop.
        with suppress(OSError):
            for error in errors_in(self._coordinator_log.poll() if self._coordinator_log is not None else []):
                self._display.say(f"{COORDINATOR}: {error}")

    def _follow(self, tail: Tail, progress: Progress) -> None:
        rewritten, records = tail.poll()
        if rewritten:
            progress.restart(records)
            self._display.went_back(progress)
            return
        for record in records:
            self._trained |= record.get("kind") == "step"
            progress.feed(record)
            self._display.show(record, progress)

    def _kill_all(self) -> None:
        for process in self._processes.values():
            process.kill()


def refuse_run(folder: RunFolder) -> None:
    """Raises ConfigError when the folder holds a run."""
    if folder.holds_run():
        raise ConfigError(
            f"run_dir={folder.path} holds a run already; go on with: windlass resume {folder.path}, "
            f"or choose another folder with run_dir=..."
        )
