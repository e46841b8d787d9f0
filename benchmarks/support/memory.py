"""What processes take of memory, seen from outside while they work.

Counted are the pages that nobody else maps (`Private_*` of /proc/PID/smaps_rollup), so that neither code
nor a library's tables count twice, and the process's part of shared memory (`Pss_Shmem`: of a page that
two map, half), so that nothing hides in a segment between two processes. A page of a segment that only one
of them has touched is in both figures: what is said is never too little.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

#: How often a process is looked at; a look takes it a few milliseconds.
SAMPLE_S = 0.02
_COUNTED = ("Private_Clean", "Private_Dirty", "Pss_Shmem")


def taken(pid: int | str) -> int:
    """The bytes that a process takes now.

    Raises:
        OSError: there is no such process.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines[1:])}
    return 1024 * sum(int(fields[name]) for name in _COUNTED)


def imports(modules: Iterable[str], environment: Mapping[str, str]) -> int:
    """The bytes that a process takes which has imported these modules and done nothing."""
    code = f"import {', '.join(modules)}; from benchmarks.support.memory import taken; print(taken('self'))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(run.stdout)


class Peaks:
    """The most that each of some processes takes during a `with` block."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        #: Bytes, by the name of the process.
        self.bytes = dict.fromkeys(pids, 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for name, pid in self._pids.items():
                self.bytes[name] = max(self.bytes[name], taken(pid))
