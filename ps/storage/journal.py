"""The coordinator's commit journal: what was decided, on local disk, one segment file per term.

    journal/lock   held (flock) by the one coordinator that writes here; its process id

and the files of `ps.storage.journal_files`.

A segment gets its name only when its first record is on disk. A killed coordinator, or a host that
lost power, leaves at most a torn tail in the last segment: it is cut at the next start. Anything
else that cannot be read is damage, and never skipped over.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ps import failpoints
from ps.errors import JournalDamaged, StorageError, WaitTimeout
from ps.storage import segment
from ps.storage.files import AtomicFile, append_all, make_directory, reason, sweep
from ps.storage.journal_files import Found, Place, find, segment_path, write_summary
from ps.storage.segment import Record

SYNC_TIMEOUT_S = 60.0


class Journal:
    """An open journal: read once, then appended to.

    Concurrency: thread-safe; records are in the order of the calls. One daemon thread fsyncs.
    """

    def __init__(self, folder: Path, lock_fd: int, found: Found) -> None:
        """Use `Journal.open`."""
        self.folder = folder
        self._records = found.records
        self.term = 0
        self._terms = found.terms
        self._sequence = found.end.sequence
        #: Records that the summary of the files stands for, as they were opened.
        self.summarized = found.summarized
        self._lock_fd: int | None = lock_fd
        self._fd: int | None = None
        self._end = 0
        #: Guards everything below and above; notified when any of it changes.
        self._changed = threading.Condition()
        self._synced = self._sequence
        self._failure: str | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Lock the journal in `folder` (created when missing), cut a torn tail, read the records.

        Raises:
            JournalDamaged: another process holds it (named), or a record before the tail cannot be
                read; names file and offset. Restore the file, or move the folder away and resume
                from a checkpoint.
            StorageError: the folder cannot be read or written.
        """
        make_directory(folder)
        lock_fd = _lock(folder)
        try:
            sweep(folder)
            found = find(folder, settle=True, summarized=True)
        except OSError as error:
            os.close(lock_fd)
            raise StorageError(f"the journal {folder} cannot be read: {reason(error)}") from error
        except BaseException:
            os.close(lock_fd)
            raise
        return cls(folder, lock_fd, found)

    def take_records(self) -> list[Record]:
        """The records of all terms, in order, as they were when the journal was opened; once, then they are let go.

        A summary stands for those that it is of, as a record {"type": "summary", "of": what `summarize` was given}.
        """
        records, self._records = self._records, []
        return records

    @property
    def length(self) -> int:
        """Records of all terms."""
        return self._sequence

    def summarize(self, fold: Callable[[Sequence[Record]], Record]) -> None:
        """Write down what all records up to now amount to: the next opening need not read them.

        Args:
            fold: what records amount to, the first of which may be a summary itself. A pure function.

        Raises:
            StorageError: it cannot be written, the journal cannot be read, or is unusable.
            WaitTimeout: the records are not on disk in time.
        """
        with self._changed:
            self._wait_synced(SYNC_TIMEOUT_S)
            place = Place(self.term, self._end, self._sequence)
        try:
            records = find(self.folder, summarized=True, until=place).records
        except OSError as error:
            raise StorageError(f"the journal {self.folder} cannot be read: {reason(error)}") from error
        write_summary(self.folder, place, fold(records))

    def begin_term(self) -> int:
        """Take the next term; it is on disk, and can never be taken again, when this returns.

        Raises:
            StorageError: the journal is unusable from now on.
        """
        with self._changed:
            self._wait_synced(SYNC_TIMEOUT_S)
            term = self._terms + 1
            path = segment_path(self.folder, term)
            data = segment.encode({"type": "term", "term": term}, self._sequence)
            try:
                with AtomicFile(path) as file:
                    file.write(data)
                    file.commit()
                if self._fd is not None:
                    os.close(self._fd)
                    self._fd = None
                self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except OSError as error:
                raise self._fail(f"{path} cannot be written: {reason(error)}") from error
            self.term = self._terms = term
            self._end = len(data)
            self._sequence += 1
            self._synced = self._sequence
            if self._thread is None:
                self._thread = threading.Thread(target=self._sync_loop, name="journal-sync", daemon=True)
                self._thread.start()
            return term

    def append(self, record: Record, sync: bool = False) -> None:
        """Write a record: it survives the death of this process, and soon that of the host.

        Args:
            record: a map with a text under "type".
            sync: return only when it is on disk.

        On a full disk it waits a while for room.

        Raises:
            StorageError: nothing of the record is kept, and the journal is unusable from now on.
            WaitTimeout: `sync` took too long; the record is written.
            ValueError: not a record; nothing happened.
        """
        with self._changed:
            data = segment.encode(record, self._sequence)
            self._check_usable()
            if self._fd is None:
                raise ValueError("begin_term comes before the first record")
            try:
                failpoints.hit("journal.append.before", record["type"])
                append_all(self._fd, data, self._end)
            except OSError as error:
                path = segment_path(self.folder, self.term)
                raise self._fail(f"{path} cannot be written: {reason(error)}") from error
            self._end += len(data)
            self._sequence += 1
            failpoints.hit("journal.append.after", record["type"])
            self._changed.notify_all()
            if sync:
                self._wait_synced(SYNC_TIMEOUT_S)

    def sync(self, timeout_s: float = SYNC_TIMEOUT_S) -> None:
        """Wait until everything that was appended before this call is on disk.

        Raises:
            StorageError: it never will be; the journal is unusable.
            WaitTimeout: not within `timeout_s`.
        """
        with self._changed:
            self._wait_synced(timeout_s)

    def close(self, timeout_s: float = SYNC_TIMEOUT_S) -> None:
        """Sync, stop the thread and release the lock. Idempotent; silent after a failure.

        Raises:
            StorageError, WaitTimeout: as `sync`; the lock is released all the same.
        """
        try:
            if self._failure is None and self._lock_fd is not None:
                self.sync(timeout_s)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join(timeout_s)
            stopped = self._thread is None or not self._thread.is_alive()
            with self._changed:
                # A thread that hangs in fsync keeps its file: the number must not be used anew.
                if self._fd is not None and stopped:
                    os.close(self._fd)
                    self._fd = None
                if self._lock_fd is not None:
                    os.close(self._lock_fd)
                    self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_synced(self, timeout_s: float) -> None:
        """Wait with the lock held: nothing is appended between the last check and the return."""
        target = self._sequence
        self._check_usable()
        started = time.monotonic()
        self._changed.wait_for(lambda: self._synced >= target or self._failure is not None, timeout_s)
        if self._failure is not None:
            raise self._unusable()
        if self._synced < target:
            waited_s = time.monotonic() - started
            raise WaitTimeout(
                f"{segment_path(self.folder, self.term)}: {target - self._synced} records are not on disk "
                f"after {waited_s:.1f} s; the disk is overloaded or gone"
            )

    def _sync_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sequence > self._synced or self._closing)
                if self._failure is not None or self._sequence == self._synced or self._fd is None:
                    return
                target, fd = self._sequence, self._fd
            name = f"{self.folder.name}/{segment_path(self.folder, self.term).name}"
            try:
                failpoints.hit("fsync.before", name)
                os.fsync(fd)
                failpoints.hit("fsync.after", name)
            except OSError as error:
                # The kernel may have dropped the pages: a second fsync would succeed and lie.
                with self._changed:
                    self._fail(f"{segment_path(self.folder, self.term)}: fsync failed: {reason(error)}")
                return
            with self._changed:
                self._synced = target
                self._changed.notify_all()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._unusable()
        if self._closing:
            raise StorageError(f"the journal {self.folder} is closed")

    def _unusable(self) -> StorageError:
        return StorageError(f"the journal is unusable: {self._failure}")

    def _fail(self, text: str) -> StorageError:
        self._failure = text
        self._changed.notify_all()
        return StorageError(text)


def _lock(folder: Path) -> int:
    """Take the lock, for as long as the descriptor that is returned is open."""
    path = folder / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {reason(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        holder = f"process {text}" if text.isdigit() else "another process"
        raise JournalDamaged(
            f"the journal {folder} is held by {holder}: a coordinator of this run is alive on this host; "
            "stop it, or give this run another run_dir"
        ) from None
    except OSError as error:
        os.close(fd)
        raise StorageError(f"{path} cannot be locked: {reason(error)}") from error
    return fd
