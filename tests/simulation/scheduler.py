"""Virtual time, and threads that take turns in an order drawn from a seed.

A thread is a greenlet: it runs until it waits, so that two runs of a seed are the same to the last event. Time stands
still while anything runs and jumps to the next event when all wait.
"""

from __future__ import annotations

import heapq
import random
import traceback
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

#: A thread that is woken runs this much later at most, in seconds; of some it takes longer, as on a busy machine.
SOON_S = 20e-6
BUSY_S = 3e-3
#: Of so many chances to lose the processor (a lock that is taken) a thread uses one, on average.
PREEMPTION = 50


class Process:
    """What dies, stops and continues as one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.tasks: list[Task] = []
        #: What happened to it while it was stopped, in order.
        self.held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        #: Carried out when it is gone: its descriptors, its connections.
        self.at_exit: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return self.name


class Task:
    """One thread of a process."""

    __slots__ = ("blocked", "done", "greenlet", "joining", "name", "process", "ticket")

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.greenlet: greenlet
        self.blocked = False
        #: Counts waits, so that the end of an earlier one wakes nobody.
        self.ticket = 0
        self.done = False
        self.joining: list[Task] = []


class Scheduler:
    """Runs events one after the other, each at its time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.events = 0
        self.current: Task | None = None
        #: The simulation has ended: who is still waiting leaves.
        self.over = False
        #: Called with what a thread died of.
        self.on_crash: Callable[[Task, BaseException], None] = lambda _task, error: self._raise(error)
        self._heap: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._hub = getcurrent()
        self._tasks: list[Task] = []
        self._until_preempted = self._draw_preemption()

    @staticmethod
    def _raise(error: BaseException) -> None:
        raise error

    # -- Events ---------------------------------------------------------------------------------

    def after(self, delay_s: float, call: Callable[..., None], *arguments: Any, process: Process | None = None) -> None:
        """Have something happen later.

        Args:
            process: to whom it happens: not while it is stopped, and never once it is dead.
        """
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._sequence, process, call, arguments))

    def run(self, until: Callable[[], bool], deadline_s: float) -> bool:
        """Let things happen until `until` holds; False: they did not get there in time, or nothing happens any more."""
        self._hub = getcurrent()
        while not until():
            if not self._heap or self.now > deadline_s:
                return False
            self.now, _, process, call, arguments = heapq.heappop(self._heap)
            if process is not None:
                if not process.alive:
                    continue
                if process.paused:
                    process.held.append((call, arguments))
                    continue
            self.events += 1
            call(*arguments)
        return True

    # -- Processes ------------------------------------------------------------------------------

    def kill(self, process: Process) -> None:
        """SIGKILL: none of its threads runs ever again."""
        if process.alive:
            process.alive = False
            for clean in process.at_exit:
                clean()

    def pause(self, process: Process) -> None:
        """SIGSTOP."""
        process.paused = True

    def resume(self, process: Process) -> None:
        """SIGCONT: what it missed happens now."""
        process.paused = False
        held, process.held = process.held, []
        for call, arguments in held:
            self.after(self.soon(), call, *arguments, process=process)

    def close(self) -> None:
        """Let every thread leave."""
        self.over = True
        for task in self._tasks:
            if not task.done and task.greenlet:
                self.current = task
                task.greenlet.throw(GreenletExit)
        self.current = None
        self._tasks.clear()
        self._heap.clear()

    # -- Threads --------------------------------------------------------------------------------

    def spawn(self, process: Process, name: str, work: Callable[..., Any], *arguments: Any) -> Task:
        """Start a thread."""
        task = Task(process, name)
        task.greenlet = greenlet(self._main)
        process.tasks.append(task)
        self._tasks.append(task)
        self.after(self.soon(), self._start, task, work, arguments, process=process)
        return task

    def _start(self, task: Task, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.current = task
        task.greenlet.parent = self._hub
        task.greenlet.switch(task, work, arguments)
        self.current = None

    def _main(self, task: Task, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            work(*arguments)
        except GreenletExit:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever a thread dies of
            if not self.over:
                self.on_crash(task, error)
        finally:
            task.done = True
            if not self.over:
                for waiting in task.joining:
                    self.wake(waiting)

    def block(self, timeout_s: float | None = None) -> bool:
        """Wait until somebody calls `wake`; False: it took too long."""
        if self.over:
            raise GreenletExit
        task = self.current
        assert task is not None, "only threads wait"
        task.ticket += 1
        task.blocked = True
        if timeout_s is not None:
            self.after(max(0.0, timeout_s), self._time_out, task, task.ticket, process=task.process)
        return bool(self._hub.switch())

    def wake(self, task: Task) -> None:
        """End a thread's wait, soon."""
        if task.blocked:
            task.blocked = False
            self.after(self.soon(), self._continue, task, task.ticket, True, process=task.process)

    def _time_out(self, task: Task, ticket: int) -> None:
        if task.blocked and task.ticket == ticket:
            task.blocked = False
            self._continue(task, ticket, False)

    def _continue(self, task: Task, ticket: int, woken: bool) -> None:
        assert task.ticket == ticket, "a thread waits for one thing at a time"
        self.current = task
        task.greenlet.switch(woken)
        self.current = None

    def sleep(self, seconds: float) -> None:
        self.block(seconds)

    def may_switch(self) -> None:
        """A place at which another thread may come first."""
        self._until_preempted -= 1
        if self._until_preempted <= 0 and not self.over and self.current is not None:
            self._until_preempted = self._draw_preemption()
            self.block(self.soon())

    def _draw_preemption(self) -> int:
        return int(self.rng.expovariate(1 / PREEMPTION)) + 1

    def soon(self) -> float:
        """How long a thread that may run waits for a processor, in seconds."""
        drawn = self.rng.random()
        return drawn * SOON_S if drawn < 0.99 else self.rng.random() * BUSY_S

    def stacks(self) -> str:
        """Where every living thread is, for a run that hangs."""
        found = []
        for task in self._tasks:
            if not task.done and task.process.alive and task.greenlet and task.greenlet.gr_frame is not None:
                lines = traceback.format_stack(task.greenlet.gr_frame, limit=6)
                found.append(f"{task.process}, {task.name}:\n{''.join(lines)}")
        return "\n".join(found)


#: The simulation that runs in this process.
active: Scheduler = Scheduler(random.Random(0))


def activate(scheduler: Scheduler) -> None:
    """From now on the simulated modules are those of this simulation."""
    global active
    active = scheduler
