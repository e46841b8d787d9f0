"""One thread that owns the state machine: events go in from any thread, one at a time.

Facts come first: what is waiting is handled before anybody looks at the time. A member whose heartbeat waits behind a
slow disk has not been silent.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ps.coordinator.lease_clock import LeaseClock

log = logging.getLogger(__name__)

#: Time passes for leases at least so often, and by so much at most.
TICK_S = 0.05
CALL_TIMEOUT_S = 30.0

Result = TypeVar("Result")


class Loop:
    """Runs events until it is stopped, and looks at what follows from them.

    Args:
        after_each: called after every event.
        look: called when no event waits any more, and at each tick, with the time and for how long this thread was
            away before it: stopped, or busy with something slow. Of that the time does not tell.
        on_failure: called with whatever any of them raised; the loop has ended.
    """

    def __init__(
        self,
        after_each: Callable[[], None],
        look: Callable[[float, float], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._events: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()
        self._clock = LeaseClock(time.monotonic(), TICK_S)
        self._after_each = after_each
        self._look = look
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(CALL_TIMEOUT_S)

    def post(self, event: Callable[[float], None]) -> None:
        """Have `event(now)` run on the loop's thread, after those that were posted before."""
        self._events.put(event)

    def call(self, function: Callable[[float], Result]) -> Result:
        """Run `function(now)` on the loop's thread and return what it returns, or raise what it raises."""
        future: Future[Any] = Future()

        def event(now: float) -> None:
            try:
                future.set_result(function(now))
            except Exception as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)

        self.post(event)
        result: Result = future.result(CALL_TIMEOUT_S)
        return result

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                events = self._wait()
                now = self._clock.look(time.monotonic())
                for event in events:
                    event(now)
                    self._after_each()
                self._look(now, self._clock.away_s)
        except BaseException as error:
            log.exception("the coordinator's loop failed")
            self._on_failure(error)

    def _wait(self) -> list[Callable[[float], None]]:
        """Take the events that are there, or the first that comes before the next tick."""
        try:
            first = self._events.get(timeout=TICK_S)
        except queue.Empty:
            return []
        # Those that come meanwhile have to wait: leases must be looked at, however many there are.
        return [first, *(self._events.get() for _ in range(self._events.qsize()))]
