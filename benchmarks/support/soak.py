"""A run under faults for minutes: how many steps it makes in terms of calm minutes, and what its processes hold."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from benchmarks.support.watched_run import WatchedRun
from workers.launch import faults
from workers.launch.faults import Kind

#: By seconds between two faults: the part of the steps that has to be kept.
KEPT = {15.0: 0.75, 60.0: 0.90}
#: Calm stretches, in terms of one with faults.
CALM = 0.2
#: Between two looks at what the processes hold.
_SAMPLE_S = 1.0
#: Everybody is there for so long before what the processes hold is taken for usual, in seconds.
_SETTLE_S = 10.0


@dataclass
class Result:
    """What was measured."""

    #: Steps per second: calm, under faults, calm, ...
    rates: list[float]
    #: By seconds between two faults: steps under faults in terms of the calm stretches before and after.
    kept: dict[float, float]
    #: Resident memory and open files of all processes: in the last calm stretch in terms of the first.
    memory: float
    files: float
    struck: dict[str, int]


class Soak:
    """A run of which some process is killed again and again."""

    def __init__(self, run: WatchedRun) -> None:
        self._run = run
        self._drawn = random.Random(0)
        self._struck: Counter[str] = Counter()

    def measure(self, seconds: float) -> Result:
        """Calm and faults in turn.

        Args:
            seconds: with each rate of faults.
        """
        rates = [self._calm(CALM * seconds)]
        held = [self._held()]
        for every_s in KEPT:
            rates.append(self._faults(seconds, every_s))
            rates.append(self._calm(CALM * seconds))
            held.append(self._held())
        kept = {
            every_s: faulty / statistics.mean((before, after))
            for every_s, before, faulty, after in zip(KEPT, rates[::2], rates[1::2], rates[2::2], strict=False)
        }
        memory, files = (last / first for first, last in zip(held[0], held[-1], strict=True))
        return Result(rates, kept, memory, files, dict(sorted(self._struck.items())))

    def _calm(self, seconds: float) -> float:
        time.sleep(_SETTLE_S)
        return self._stretch(seconds, lambda _: None)

    def _faults(self, seconds: float, every_s: float) -> float:
        # A fault in the middle of each interval, so that the last one's cost is counted as well.
        due = [every_s / 2]

        def strike(now: float) -> None:
            if now >= due[0] and (processes := self._run.processes()):
                plan = faults.Plan(Kind.KILL, self._drawn.random(), self._drawn.random(), 0.0, 0.0)
                process = faults.choose(plan, processes)
                if faults.strike(plan, process):
                    self._struck[process.role] += 1
                    due[0] += every_s

        return self._stretch(seconds, strike)

    def _stretch(self, seconds: float, each_look: Callable[[float], None]) -> float:
        """Steps per second of so many seconds."""
        began, first = time.monotonic(), self._run.look()
        while (now := time.monotonic() - began) < seconds:
            each_look(now)
            self._run.look()
            time.sleep(0.05)
        return (self._run.look() - first) / (time.monotonic() - began)

    def _held(self) -> tuple[float, float]:
        """Bytes resident and open files, of all processes together; the median of some looks."""
        looks = []
        for _ in range(10):
            memory = files = 0
            for process in self._run.processes():
                with suppress(psutil.Error):
                    alive = psutil.Process(process.pid)
                    memory += alive.memory_info().rss
                    files += alive.num_fds()
            looks.append((memory, files))
            time.sleep(_SAMPLE_S)
        memories, opened = zip(*looks, strict=True)
        return statistics.median(memories), statistics.median(opened)
