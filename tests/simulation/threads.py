"""`threading`, `queue`, `time` and thread pools of a simulation, with the standard library's names."""

from __future__ import annotations

import queue as real_queue
import threading as real_threading
import time as real_time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from tests.simulation import scheduler
from tests.simulation.scheduler import Task

#: What the clocks show when a simulation begins: no zero, which would hide mistakes.
EPOCH_S = 1_000.0
UNIX_S = 1_700_000_000.0


class Lock:
    """`threading.Lock`."""

    _reentrant = False

    def __init__(self) -> None:
        self._owner: Task | None = None
        self._count = 0
        self._waiters: deque[Task] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        active = scheduler.active
        active.may_switch()
        task = active.current
        if self._count and not (self._reentrant and self._owner is task):
            if not blocking:
                return False
            deadline = None if timeout < 0 else active.now + timeout
            while self._count:
                assert task is not None, "only threads wait for a lock"
                self._waiters.append(task)
                if not active.block(None if deadline is None else deadline - active.now):
                    self._waiters.remove(task)
                    return False
        self._owner = task
        self._count += 1
        return True

    def release(self) -> None:
        self._count -= 1
        if self._count <= 0:
            self._count, self._owner = 0, None
            if self._waiters:
                scheduler.active.wake(self._waiters.popleft())

    def locked(self) -> bool:
        return self._count > 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def let_go(self) -> int:
        """Release however often it was taken; returns how often."""
        count, self._count = self._count, 1
        self.release()
        return count

    def take_back(self, count: int) -> None:
        if not scheduler.active.over:
            self.acquire()
        self._owner, self._count = scheduler.active.current, count


class RLock(Lock):
    """`threading.RLock`."""

    _reentrant = True


class Condition:
    """`threading.Condition`."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock if lock is not None else RLock()
        self._waiters: deque[Task] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        active = scheduler.active
        task = active.current
        assert task is not None, "only threads wait"
        self._waiters.append(task)
        count, notified = self._lock.let_go(), False
        try:
            notified = active.block(timeout)
        finally:
            if not notified and task in self._waiters:
                self._waiters.remove(task)
            self._lock.take_back(count)
        return notified

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        active = scheduler.active
        deadline = None if timeout is None else active.now + timeout
        while not (result := predicate()):
            left = None if deadline is None else deadline - active.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiters))):
            scheduler.active.wake(self._waiters.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class Event:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._set = False
        self._waiters: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiters, self._waiters = self._waiters, []
        for task in waiters:
            scheduler.active.wake(task)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        active = scheduler.active
        if not self._set:
            task = active.current
            assert task is not None, "only threads wait"
            self._waiters.append(task)
            if not active.block(timeout) and task in self._waiters:
                self._waiters.remove(task)
        return self._set


class Barrier:
    """`threading.Barrier`, for one use."""

    def __init__(self, parties: int) -> None:
        self._missing = parties
        self._there = Event()

    def wait(self, timeout: float | None = None) -> int:
        self._missing -= 1
        if self._missing == 0:
            self._there.set()
        elif not self._there.wait(timeout):
            raise real_threading.BrokenBarrierError
        return self._missing


class Thread:
    """`threading.Thread`, of the process of whoever starts it."""

    def __init__(
        self,
        target: Callable[..., Any],
        name: str = "thread",
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        daemon: bool | None = None,
    ) -> None:
        self._target, self._arguments, self._named = target, args, kwargs or {}
        self.name, self.daemon = name, daemon
        self._task: Task | None = None

    def start(self) -> None:
        active = scheduler.active
        assert active.current is not None, "threads are started by threads"
        self._task = active.spawn(active.current.process, self.name, self._run)

    def _run(self) -> None:
        task = scheduler.active.current
        assert task is not None
        _THREADS[task] = self
        try:
            self._target(*self._arguments, **self._named)
        finally:
            del _THREADS[task]

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        active, task = scheduler.active, self._task
        if task is not None and not task.done:
            assert active.current is not None, "only threads wait"
            task.joining.append(active.current)
            if not active.block(timeout):
                task.joining.remove(active.current)


_THREADS: dict[Task, Thread] = {}


def _current_thread() -> Any:
    task = scheduler.active.current
    return _THREADS.get(task, task) if task is not None else None


class SimpleQueue:
    """`queue.SimpleQueue`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiters: deque[Task] = deque()

    def __class_getitem__(cls, _item: Any) -> type[SimpleQueue]:
        return cls

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiters:
            scheduler.active.wake(self._waiters.popleft())

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        active = scheduler.active
        deadline = None if timeout is None else active.now + timeout
        while not self._items:
            task = active.current
            if not block:
                raise real_queue.Empty
            assert task is not None, "only threads wait"
            self._waiters.append(task)
            if not active.block(None if deadline is None else deadline - active.now):
                if task in self._waiters:
                    self._waiters.remove(task)
                raise real_queue.Empty
        if len(self._items) > 1 and self._waiters:
            scheduler.active.wake(self._waiters.popleft())
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class Future:
    """`concurrent.futures.Future`, as far as it is used."""

    def __init__(self) -> None:
        self._done = Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def __class_getitem__(cls, _item: Any) -> type[Future]:
        return cls

    def set_result(self, result: Any) -> None:
        self._result = result
        self._done.set()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def result(self, timeout: float | None = None) -> Any:
        if not self._done.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result


class ThreadPoolExecutor:
    """`concurrent.futures.ThreadPoolExecutor`."""

    def __init__(self, max_workers: int, thread_name_prefix: str = "pool") -> None:
        self._max = max_workers
        self._name = thread_name_prefix
        self._jobs = SimpleQueue()
        self._threads: list[Thread] = []
        self._idle = 0

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        future = Future()
        self._jobs.put((future, work, arguments))
        if self._idle < self._jobs.qsize() and len(self._threads) < self._max:
            self._threads.append(Thread(self._run, f"{self._name}-{len(self._threads)}"))
            self._threads[-1].start()
        return future

    def _run(self) -> None:
        while True:
            self._idle += 1
            job = self._jobs.get()
            self._idle -= 1
            if job is None:
                self._jobs.put(None)
                return
            future, work, arguments = job
            try:
                future.set_result(work(*arguments))
            except Exception as error:  # noqa: BLE001 - the future's
                future.set_exception(error)

    def map(self, work: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        futures = [self.submit(work, item) for item in items]
        return iter([future.result() for future in futures])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while cancel_futures and not self._jobs.empty():
            self._jobs.get_nowait()
        self._jobs.put(None)
        for thread in self._threads if wait else ():
            thread.join()


class Clock:
    """`time`."""

    def monotonic(self) -> float:
        return EPOCH_S + scheduler.active.now

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    def time(self) -> float:
        return UNIX_S + scheduler.active.now

    def sleep(self, seconds: float) -> None:
        scheduler.active.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(real_time, name)


threading = SimpleNamespace(
    Lock=Lock,
    RLock=RLock,
    Condition=Condition,
    Event=Event,
    Barrier=Barrier,
    BrokenBarrierError=real_threading.BrokenBarrierError,
    Thread=Thread,
    current_thread=_current_thread,
)
queue = SimpleNamespace(SimpleQueue=SimpleQueue, Empty=real_queue.Empty)
time = Clock()
futures = SimpleNamespace(ThreadPoolExecutor=ThreadPoolExecutor)
