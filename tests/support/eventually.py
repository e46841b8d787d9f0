"""Waiting for something to become true, without sleeping for a guessed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def eventually(predicate: Callable[[], Result], timeout_s: float, what: str) -> Result:
    """Call `predicate` until it returns something true, and return that.

    Args:
        predicate: what is asked, again and again.
        timeout_s: seconds until the wait is given up.
        what: what is waited for, for the failure's message.

    Raises:
        AssertionError: it did not become true in time; says what, and what it was last.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        result = predicate()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout_s} s still waiting for {what}; last seen: {result!r}")
        pause.wait(0.02)
