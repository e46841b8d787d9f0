"""Memory that two processes of one user on one host have in common.

A segment is a memfd: a file that has no name, so that it is gone with the last process that maps it,
however that ends, and that no quota of /dev/shm bounds. It is attached through its owner's
descriptor in /proc, which the kernel allows to the same user in the same PID namespace only. Its
first bytes are a nonce: who can tell it has the same memory, and not another process of that number.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
from pathlib import Path

import numpy as np

from ps.errors import SharedMemoryError

_PREFIX = "windlass-"
_NAME = re.compile(rf"([0-9]{{1,10}})/([0-9]{{1,6}})/({_PREFIX}[0-9a-f]{{32}})")
NONCE_BYTES = 16
#: What is shared starts here: a cache line, and a multiple of every element's size.
HEADER_BYTES = 64


class Segment:
    """A mapped piece of shared memory. Views of it keep it mapped."""

    #: Of one that could not be mapped: its descriptor stays the caller's.
    _descriptor = -1

    def __init__(self, descriptor: int, size: int, name: str = "") -> None:
        self._memory = mmap.mmap(descriptor, HEADER_BYTES + size)
        self._descriptor = descriptor
        self.size = size
        #: By which a peer attaches it; empty for whoever attached it.
        self.name = name

    @classmethod
    def create(cls, size: int) -> Segment:
        """Make a segment of zeros; its memory is claimed by `claim`.

        Args:
            size: bytes.

        Raises:
            SharedMemoryError: this system has none, or not enough.
        """
        label = _PREFIX + secrets.token_hex(16)
        try:
            descriptor = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError) as error:
            raise SharedMemoryError(f"this system makes no anonymous file: {error}") from None
        try:
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, HEADER_BYTES + size)
            # A file that its owner cuts short would end whoever reads it.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            segment = cls(descriptor, size, f"{os.getpid()}/{descriptor}/{label}")
            segment.claim(-HEADER_BYTES, HEADER_BYTES)
        except OSError as error:
            os.close(descriptor)
            raise SharedMemoryError(f"{size:,} bytes cannot be mapped: {error}") from None
        segment._memory[:NONCE_BYTES] = secrets.token_bytes(NONCE_BYTES)
        return segment

    def claim(self, start: int, size: int) -> None:
        """Have the system set memory aside: writing what was not claimed may end the process.

        Raises:
            SharedMemoryError: there is not enough.
        """
        if size > (free := _available()):
            # The system would look for it by ending processes.
            raise SharedMemoryError(f"there is no room for {size:,} bytes of shared memory: {free:,} are free")
        try:
            os.posix_fallocate(self._descriptor, HEADER_BYTES + start, size)
        except OSError as error:
            raise SharedMemoryError(f"there is no room for {size:,} bytes of shared memory: {error}") from None

    @classmethod
    def attach(cls, name: str, size: int) -> Segment:
        """Map another process's segment.

        Raises:
            SharedMemoryError: there is no such segment here, it is not this user's own, or it cannot be mapped.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise SharedMemoryError(f"{name[:80]!r} is not the name of a segment")
        path = f"/proc/{found[1]}/fd/{found[2]}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if _is_segment(path, found[3]) else -1
        except OSError as error:
            raise SharedMemoryError(f"the segment is not on this host, or another user's: {error}") from None
        if descriptor < 0:
            raise SharedMemoryError("the segment is not on this host, or in another container")
        try:
            opened = os.fstat(descriptor)
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if opened.st_uid != os.geteuid() or opened.st_size != HEADER_BYTES + size or not sealed:
                raise SharedMemoryError(f"{path} is not a sealed segment of {size:,} bytes of this user")
            return cls(descriptor, size)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise SharedMemoryError(f"{size:,} bytes cannot be mapped: {error}") from None
            raise

    @property
    def nonce(self) -> bytes:
        return self._memory[:NONCE_BYTES]

    def view(self, start: int, size: int) -> memoryview:
        """Bytes of the segment.

        Raises:
            SharedMemoryError: they are not all inside, or not aligned to 64 bytes.
        """
        if start < 0 or size < 0 or start % HEADER_BYTES or start + size > self.size:
            raise SharedMemoryError(f"bytes {start} to {start + size} are not a place in a segment of {self.size}")
        return memoryview(self._memory)[HEADER_BYTES + start : HEADER_BYTES + start + size]

    def array(self, dtype: np.dtype, start: int, size: int) -> np.ndarray:
        """`size` elements from byte `start` on."""
        return np.frombuffer(self.view(start, size * dtype.itemsize), dtype)

    def close(self) -> None:
        """Let go of it: nobody can attach it any more; views keep the memory. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0) | getattr(fcntl, "F_SEAL_SEAL", 0)


def _available() -> int:
    """Bytes of memory that the system can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _is_segment(path: str, label: str) -> bool:
    """Whether a descriptor is the memfd of that label; opening another process's pipe would wait for ever."""
    return str(Path(path).readlink()) == f"/memfd:{label} (deleted)"
