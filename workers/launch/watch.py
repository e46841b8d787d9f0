"""Following a coordinator: its last answer is always at hand, and asking never makes anybody wait."""

from __future__ import annotations

import os
import threading
import time

from ps.errors import PsError
from ps.wire.security import Security
from workers.launch.snapshot import Snapshot, from_message

#: Between two questions.
EVERY_S = 0.5
#: An answer that takes longer is given up.
ANSWER_S = 2.0
CLOSE_S = 0.5
#: A coordinator that has said nothing for so long is shown as silent: it is asked often, and answers at once.
SILENT_S = 2.0


class Watcher:
    """Asks a coordinator again and again, on a thread of its own.

    Args:
        address: its host:port.
        security: a client's certificate, or nothing.
        every_s: seconds between two questions.

    Concurrency: thread-safe.
    """

    def __init__(self, address: str, security: Security, every_s: float = EVERY_S) -> None:
        self._address = address
        self._security = security
        self._every_s = every_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._latest: Snapshot | None = None
        self._heard_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def latest(self) -> Snapshot | None:
        """The last answer, which says so when it is old; None before the first."""
        with self._lock:
            latest, silent_s = self._latest, time.monotonic() - self._heard_at
        return latest.silent(silent_s) if latest is not None and silent_s > SILENT_S else latest

    @property
    def silent_s(self) -> float:
        """Seconds since the last answer, or since the first question."""
        with self._lock:
            return time.monotonic() - self._heard_at

    def close(self) -> None:
        """Ask no more; a question that is under way is given up, or ends with the process."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        quiet_grpc()
        # Here, because it takes long and only who watches needs it.
        from ps.client.status import StatusClient

        with StatusClient(self._address, self._security) as client:
            while not self._closing.is_set():
                try:
                    snapshot = from_message(client.ask(ANSWER_S))
                    with self._lock:
                        self._latest, self._heard_at = snapshot, time.monotonic()
                except PsError:
                    # It is between two lives, or gone; `latest` says for how long.
                    pass
                self._closing.wait(self._every_s)


def quiet_grpc() -> None:
    """Before grpc is imported: what fails comes as an exception, and no line of its own may break the view."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
