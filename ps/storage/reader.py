"""Read a checkpoint as the flat arrays it was, whatever number of shards wrote it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ps.errors import CheckpointDamaged, ConfigError, MismatchError, StorageError
from ps.sharding import Plan, make_plan
from ps.storage.files import reason
from ps.storage.manifest import Manifest, read_manifest
from ps.storage.shard_file import (
    WEIGHTS,
    Float32,
    ShardFile,
    ShardFileReader,
    chunk_name,
    open_file,
    shard_file_name,
)

_PIECE_BYTES = 4 << 20


class CheckpointReader:
    """Random access to the arrays of a checkpoint: ranges of the flat space, across files.

    Only what is asked for is read. Nothing is verified but by `verify`.

    Concurrency: thread-safe, apart from `close`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Lay out the checkpoint's own plan; no file is opened yet.

        Raises:
            CheckpointDamaged: the manifest's plan cannot be made again, or is another one.
        """
        self.folder = folder
        self.manifest = manifest
        #: The plan that the checkpoint was written with.
        self.plan: Plan = _plan_of(folder, manifest)
        self._lock = threading.Lock()
        self._open: dict[int, ShardFileReader] = {}

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names that `read` knows: the weights and the optimizer's moments."""
        return (WEIGHTS, *self.manifest.moments)

    def files_for(self, ranges: Iterable[tuple[int, int]]) -> tuple[ShardFile, ...]:
        """Return the files that hold these ranges [start, stop) of the flat space."""
        shards = {
            chunk.shard for start, stop in ranges if start < stop for chunk in self.plan.chunks_between(start, stop)
        }
        return tuple(self.manifest.files[shard] for shard in sorted(shards))

    def verify(self, files: Sequence[ShardFile] | None = None) -> None:
        """Check size and SHA-256 of these files, or of all; reads them whole.

        Raises:
            CheckpointDamaged: names the file and both sizes or digests; use an older checkpoint.
            StorageError: a file cannot be read.
        """
        for file in self.manifest.files if files is None else files:
            _verify(self.folder / file.name, file)

    def read(self, array: str, start: int, out: Float32) -> None:
        """Read the range [start, start + len(out)) of an array of the flat space.

        Args:
            array: "weights" or a moment.
            start: offset in the flat space, in elements.
            out: float32[n], contiguous; on an error it holds anything.

        Raises:
            MismatchError: the checkpoint has no such array: it is another optimizer's.
            CheckpointDamaged: a file is missing, cut, or not what the plan says; names it.
            StorageError: a file cannot be read.
            ValueError: the range is outside of the flat space, or `out` is not as above.
        """
        if array not in self.arrays:
            raise MismatchError(
                f"the checkpoint {self.folder} holds {', '.join(self.arrays)} and no {array!r}: it was "
                "written by another optimizer; resume with that one"
            )
        stop = start + out.size
        if not 0 <= start <= stop <= self.plan.size:
            raise ValueError(f"[{start}, {stop}) is outside of the flat space of {self.plan.size} elements")
        if out.ndim != 1 or out.dtype != np.dtype("<f4") or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}, not a contiguous float32[n]")
        for chunk in self.plan.chunks_between(start, stop):
            begin, end = max(start, chunk.start), min(stop, chunk.stop)
            self._file(chunk.shard).read(
                chunk_name(array, chunk.start), begin - chunk.start, out[begin - start : end - start]
            )

    def close(self) -> None:
        """Close the files. Idempotent; `read` opens them again."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, shard: int) -> ShardFileReader:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = ShardFileReader(self.folder / self.manifest.files[shard].name)
            return self._open[shard]


def verify(folder: Path) -> Manifest:
    """Check every byte of a checkpoint: its manifest, and its files by size and SHA-256. Reads it whole.

    Raises:
        CheckpointNotFound: the folder is not a complete checkpoint.
        CheckpointDamaged: names the file and what is wrong with it; use another checkpoint.
        StorageError: a file cannot be read.
    """
    manifest, _ = read_manifest(folder)
    with CheckpointReader(folder, manifest) as reader:
        reader.verify()
    return manifest


def _plan_of(folder: Path, manifest: Manifest) -> Plan:
    try:
        plan = make_plan(manifest.table, manifest.num_shards)
    except ConfigError as error:
        raise CheckpointDamaged(f"the checkpoint {folder} has no possible plan: {error}") from error
    if plan.digest != manifest.plan_digest:
        raise CheckpointDamaged(
            f"the checkpoint {folder} was written with the plan {manifest.plan_digest}; this version of "
            f"Windlass lays its parameters out as {plan.digest}: use the version {manifest.windlass_version}"
        )
    for shard, file in enumerate(manifest.files):
        if file.name != shard_file_name(shard, manifest.num_shards):
            raise CheckpointDamaged(f"the checkpoint {folder} names {file.name} as the file of shard {shard}")
    return plan


def _verify(path: Path, file: ShardFile) -> None:
    fd = open_file(path)
    try:
        size = os.fstat(fd).st_size
        if size != file.size:
            raise CheckpointDamaged(f"{path} has {size} bytes instead of {file.size}")
        sha, buffer = hashlib.sha256(), bytearray(min(_PIECE_BYTES, max(size, 1)))
        while count := os.readv(fd, [buffer]):
            sha.update(memoryview(buffer)[:count])
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
    finally:
        os.close(fd)
    if sha.hexdigest() != file.sha256:
        raise CheckpointDamaged(f"{path} has the SHA-256 {sha.hexdigest()} instead of {file.sha256}")
