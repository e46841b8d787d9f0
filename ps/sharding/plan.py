"""The plan: parameter table -> flat space -> segments -> chunks -> shards. A pure function.

The flat space holds every tensor in registration order, each starting at a multiple of 64
elements. It is cut at multiples of 65,536 elements (segments), whatever the tensor borders; a chunk
is a run of segments and belongs to one shard. Every process computes the plan and compares digests.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack
import numpy as np

from ps.errors import ConfigError
from ps.types import ALIGNMENT, MAX_CHUNK, SEGMENT, ParameterTable


@dataclass(frozen=True)
class Run:
    """A stretch of one tensor inside one chunk; offsets are relative to the chunk."""

    start: int
    stop: int
    tensor: int
    group: int


@dataclass(frozen=True)
class Chunk:
    """A contiguous run of the flat space: the unit of transfer, reduction and update."""

    index: int
    shard: int
    #: Offsets in the flat space, in elements.
    start: int
    stop: int
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def num_segments(self) -> int:
        return -(-self.size // SEGMENT)

    @property
    def presence_bytes(self) -> int:
        """Length of the presence map: one bit per run."""
        return -(-len(self.runs) // 8)


def presence_map(chunk: Chunk, present: Sequence[bool]) -> bytes:
    """One bit per run of a chunk, least significant first: its tensor had a gradient.

    Args:
        present: by tensor.
    """
    bits = np.fromiter((present[run.tensor] for run in chunk.runs), np.bool_, len(chunk.runs))
    return np.packbits(bits, bitorder="little").tobytes()


@dataclass(frozen=True)
class Plan:
    """chunk -> shard, for one parameter table and one number of shards."""

    table: ParameterTable
    num_shards: int
    #: Where each tensor starts in the flat space.
    offsets: tuple[int, ...]
    #: Length of the flat space in elements, padding included.
    size: int
    chunks: tuple[Chunk, ...]

    @cached_property
    def _by_shard(self) -> tuple[tuple[Chunk, ...], ...]:
        owned: list[list[Chunk]] = [[] for _ in range(self.num_shards)]
        for chunk in self.chunks:
            owned[chunk.shard].append(chunk)
        return tuple(tuple(chunks) for chunks in owned)

    def chunks_of(self, shard: int) -> tuple[Chunk, ...]:
        """The chunks of a shard, in forward order."""
        return self._by_shard[shard]

    @cached_property
    def _starts(self) -> list[int]:
        return [chunk.start for chunk in self.chunks]

    def chunks_between(self, start: int, stop: int) -> Iterator[Chunk]:
        """The chunks that touch [start, stop) of the flat space."""
        for index in range(bisect_right(self._starts, start) - 1, len(self.chunks)):
            if self.chunks[index].start >= stop:
                return
            yield self.chunks[index]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that two processes must agree on."""
        placement = [[c.start, c.stop, c.shard] for c in self.chunks]
        return hashlib.sha256(msgpack.packb([self.table.digest, self.num_shards, placement])).hexdigest()


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def make_plan(table: ParameterTable, num_shards: int) -> Plan:
    """Lay the table out and place its chunks.

    Raises:
        ConfigError: the table is empty, names a tensor twice, has an empty tensor, or
            there are more shards than segments.
    """
    if num_shards < 1:
        raise ConfigError(f"cluster.shards={num_shards}: at least one shard is needed")
    offsets, position, seen = [], 0, set()
    for tensor in table.tensors:
        if tensor.name in seen:
            raise ConfigError(f"the parameter table names {tensor.name!r} twice; register a tied tensor once")
        if tensor.size < 1:
            raise ConfigError(f"parameter {tensor.name!r} of shape {list(tensor.shape)} has no elements")
        seen.add(tensor.name)
        offsets.append(position)
        position += _align(tensor.size, ALIGNMENT)
    if position == 0:
        raise ConfigError("the parameter table is empty: the model has no trainable parameters")
    borders = _chunk_borders(position, table.num_parameters, num_shards)
    if len(borders) < num_shards:
        raise ConfigError(
            f"cluster.shards={num_shards}: {table.num_parameters} parameters make only {len(borders)} "
            f"chunks of {SEGMENT} elements; use at most {len(borders)} shards"
        )
    placement = _place([stop - start for start, stop in borders], num_shards)
    runs = _runs(table, offsets, borders)
    chunks = tuple(
        Chunk(index, placement[index], start, stop, runs[index]) for index, (start, stop) in enumerate(borders)
    )
    return Plan(table, num_shards, tuple(offsets), position, chunks)


def _chunk_borders(size: int, num_parameters: int, num_shards: int) -> list[tuple[int, int]]:
    """Cut the flat space into chunks: about 20 per shard, at most 1 Mi elements each."""
    wanted = min(MAX_CHUNK, num_parameters // (20 * num_shards))
    length = max(SEGMENT, wanted // SEGMENT * SEGMENT)
    return [(start, min(size, start + length)) for start in range(0, size, length)]


def _place(sizes: list[int], num_shards: int) -> list[int]:
    """Give each chunk, in order, to the least loaded shard; ties go to the lowest index."""
    loads = [(0, shard) for shard in range(num_shards)]
    placement = []
    for size in sizes:
        load, shard = loads[0]
        heapq.heapreplace(loads, (load + size, shard))
        placement.append(shard)
    return placement


def _runs(table: ParameterTable, offsets: list[int], borders: list[tuple[int, int]]) -> list[tuple[Run, ...]]:
    runs: list[list[Run]] = [[] for _ in borders]
    length = borders[0][1] - borders[0][0]
    for index, (tensor, offset) in enumerate(zip(table.tensors, offsets, strict=True)):
        end = offset + tensor.size
        for chunk in range(offset // length, (end - 1) // length + 1):
            start, stop = borders[chunk]
            run = Run(max(offset, start) - start, min(end, stop) - start, index, tensor.group)
            runs[chunk].append(run)
    return [tuple(chunk_runs) for chunk_runs in runs]
