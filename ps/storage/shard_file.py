"""A shard's part of a checkpoint: one safetensors file of chunks, streamed in and out.

The tensors are named "<array>/<start>": <array> is "weights" or an optimizer moment, <start> the offset
of the chunk in the flat space. They are one-dimensional float32, padding included.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ps.errors import CheckpointDamaged, CheckpointWriteFailed, StorageError
from ps.storage.files import AtomicFile, fsync_directory, reason

Float32 = NDArray[np.float32]

#: The array that every checkpoint has; the others are the optimizer's moments.
WEIGHTS = "weights"
_LENGTH = struct.Struct("<Q")
_ITEM_BYTES = 4
#: What the safetensors library accepts at most.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ShardFile:
    """What a manifest says of a file."""

    name: str
    sha256: str
    size: int


def shard_file_name(shard: int, num_shards: int) -> str:
    """The name of a shard's file in a checkpoint folder."""
    return f"shard-{shard:05d}-of-{num_shards:05d}.safetensors"


def chunk_name(array: str, start: int) -> str:
    """The name of a chunk of an array in a shard's file."""
    return f"{array}/{start:015d}"


class ShardFileWriter:
    """Stream a shard's arrays into its file of a checkpoint, hashing on the way.

    Nothing is under the file's own name before `commit`. Left as a context manager, a file that was
    not committed is aborted.

    Concurrency: one thread at a time.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        num_shards: int,
        arrays: Sequence[tuple[str, int]],
        metadata: dict[str, str],
    ) -> None:
        """Create the folder when missing, and the temporary file with its header.

        Args:
            folder: the checkpoint's; its parent must exist.
            arrays: (name, length in elements) in the order in which they will be written.
            metadata: text for people; readers of the file do not need it.

        Raises:
            CheckpointWriteFailed: names the path and the reason.
        """
        self.path = folder / shard_file_name(shard, num_shards)
        self._arrays = tuple(arrays)
        self._next = 0
        self._sha = hashlib.sha256()
        self._size = 0
        self._file: AtomicFile | None = None
        header = _header(self._arrays, metadata)
        try:
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                fsync_directory(folder.parent)
            self._file = AtomicFile(self.path)
            self._write(header)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, name: str, values: Float32) -> None:
        """Write the next array.

        Args:
            name: the next of the declared ones.
            values: float32[n], contiguous; not kept.

        Raises:
            CheckpointWriteFailed: names the path and the reason; the temporary file is removed.
            ValueError: not the array that was declared.
        """
        if self._next == len(self._arrays):
            raise ValueError(f"{name}: all {self._next} declared arrays are written")
        due, length = self._arrays[self._next]
        if name != due or values.shape != (length,) or values.dtype != np.dtype("<f4"):
            raise ValueError(f"{name}: {values.dtype}{list(values.shape)} where {due}: float32[{length}] was declared")
        try:
            self._write(np.ascontiguousarray(values).data.cast("B"))
        except OSError as error:
            raise self._failed(error) from error
        self._next += 1

    def commit(self) -> ShardFile:
        """Put the file on disk under its own name.

        Raises:
            CheckpointWriteFailed: names the path and the reason; the temporary file is removed.
            ValueError: a declared array was not written.
        """
        if self._next < len(self._arrays):
            raise ValueError(f"{self.path}: {self._arrays[self._next][0]} was declared and not written")
        try:
            self._opened().commit()
        except OSError as error:
            raise self._failed(error) from error
        self._file = None
        return ShardFile(self.path.name, self._sha.hexdigest(), self._size)

    def abort(self) -> None:
        """Remove the temporary file. Idempotent; nothing happens after `commit`."""
        file, self._file = self._file, None
        if file is not None:
            file.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _opened(self) -> AtomicFile:
        if self._file is None:
            raise CheckpointWriteFailed(f"{self.path} was given up; begin it again")
        return self._file

    def _write(self, data: bytes | memoryview) -> None:
        self._opened().write(data)
        self._sha.update(data)
        self._size += len(data)

    def _failed(self, error: OSError) -> CheckpointWriteFailed:
        self.abort()
        return CheckpointWriteFailed(f"{self.path} cannot be written: {reason(error)}")


def _header(arrays: Sequence[tuple[str, int]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, length in arrays:
        if name in entries:
            raise ValueError(f"{name} is declared twice")
        end = position + length * _ITEM_BYTES
        entries[name] = {"dtype": "F32", "shape": [length], "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


class ShardFileReader:
    """Read chunks of a shard's file without loading the rest of it.

    Reads, rather than maps: a bad block or a file that shrinks is an error here, and would be a
    SIGBUS that kills the process there.

    Concurrency: `read` is thread-safe.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            CheckpointDamaged: the file is missing or not of this format; names it.
            StorageError: it cannot be opened.
        """
        self.path = path
        self._fd: int | None = open_file(path)
        try:
            self._places = self._read_header()
        except OSError as error:
            self.close()
            raise StorageError(f"{path} cannot be read: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def read(self, name: str, skip: int, out: Float32) -> None:
        """Read elements [skip, skip + len(out)) of a chunk.

        Args:
            name: "<array>/<start>".
            out: float32[n], contiguous.

        Raises:
            CheckpointDamaged: the file has no such elements; names the file.
            StorageError: they cannot be read.
        """
        if name not in self._places:
            raise CheckpointDamaged(f"{self.path} holds no {name}")
        offset, length = self._places[name]
        if skip + out.size > length:
            raise CheckpointDamaged(f"{self.path}: {name} has {length} elements, not the {skip + out.size} of the plan")
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        try:
            self._read_exactly(offset + skip * _ITEM_BYTES, out.data.cast("B"))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {reason(error)}") from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _read_exactly(self, offset: int, out: memoryview) -> None:
        assert self._fd is not None
        while out:
            count = os.preadv(self._fd, [out], offset)
            if count == 0:
                raise CheckpointDamaged(f"{self.path} ends at byte {offset}: it was cut")
            out = out[count:]
            offset += count

    def _read_header(self) -> dict[str, tuple[int, int]]:
        """Return name -> (offset in the file in bytes, length in elements)."""
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        prefix = bytearray(_LENGTH.size)
        self._read_exactly(0, memoryview(prefix))
        (length,) = _LENGTH.unpack(prefix)
        data_start = _LENGTH.size + length
        if length > _MAX_HEADER_BYTES or data_start > size:
            raise CheckpointDamaged(f"{self.path}: a header of {length} bytes in a file of {size}")
        text = bytearray(length)
        self._read_exactly(_LENGTH.size, memoryview(text))
        try:
            entries = json.loads(text)
            del text
            entries.pop("__metadata__", None)
            places = {}
            for name, entry in entries.items():
                (elements,), (begin, end) = entry["shape"], entry["data_offsets"]
                if entry["dtype"] != "F32" or not 0 <= begin <= end or end - begin != elements * _ITEM_BYTES:
                    raise CheckpointDamaged(f"{self.path}: {name} is not a float32 array: {entry}")
                if data_start + end > size:
                    raise CheckpointDamaged(f"{self.path} has {size} bytes and is cut: {name} ends later")
                places[name] = (data_start + begin, elements)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointDamaged(f"{self.path}: the header is not of a safetensors file: {error}") from error
        return places


def open_file(path: Path) -> int:
    """Open a file of a checkpoint for reading.

    Raises:
        CheckpointDamaged: it is missing.
        StorageError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is missing") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
