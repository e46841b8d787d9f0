"""Files that are either there, whole and on disk, or not there: temporary file, fsync, rename, fsync."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from ps import failpoints
from ps.errors import StorageError

#: Ends the name of every file that a killed writer may leave behind; `sweep` removes them.
TEMPORARY_SUFFIX = ".windlass-tmp"
#: For so long what must not fail waits for room on a full disk, and how often it looks.
ROOM_S, ROOM_POLL_S = 5.0, 0.02


def reason(error: OSError) -> str:
    """The operating system's words for an error, without the path."""
    return error.strerror or str(error)


class AtomicFile:
    """Write a file under a temporary name; it gets its own name at `commit`, once it is on disk.

    A file of the same name stays as it is until then. Left as a context manager, a file that was
    not committed is aborted.

    Concurrency: one thread at a time. Several writers of one path do not disturb each other; the
    last to commit wins.
    """

    def __init__(self, path: Path, mode: int = 0o666, *, durable: bool = True) -> None:
        """Open the temporary file, in the folder of `path`.

        Args:
            path: the file's own name.
            mode: who may read it, from the start; the process's umask is taken off.
            durable: `commit` waits for the disk. Without that it is whole whatever happens to this process, but not
                to the host.

        Raises:
            OSError: the caller says what the file is for.
        """
        self.path = path
        self._durable = durable
        #: What failpoints are told that this is about.
        self._about = f"{path.parent.name}/{path.name}"
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd: int | None = os.open(self._temporary, flags, mode)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`.

        Raises:
            OSError: as from the operating system; call `abort`.
        """
        failpoints.hit("write.before", self._about)
        write_all(self._open_fd(), data)
        failpoints.hit("write.after", self._about)

    def commit(self) -> None:
        """Put the file on disk under its own name.

        Raises:
            OSError: it may or may not have its own name by now; call `abort`.
        """
        fd = self._open_fd()
        if self._durable:
            failpoints.hit("fsync.before", self._about)
            os.fsync(fd)
            failpoints.hit("fsync.after", self._about)
        self._fd = None
        os.close(fd)
        failpoints.hit("rename.before", self._about)
        self._temporary.replace(self.path)
        failpoints.hit("rename.after", self._about)
        if self._durable:
            fsync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove the temporary file. Idempotent; nothing happens after `commit`."""
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            if fd is not None:
                os.close(fd)
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path} is committed or aborted already")
        return self._fd


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, in as many calls as the operating system wants."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def append_all(fd: int, data: bytes, end: int, timeout_s: float = ROOM_S) -> None:
    """Append all of `data` to a file of `end` bytes, or nothing; on a full disk, wait for room.

    A checkpoint that does not fit fills the disk for a moment: it is given up, and then there is room again.

    Raises:
        OSError: as from the operating system; the file is as it was, or ends in a part of `data`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            write_all(fd, data)
            return
        except OSError as error:
            os.ftruncate(fd, end)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > deadline:
                raise
            time.sleep(ROOM_POLL_S)


def write_atomic(path: Path, data: bytes, mode: int = 0o666, *, durable: bool = True) -> None:
    """Replace the content of `path`: after a crash it has the old content or the new.

    Args:
        mode, durable: as `AtomicFile` has them.

    Raises:
        StorageError: names the path and the reason; the old content stands.
    """
    try:
        with AtomicFile(path, mode, durable=durable) as file:
            file.write(data)
            file.commit()
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {reason(error)}") from error


def fsync_directory(path: Path) -> None:
    """Put the names in a folder on disk: what was created, renamed or removed in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a folder and what is missing above it, on disk.

    Raises:
        StorageError: names the path and the reason.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            fsync_directory(folder.parent)
    except OSError as error:
        raise StorageError(f"the folder {path} cannot be created: {reason(error)}") from error


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with what is in it; of a link, the link and never its target.

    A path that does not exist is fine.

    Raises:
        StorageError: names the path and the reason; a part may be removed.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed: {reason(error)}") from error


def sweep(folder: Path) -> list[str]:
    """Remove the temporary files that killed writers left directly in `folder`.

    Call it only while nobody writes there: a file being written looks like one left behind.

    Returns:
        The names that were removed.

    Raises:
        StorageError: names the path and the reason.
    """
    removed = []
    try:
        for entry in os.scandir(folder):
            leftover = entry.name.startswith(".") and entry.name.endswith(TEMPORARY_SUFFIX)
            if leftover and not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)
                removed.append(entry.name)
    except FileNotFoundError:
        return removed
    except OSError as error:
        raise StorageError(f"leftovers in {folder} cannot be removed: {reason(error)}") from error
    return sorted(removed)
