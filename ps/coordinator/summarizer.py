"""Writes what the journal amounts to beside it, now and then: a coordinator that starts again reads from there on."""

from __future__ import annotations

import logging
import threading

from ps.coordinator.history import fold
from ps.errors import PsError
from ps.storage.journal import Journal

log = logging.getLogger(__name__)

#: A start reads some more than these at most: two of each step, and 5 us each.
EVERY_RECORDS = 20_000
CHECK_S = 2.0
#: For a disk that fails the next start must not wait.
STOP_S = 1.0


class Summarizer:
    """A thread of its own: folding takes some tenths of a second, for which no step waits."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        #: Records before the next summary.
        self._due_at = journal.summarized + EVERY_RECORDS
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="summarizer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopped.wait(CHECK_S):
            length = self._journal.length
            if length < self._due_at:
                continue
            self._due_at = length + EVERY_RECORDS
            try:
                self._journal.summarize(fold)
            except PsError as error:
                # Nothing depends on it but the time of the next start.
                log.warning("%s; it is tried again later", error.message)
