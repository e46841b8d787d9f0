"""One thread that owns the state machine: events go in from any thread, one at a time."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

log = logging.getLogger(__name__)

#: Time passes for leases at least so often.
TICK_S = 0.05
CALL_TIMEOUT_S = 30.0

Result = TypeVar("Result")


class Loop:
    """Runs events, and `after_each` after every event and tick, until it is stopped."""

    def __init__(self, after_each: Callable[[float], None], on_failure: Callable[[BaseException], None]) -> None:
        self._events: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()
        self._after_each = after_each
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
                try:
                    event = self._events.get(timeout=TICK_S)
                except queue.Empty:
                    event = _nothing
                event(time.monotonic())
                self._after_each(time.monotonic())
        except BaseException as error:
            log.exception("the coordinator's loop failed")
            self._on_failure(error)


def _nothing(_now: float) -> None:
    pass
