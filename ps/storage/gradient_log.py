"""A shard's journal on local disk: an append-only sequence of records, in one file per checkpoint.

    shard-00000/lock              held (flock) by the one process that writes here
    shard-00000/from-00000100.log what was reduced and decided from version 100 on

A record is a header of 40 bytes, a head (a small map; whoever writes it knows what is in it) and a payload:

    magic "WLG1" | head length u32 | payload length u64 | sequence u64 | checksum of the payload 8 bytes
    | CRC-32 of the head u32 | CRC-32 of the 36 bytes before u32

The sequence number runs on from file to file. Nothing is fsynced: what was written survives the death of
the process, and a host that lost power comes back from a checkpoint. So a tail is torn where a file ends
before its last record does, and is cut; everything else that cannot be read is damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from zlib import crc32

from ps import failpoints
from ps.errors import JournalDamaged, StorageError
from ps.storage.files import make_directory, reason

log = logging.getLogger(__name__)

MAGIC = b"WLG1"
_FIELDS = struct.Struct("<4sIQQ8sI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_NAME = re.compile(r"from-(\d{8,})\.log")

#: A journal of so many steps is made again in the time of a few: reading and updating, nobody computes.
_STEPS = 32
#: Below this a checkpoint costs more than going through the journal.
_LEAST_BYTES = 256 << 20

#: Makes 8 bytes of a payload. The caller's: what is fast enough for gradients is a kernel.
Checksum = Callable[[memoryview], bytes]


@dataclass(frozen=True)
class Entry:
    """One record, as it was read."""

    head: bytes
    #: Only until the next one is read.
    payload: memoryview


def usual_limit(num_elements: int) -> int:
    """Bytes of a file of a shard's journal beyond which a checkpoint is due, where the job sets none.

    Args:
        num_elements: of the shard, padding included.
    """
    return max(_LEAST_BYTES, _STEPS * 4 * num_elements)


def segment_path(folder: Path, version: int) -> Path:
    """Where the records from a version on are."""
    return folder / f"from-{version:08d}.log"


class GradientLog:
    """An open journal: read once, where there is something to be read, then appended to.

    Concurrency: thread-safe, apart from `read`; records are in the order of the calls.
    """

    def __init__(self, folder: Path, lock_fd: int, checksum: Checksum) -> None:
        """Use `GradientLog.open`."""
        self.folder = folder
        self._checksum = checksum
        self._lock_fd: int | None = lock_fd
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._sequence = 0
        #: Bytes in each file, by its version.
        self._sizes: dict[int, int] = {}

    @classmethod
    def open(cls, folder: Path, checksum: Checksum) -> GradientLog:
        """Lock the journal in `folder`, which is created when missing.

        Raises:
            StorageError: the folder cannot be used, or another process writes there.
        """
        make_directory(folder)
        path = folder / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"{path} cannot be opened: {reason(error)}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened = cls(folder, fd, checksum)
            for version in opened._versions_on_disk():
                opened._sizes[version] = segment_path(folder, version).stat().st_size
        except BlockingIOError:
            os.close(fd)
            raise StorageError(
                f"the journal {folder} is held by another process: another shard of this index is alive on this "
                "host; stop it, or give this run another journal.dir"
            ) from None
        except OSError as error:
            os.close(fd)
            raise StorageError(f"the journal {folder} cannot be read: {reason(error)}") from error
        return opened

    @property
    def versions(self) -> Sequence[int]:
        """The versions from which there is a file, ascending."""
        return sorted(self._sizes)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.copy().values())

    @property
    def newest_size(self) -> int:
        """Bytes of the newest file; 0: there is none."""
        # Whoever asks does not wait for a disk, and files may be removed meanwhile.
        sizes = self._sizes.copy()
        return sizes[max(sizes)] if sizes else 0

    def read(self, version: int) -> Iterator[Entry]:
        """Read the records of the file of this version and of all that follow; then `append` goes on behind them.

        A torn tail is cut. Nothing may be appended before the last record was read.

        Raises:
            JournalDamaged: a record cannot be read, or one is missing; names file and offset.
            StorageError: a file cannot be read, or a torn tail cannot be cut.
        """
        expected: int | None = None
        versions = [found for found in self.versions if found >= version]
        for found in versions:
            path = segment_path(self.folder, found)
            try:
                failpoints.hit("log.read.before", path.name)
                with path.open("rb") as file:
                    reader = _Reader(path, file, self._sizes[found], self._checksum, expected)
                    yield from reader.entries()
                if reader.position < self._sizes[found]:
                    self._cut(path, found, reader.position, is_last=found == versions[-1])
                failpoints.hit("log.read.after", path.name)
            except OSError as error:
                raise StorageError(f"{path} cannot be read: {reason(error)}") from error
            expected = reader.sequence
        self._reopen(expected or 0)

    def begin(self, version: int, head: bytes, *, anew: bool) -> None:
        """Write into a new file from now on; `head` is its first record.

        Args:
            anew: it follows nothing: the files that are there are removed.

        Raises:
            StorageError: it cannot be written; what was there is removed, or stays.
        """
        if anew:
            self.discard()
        with self._lock:
            path = segment_path(self.folder, version)
            try:
                failpoints.hit("log.begin.before", path.name)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
                if self._fd is not None:
                    os.close(self._fd)
                self._fd = fd
                self._sizes[version] = 0
                failpoints.hit("log.begin.after", path.name)
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {reason(error)}") from error
            self._append(head, memoryview(b""), "base")

    def append(self, head: bytes, payload: memoryview | bytes = b"", kind: str = "") -> None:
        """Write a record: it survives the death of this process, not that of the host.

        Args:
            kind: of record, for failpoints.

        Raises:
            StorageError: nothing of the record is kept.
        """
        with self._lock:
            self._append(head, memoryview(payload).cast("B"), kind)

    def trim(self, version: int) -> list[int]:
        """Remove the files that nobody needs who has the state of this version.

        Returns:
            The versions of the files that were removed.

        Raises:
            StorageError: one cannot be removed.
        """
        with self._lock:
            needed = max((found for found in self._sizes if found <= version), default=0)
            old = [found for found in sorted(self._sizes) if found < needed]
            for found in old:
                del self._sizes[found]
        # Removing gigabytes takes a while, for which nobody who appends shall wait.
        self._unlink(old)
        return old

    def discard(self) -> None:
        """Remove all files; only `begin` makes one again.

        Raises:
            StorageError: one cannot be removed.
        """
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
            self._sequence = 0
            # The newest first: what is left of it then ends early, and misses nothing in between.
            self._unlink(sorted(self._sizes, reverse=True))
            self._sizes.clear()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        with self._lock:
            for fd in (self._fd, self._lock_fd):
                if fd is not None:
                    os.close(fd)
            self._fd = self._lock_fd = None

    def _versions_on_disk(self) -> list[int]:
        return sorted(int(m[1]) for entry in os.scandir(self.folder) if (m := _NAME.fullmatch(entry.name)))

    def _append(self, head: bytes, payload: memoryview, kind: str) -> None:
        if self._fd is None:
            raise StorageError(f"the journal {self.folder} is closed")
        newest = max(self._sizes)
        checksum = _checksum(self._checksum, payload)
        fields = _FIELDS.pack(MAGIC, len(head), len(payload), self._sequence, checksum, crc32(head))
        try:
            failpoints.hit("log.append.before", kind)
            written = _write(self._fd, [fields + _CRC.pack(crc32(fields)) + head, payload])
            failpoints.hit("log.append.after", kind)
        except OSError as error:
            # A torn tail would be cut at the next start all the same; here, more may be appended.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._sizes[newest])
            path = segment_path(self.folder, newest)
            raise StorageError(f"{path} cannot be written: {reason(error)}") from error
        self._sizes[newest] += written
        self._sequence += 1

    def _unlink(self, versions: Sequence[int]) -> None:
        for version in versions:
            path = segment_path(self.folder, version)
            try:
                failpoints.hit("log.remove.before", path.name)
                path.unlink(missing_ok=True)
                failpoints.hit("log.remove.after", path.name)
            except OSError as error:
                raise StorageError(f"{path} cannot be removed: {reason(error)}") from error

    def _cut(self, path: Path, version: int, end: int, *, is_last: bool) -> None:
        if not is_last:
            raise JournalDamaged(f"{path}, offset {end}: a partial record, and there is a file after this one")
        log.info("%s: %d bytes cut at offset %d: its writer died", path, self._sizes[version] - end, end)
        os.truncate(path, end)
        self._sizes[version] = end

    def _reopen(self, sequence: int) -> None:
        """Go on behind what was read."""
        # A file without its first record was begun and not used: the one before goes on.
        if self._sizes and not self.newest_size:
            self._unlink([max(self._sizes)])
            del self._sizes[max(self._sizes)]
        if not self._sizes:
            return
        path = segment_path(self.folder, max(self._sizes))
        try:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {reason(error)}") from error
        self._sequence = sequence


class _Reader:
    """The whole records of one file, one after the other."""

    def __init__(self, path: Path, file: BufferedReader, size: int, checksum: Checksum, sequence: int | None) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._checksum = checksum
        #: The number that the next record must have; None: any.
        self.sequence = sequence
        #: Behind the last whole record.
        self.position = 0
        self._buffer = bytearray()

    def entries(self) -> Iterator[Entry]:
        """Yield records until the end, or until one that the file ends within."""
        while (entry := self._next()) is not None:
            yield entry

    def _next(self) -> Entry | None:
        if self.position + HEADER_BYTES > self._size:
            return None
        header = self._file.read(HEADER_BYTES)
        magic, head_length, length, sequence, checksum, head_crc = _FIELDS.unpack_from(header)
        if magic != MAGIC or _CRC.unpack_from(header, _FIELDS.size)[0] != crc32(header[: _FIELDS.size]):
            raise self._damaged("a damaged header")
        if self.sequence is not None and sequence != self.sequence:
            raise self._damaged(f"record {sequence} where {self.sequence} is due")
        end = self.position + HEADER_BYTES + head_length + length
        if end > self._size:
            return None
        head = self._file.read(head_length)
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        payload = memoryview(self._buffer)[:length]
        if self._file.readinto(payload) != length:
            raise self._damaged("a record that could not be read whole")
        if crc32(head) != head_crc or _checksum(self._checksum, payload) != checksum:
            raise self._damaged("a damaged record")
        self.position, self.sequence = end, sequence + 1
        return Entry(head, payload)

    def _damaged(self, problem: str) -> JournalDamaged:
        return JournalDamaged(f"{self._path}, offset {self.position}: {problem}")


def _checksum(checksum: Checksum, payload: memoryview) -> bytes:
    return checksum(payload) if payload else bytes(8)


def _write(fd: int, parts: Sequence[bytes | memoryview]) -> int:
    """Write all of these in as many calls as the operating system wants; returns how many bytes they are."""
    total = sum(len(part) for part in parts)
    views = [memoryview(part) for part in parts]
    while views:
        written = os.writev(fd, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]
    return total
