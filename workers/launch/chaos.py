"""Faults one after the other for a run that is under way on this host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ps.errors import WaitTimeout
from workers.launch import faults
from workers.launch.alive import Process, alive
from workers.launch.faults import Plan
from workers.launch.folder import RunFolder
from workers.launch.metrics import Tail

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


def strike_all(folder: RunFolder, drawn: Iterator[Plan], count: int) -> Iterator[Struck]:
    """Carry out drawn faults, each after its wait, until there were so many or the run is over.

    A plan that finds nobody (the process has just gone, or has no connection to cut) does not count.

    Raises:
        WaitTimeout: nobody is there, and yet somebody holds the folder.
    """
    done = 0
    while done < count:
        plan = next(drawn)
        time.sleep(plan.wait_s)
        processes = _await_processes(folder)
        if not processes:
            return
        process, at = faults.choose(plan, processes), time.monotonic()
        if faults.strike(plan, process):
            done += 1
            yield Struck(plan, process, at)


def _await_processes(folder: RunFolder) -> list[Process]:
    """The run's processes; none when it is over."""
    deadline = time.monotonic() + GONE_S
    while not (processes := alive(folder)):
        if not folder.is_held():
            return []
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{folder.path}: none of its processes has been there for {GONE_S:.0f} s")
        time.sleep(LOOK_S)
    return processes if folder.is_held() else []


def await_end(folder: RunFolder, hangs_s: float = HANGS_S) -> None:
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
        time.sleep(LOOK_S)
