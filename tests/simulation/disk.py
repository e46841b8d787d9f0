"""`os` for what Windlass writes: slow, full, torn by a crash, and it forgets what was not synced when power fails.

The files themselves are real, in a folder of memory. A process that dies loses its descriptors, and its locks.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

from tests.simulation.scheduler import Process, Scheduler

#: What a write and an fsync take, in seconds, where nothing is slow.
WRITE_S, SYNC_S = 20e-6, 400e-6


class Disk:
    """Stands for the module `os` in the modules that store."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._open: dict[int, tuple[Process, Path]] = {}
        #: Bytes of each file that a power failure leaves.
        self._synced: dict[Path, int] = {}
        #: Until when the disk is slow, and what an fsync takes at most then.
        self.slow_until = 0.0
        self.slow_s = 0.5
        #: Until when new files of checkpoints cannot be written.
        self.full_until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and "checkpoints" in str(path):
            self._check_room()
        fd = os.open(path, flags, mode)
        process = self._process()
        if process is not None:
            self._open[fd] = (process, Path(path))
        return fd

    def close(self, fd: int) -> None:
        owner, _ = self._open.get(fd, (None, None))
        # Whoever died has lost its descriptors by now; their numbers may be others'.
        if owner is self._process():
            del self._open[fd]
            os.close(fd)

    def write(self, fd: int, data: Any) -> int:
        path = self._path(fd)
        if path is not None and "checkpoints" in str(path):
            self._check_room()
            self._wait(self._rng.random() * (self.slow_s if self._is_slow() else WRITE_S))
        if len(data) > 1 and self._rng.random() < 0.02:
            # Half of it is there when somebody else comes, or the end.
            half = os.write(fd, data[: self._rng.randrange(1, len(data))])
            self._wait(WRITE_S)
            return half
        return os.write(fd, data)

    def writev(self, fd: int, parts: Any) -> int:
        if len(parts) > 1 and self._rng.random() < 0.02:
            written = os.write(fd, parts[0])
            self._wait(WRITE_S)
            return written
        return os.writev(fd, parts)

    def fsync(self, fd: int) -> None:
        path = self._path(fd)
        size = os.fstat(fd).st_size
        self._wait(self._rng.random() * (self.slow_s if self._is_slow() else SYNC_S))
        if path is not None:
            self._synced[path] = size

    def lose_power(self, folder: Path) -> int:
        """Cut what was appended to the last file of a journal and not synced, anywhere; returns the bytes lost."""
        last = max(folder.glob("term-*.log"), default=None)
        if last is None:
            return 0
        size = last.stat().st_size
        kept = self._rng.randint(min(self._synced.get(last, size), size), size)
        os.truncate(last, kept)
        return size - kept

    def tear(self, file: Path) -> int:
        """Cut a file that nobody syncs anywhere, as a power failure does; returns the bytes lost."""
        size = file.stat().st_size
        kept = self._rng.randint(0, size)
        os.truncate(file, kept)
        return size - kept

    def release(self, process: Process) -> None:
        """A process is gone."""
        for fd in [fd for fd, (owner, _) in self._open.items() if owner is process]:
            del self._open[fd]
            os.close(fd)

    def _is_slow(self) -> bool:
        return self._scheduler.now < self.slow_until

    def _check_room(self) -> None:
        if self._scheduler.now < self.full_until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _path(self, fd: int) -> Path | None:
        return self._open[fd][1] if fd in self._open else None

    def _process(self) -> Process | None:
        return self._scheduler.current.process if self._scheduler.current is not None else None

    def _wait(self, seconds: float) -> None:
        if self._scheduler.current is not None and not self._scheduler.over:
            self._scheduler.block(seconds)
