"""Faults one after the other for a run that is under way on this host."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from ps.errors import WaitTimeout
from ps.types import Role
from workers.config import JobConfig
from workers.launch import faults
from workers.launch.alive import Process, alive
from workers.launch.faults import Kind, Pause, Plan
from workers.launch.folder import RunFolder
from workers.launch.metrics import Tail
from workers.launch.supervisor import LIMIT_WINDOW_S

#: How often a run is looked at.
LOOK_S = 0.2
#: A run without anybody to strike for so long is over, or has never begun.
GONE_S = 60.0
#: A run that has recorded nothing for so long hangs.
HANGS_S = 600.0


@dataclass(frozen=True)
class Struck:
    """A fault that was carried out."""

    plan: Plan
    process: Process
    #: When it began, of the monotonic clock.
    at: float


def strike_all(
    folder: RunFolder,
    drawn: Iterator[Plan],
    count: int,
    pause: Pause = time.sleep,
    before_stop: Callable[[Struck], object] = lambda _: None,
) -> Iterator[Struck]:
    """Carry out drawn faults, each after its wait, until there were so many or the run is over.

    A plan that finds nobody (the process has just gone, or has no connection to cut) does not count.

    Args:
        folder, drawn, count: the run, and what is done to it how often.
        pause: sleeps; what it raises ends this, and nobody stays stopped.
        before_stop: hears of a process that is about to be stopped: should this end meanwhile, somebody knows of it.

    Raises:
        WaitTimeout: nobody is there, and yet somebody holds the folder.
    """
    done = 0
    while done < count:
        plan = next(drawn)
        pause(plan.wait_s)
        processes = _await_processes(folder, pause)
        if not processes:
            return
        fault = Struck(plan, faults.choose(plan, processes), time.monotonic())
        if plan.kind is Kind.STOP:
            before_stop(fault)
        if faults.strike(plan, fault.process, pause):
            done += 1
            yield fault


def most_deaths(drawn: Iterator[Plan], count: int, job: JobConfig) -> tuple[Process, int]:
    """How often drawn faults kill one process within the time over which its deaths are counted, at the most.

    It is reckoned with all processes there all the time, and no time between a death and the next life.
    """
    shards = range(job.cluster.shards)
    processes = [Process(Role.COORDINATOR, 0, 0)]
    processes += [Process(Role.SHARD, index, 0) for index in shards]
    processes += [Process(Role.STANDBY, index, 0) for index in shards if job.cluster.standbys]
    processes += [Process(Role.WORKER, rank, 0) for rank in range(job.cluster.workers)]
    now, most = 0.0, (processes[0], 0)
    deaths: defaultdict[Process, deque[float]] = defaultdict(deque)
    for plan in islice(drawn, count):
        now += plan.wait_s
        if plan.kind is Kind.STOP:
            now += plan.stop_s
        if plan.kind is not Kind.KILL:
            continue
        process = faults.choose(plan, processes)
        times = deaths[process]
        times.append(now)
        while times[0] < now - LIMIT_WINDOW_S:
            times.popleft()
        most = max(most, (process, len(times)), key=lambda found: found[1])
    return most


def _await_processes(folder: RunFolder, pause: Pause) -> list[Process]:
    """The run's processes; none when it is over."""
    deadline = time.monotonic() + GONE_S
    while not (processes := alive(folder)):
        if not folder.is_held():
            return []
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{folder.path}: none of its processes has been there for {GONE_S:.0f} s")
        pause(LOOK_S)
    return processes if folder.is_held() else []


def await_end(folder: RunFolder, hangs_s: float = HANGS_S, pause: Pause = time.sleep) -> None:
    """Wait until a run is over, however long that takes while it goes on.

    Raises:
        WaitTimeout: it has recorded nothing for too long.
    """
    recorded, deadline = Tail(folder.metrics), time.monotonic() + hangs_s
    while folder.is_held():
        if any(recorded.poll()):
            deadline = time.monotonic() + hangs_s
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"{folder.path} has recorded no step for {hangs_s:.0f} s, and is not over; whom it waits for: windlass "
                f"status {folder.path}"
            )
        pause(LOOK_S)
