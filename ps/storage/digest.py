"""One number for a whole state: equal digests, equal weights and optimizer state, bit for bit."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ps.sharding import make_plan
from ps.storage.manifest import read_manifest
from ps.storage.reader import CheckpointReader
from ps.storage.shard_file import WEIGHTS, Float32
from ps.types import ParameterTable

#: (array, start, out): fill out with [start, start + len(out)) of an array of the flat space.
ReadRange = Callable[[str, int, Float32], None]

_PIECE = 1 << 20


def digest(folder: Path) -> str:
    """Return the digest of a checkpoint, after verifying its files.

    Returns:
        SHA-256 in hex. It does not depend on the number of shards.

    Raises:
        CheckpointNotFound: the folder is not a complete checkpoint.
        CheckpointDamaged: the checkpoint is not what its manifest says.
        StorageError: it cannot be read.
    """
    manifest, _ = read_manifest(folder)
    with CheckpointReader(folder, manifest) as reader:
        reader.verify()
        return digest_arrays(manifest.table, manifest.moments, manifest.applied, reader.read)


def digest_arrays(table: ParameterTable, moment_names: Sequence[str], applied: int, read: ReadRange) -> str:
    """Return the digest of weights and optimizer state.

    The number of applied steps (u64), then for each tensor in the table's order, for the weights and
    each moment: the tensor's name, the array's name (each after its length, u32), the number of
    elements (u64), the elements (float32); all little-endian, no padding.

    Args:
        read: gives ranges of the flat space, at most 1 Mi elements at a time.

    Returns:
        SHA-256 in hex.
    """
    offsets = make_plan(table, 1).offsets
    sha = hashlib.sha256(struct.pack("<Q", applied))
    buffer = np.empty(min(_PIECE, max(tensor.size for tensor in table.tensors)), np.dtype("<f4"))
    for tensor, offset in zip(table.tensors, offsets, strict=True):
        for array in (WEIGHTS, *moment_names):
            for text in (tensor.name.encode(), array.encode()):
                sha.update(struct.pack("<I", len(text)) + text)
            sha.update(struct.pack("<Q", tensor.size))
            for start in range(0, tensor.size, _PIECE):
                piece = buffer[: min(_PIECE, tensor.size - start)]
                read(array, offset + start, piece)
                sha.update(piece.data)
    return sha.hexdigest()
