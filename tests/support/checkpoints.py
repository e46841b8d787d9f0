"""Checkpoints for tests: random tables, arrays and what writes them as the roles do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.sharding import Plan, make_plan
from ps.storage import (
    Manifest,
    ScalerState,
    ShardFile,
    ShardFileWriter,
    checkpoint_folder,
    chunk_name,
    write_manifest,
)
from ps.storage.manifest import seal
from ps.types import ParameterTable, TensorSpec

Arrays = dict[str, NDArray[np.float32]]


def names_in(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


def make_table(sizes: Sequence[int]) -> ParameterTable:
    """A table of one-dimensional tensors."""
    return ParameterTable(tuple(TensorSpec(f"t{index}", (size,)) for index, size in enumerate(sizes)))


def make_arrays(table: ParameterTable, moments: Sequence[str], seed: int = 0) -> Arrays:
    """Flat arrays of random bits (so NaN and denormals too), zero in the padding."""
    plan = make_plan(table, 1)
    generator = np.random.default_rng(seed)
    arrays = {}
    for name in ("weights", *moments):
        flat = np.zeros(plan.size, np.float32)
        for tensor, offset in zip(table.tensors, plan.offsets, strict=True):
            bits = generator.integers(0, 2**32, tensor.size, dtype=np.uint32)
            flat[offset : offset + tensor.size] = bits.view(np.float32)
        arrays[name] = flat
    return arrays


def write_shard_file(folder: Path, plan: Plan, shard: int, arrays: Arrays) -> ShardFile:
    """Write one shard's file, chunk by chunk."""
    chunks = plan.chunks_of(shard)
    declared = [(chunk_name(name, chunk.start), chunk.size) for chunk in chunks for name in arrays]
    with ShardFileWriter(folder, shard, plan.num_shards, declared, {"made": "by a test"}) as writer:
        for chunk in chunks:
            for name, flat in arrays.items():
                writer.write(chunk_name(name, chunk.start), flat[chunk.start : chunk.stop])
        return writer.commit()


def make_manifest(plan: Plan, files: Sequence[ShardFile], version: int, moments: Sequence[str]) -> Manifest:
    """A manifest with something in every field."""
    return Manifest(
        version=version,
        applied=version - version // 10,
        skipped=version // 10,
        run_id="run-1",
        contributions=2,
        scaler=ScalerState(scale=65536.0, hysteresis=2, last_overflow=-1),
        table=plan.table,
        num_shards=plan.num_shards,
        plan_digest=plan.digest,
        moments=tuple(moments),
        files=tuple(files),
        job={"optimizer": {"name": "adamw", "betas": [0.9, 0.95]}},
        evaluation=1.25,
        windlass_version="0.1.0",
        created="2026-01-02T03:04:05+00:00",
    )


def sealed(fields: dict[str, Any]) -> bytes:
    """A manifest of these fields, as somebody would write it who wanted it to be believed."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return seal(json.dumps(rest, indent=1).encode() + b"\n")


def flip(file: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def write_checkpoint(
    checkpoint_dir: Path, table: ParameterTable, num_shards: int, arrays: Arrays, version: int = 100
) -> Path:
    """Write a whole checkpoint and return its folder."""
    plan = make_plan(table, num_shards)
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    folder = checkpoint_folder(checkpoint_dir, version)
    files = [write_shard_file(folder, plan, shard, arrays) for shard in range(num_shards)]
    moments = [name for name in arrays if name != "weights"]
    write_manifest(folder, make_manifest(plan, files, version, moments))
    return folder
