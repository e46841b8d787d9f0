"""The processes of one run, started as the launcher starts them: what dies comes back by the same command."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ps.client.shared import Sharing
from ps.config import RunConfig
from ps.coordinator.app import CoordinatorApp
from ps.errors import PsError
from ps.shard.app import ShardApp
from ps.types import Role
from tests.simulation import worker
from tests.simulation.disk import Disk
from tests.simulation.invariants import Watch
from tests.simulation.network import Network
from tests.simulation.scheduler import Process, Scheduler, Task
from tests.simulation.sequential import Truth

COORDINATOR = "127.0.0.1:7000"
#: What a start takes at most, in seconds: the launcher's own delay, and the interpreter's.
RESTART_S = 0.6
#: How long a process that another one has replaced may take to find out.
STALE_S = 30.0
#: A coordinator does not find out: nobody talks to it any more. Meanwhile it holds the journal's lock.
STALE_COORDINATOR_S = 2.0


@dataclass
class Seat:
    """A place in the cluster, which one life after the other takes."""

    role: Role
    index: int
    process: Process | None = None
    lives: int = 0
    #: A process here is not started again.
    given_up: bool = False
    #: The worker, while there is one.
    worker: Any = None
    #: Lives that another one has replaced while they were stopped.
    stale: list[Process] = field(default_factory=list)
    was_replaced: bool = False

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


class Cluster:
    """Starts, kills and starts again."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        disk: Disk,
        rng: random.Random,
        config: RunConfig,
        truth: Truth,
        watch: Watch,
        note: Callable[[str], None],
    ) -> None:
        self.scheduler = scheduler
        self.network = network
        self.disk = disk
        self.rng = rng
        self.config = config
        self.watch = watch
        self.note = note
        self.finished = False
        self._truth = truth
        self._job = config.model_dump_json()
        #: What a layer's forward or backward takes at most, by worker.
        self._layer_s = [rng.choice((0.2e-3, 1e-3, 4e-3)) for _ in range(64)]
        #: Workers on the shards' host and on others.
        self._sharing = [rng.choice((Sharing.NEVER, Sharing.NEVER, Sharing.AUTO)) for _ in range(64)]
        self.seats = [Seat(Role.COORDINATOR, 0)]
        self.seats += [Seat(Role.SHARD, index) for index in range(config.cluster.shards)]
        # A shard's second process: which of the two is its standby is the coordinator's to say.
        self.seats += [Seat(Role.STANDBY, index) for index in range(config.cluster.shards * config.cluster.standbys)]
        self.seats += [Seat(Role.WORKER, rank) for rank in range(config.cluster.workers)]
        scheduler.on_crash = self._crashed

    def of(self, *roles: Role) -> list[Seat]:
        return [seat for seat in self.seats if seat.role in roles]

    def start_all(self) -> None:
        for seat in self.seats:
            self.start(seat)

    def start(self, seat: Seat) -> None:
        """Begin a life."""
        if seat.process is not None or self.finished or seat.given_up:
            return
        seat.lives += 1
        process = Process(f"{seat.name}" if seat.lives == 1 else f"{seat.name}.{seat.lives}")
        process.at_exit += [
            lambda: self.network.leave(process),
            lambda: self.disk.release(process),
            lambda: self.watch.forget(process),
        ]
        seat.process = process
        self.note(f"{process} starts")
        self.scheduler.spawn(process, "main", self._live, seat, process)

    def start_soon(self, seat: Seat) -> None:
        self.scheduler.after(0.02 + self.rng.random() * RESTART_S, self.start, seat)

    def kill(self, seat: Seat) -> None:
        """SIGKILL, and the launcher starts it again."""
        process = seat.process
        if process is not None:
            self.note(f"{process} is killed")
            self.scheduler.kill(process)
            seat.process = seat.worker = None
            self.start_soon(seat)

    def change_job(self, standbys: int, durability: str, eager: bool) -> None:
        """Whoever starts from now on is told another job."""
        config = self.config
        self.config = config.model_copy(
            update={
                "cluster": config.cluster.model_copy(update={"standbys": standbys}),
                "durability": durability,
                "training": config.training.model_copy(update={"eager": eager}),
            }
        )
        self._job = self.config.model_dump_json()
        for seat in self.of(Role.STANDBY):
            seat.given_up = not standbys
            self.start_soon(seat)

    def add_worker(self) -> None:
        """One more worker joins."""
        seat = Seat(Role.WORKER, len(self.of(Role.WORKER)))
        self.seats.append(seat)
        self.start(seat)

    def replace(self, seat: Seat, paused_s: float) -> None:
        """A process that is stopped is taken for dead and replaced, and continues later.

        Of a coordinator the address moves to where the new one starts; the journal is one storage for both.
        """
        process = seat.process
        if process is None:
            return
        self.note(f"{process} is stopped for {paused_s:.3f} s, and replaced")
        self.scheduler.pause(process)
        self.scheduler.after(paused_s, self.scheduler.resume, process)
        stale_s = STALE_S
        if seat.role is Role.COORDINATOR:
            stale_s = STALE_COORDINATOR_S
            self.network.leave(process)
        self.scheduler.after(paused_s + stale_s, self.end_stale, seat, process)
        seat.stale.append(process)
        seat.was_replaced = True
        seat.process = seat.worker = None
        self.start(seat)

    def end_stale(self, seat: Seat, only: Process | None = None) -> None:
        """Whoever started the second one ends the first, if it has not ended by itself."""
        for process in [p for p in seat.stale if only in (None, p)]:
            seat.stale.remove(process)
            self.scheduler.kill(process)

    # -- Lives ----------------------------------------------------------------------------------

    def _live(self, seat: Seat, process: Process) -> None:
        reason = "ended"
        failed = False
        try:
            reason = self._main(seat)
        except PsError as error:
            reason, failed = error.message, True
        self.note(f"{process} ends: {reason}")
        self.scheduler.kill(process)
        if seat.process is not process:
            seat.stale.remove(process)
            return
        seat.process = seat.worker = None
        if seat.was_replaced and "newer life" in reason:
            # The coordinator did not live through the replacement, and believed whoever came last.
            if seat.stale:
                seat.process = seat.stale.pop()
            else:
                self.start_soon(seat)
        elif seat.role is Role.COORDINATOR and not failed and reason.startswith("finished"):
            self.finished = True
        elif failed and not self._may_fail(reason):
            self.watch.fail(f"{process} failed: {reason}")
        else:
            self.start_soon(seat)

    def _main(self, seat: Seat) -> str:
        if seat.role is Role.COORDINATOR:
            app = CoordinatorApp(self.config, self._job, COORDINATOR)
            app.run()
            return app._outcome[1]
        if seat.role in (Role.SHARD, Role.STANDBY):
            shard = ShardApp(COORDINATOR, seat.index, "127.0.0.1:0", None)
            shard.run(600.0)
            return shard._reason
        worker.run(
            COORDINATOR,
            seat.index,
            self._truth.published.__getitem__,
            random.Random(self.rng.random()),
            self._layer_s[seat.index],
            self._sharing[seat.index],
            lambda joined: setattr(seat, "worker", joined),
        )
        return "ended"

    def _may_fail(self, reason: str) -> bool:
        """Whether an end with an error is as it should be: whoever runs the job frees the disk and resumes."""
        held = any(seat.was_replaced for seat in self.of(Role.COORDINATOR)) and "is held by process" in reason
        # Two processes of a shard: a third one, or one whose former life the coordinator believes in still, has no seat
        # there, and whoever was away for too long finds the other one in its place. The launcher tries again.
        no_seat = "are there already" in reason or "newer life" in reason
        return (
            held
            or (self.config.cluster.standbys > 0 and no_seat)
            or (self.disk.full_until > 0 and "No space left" in reason)
        )

    def _crashed(self, task: Task, error: BaseException) -> None:
        import traceback

        lines = "".join(traceback.format_exception(error)[-6:])
        self.watch.fail(f"{task.process}, thread {task.name!r}: {error!r}\n{lines}")


def journal_folder(config: RunConfig) -> Path:
    return config.run_dir / "journal"


def gradient_logs(config: RunConfig) -> list[Path]:
    """Where the shards write, with durability=journal."""
    return [config.journal_dir(shard) for shard in range(config.cluster.shards)]
