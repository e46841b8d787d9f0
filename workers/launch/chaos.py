"""Faults one after the other for a run that is under way on this host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ps.errors import WaitTimeout
from workers.launch import faults
from workers.launch.faults import Plan, Process
from workers.launch.folder import RunFolder

#: How often a run is looked at.
LOOK_S = 0.2
#: A run without anybody to strike for so long is over, or has never begun.
GONE_S = 60.0


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
    while not (processes := faults.alive(folder.members())):
        if not folder.is_held():
            return []
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{folder.path}: none of its processes has been there for {GONE_S:.0f} s")
        time.sleep(LOOK_S)
    return processes if folder.is_held() else []
