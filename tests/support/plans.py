"""Parameter tables of several kinds, and what holds for every plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ps.sharding import Plan
from ps.types import ALIGNMENT, MAX_CHUNK, SEGMENT, ParameterTable, TensorSpec


def table_of(sizes: Sequence[int]) -> ParameterTable:
    """One-dimensional tensors in group 0."""
    return ParameterTable(tuple(TensorSpec(f"t{index}", (size,)) for index, size in enumerate(sizes)))


def table_of_chunks(count: int) -> ParameterTable:
    """So many chunks of one segment each."""
    return table_of([SEGMENT] * count)


def gpt_table(hidden: int, layers: int, vocabulary: int) -> ParameterTable:
    """A tied embedding, and per layer two norms, attention and SwiGLU, named as Llama's."""
    wide = -(-hidden * 8 // 3 // 64) * 64
    tensors = [TensorSpec("embed", (vocabulary, hidden), 1)]
    for layer in range(layers):
        tensors.append(TensorSpec(f"{layer}.input_norm", (hidden,), 1))
        tensors += [TensorSpec(f"{layer}.{name}", (hidden, hidden)) for name in ("q", "k", "v", "o")]
        tensors.append(TensorSpec(f"{layer}.post_norm", (hidden,), 1))
        tensors += [TensorSpec(f"{layer}.{name}", (wide, hidden)) for name in ("gate", "up")]
        tensors.append(TensorSpec(f"{layer}.down", (hidden, wide)))
    return ParameterTable((*tensors, TensorSpec("norm", (hidden,), 1)))


def embedding_table(parameters: int) -> ParameterTable:
    """Four fifths in one tensor."""
    rest = parameters // 5
    return table_of([parameters - rest, *[rest // 10] * 10])


def small_table(parameters: int) -> ParameterTable:
    """10,000 small tensors of unequal sizes."""
    sizes = np.random.default_rng(3).dirichlet(np.ones(10_000)) * parameters
    return table_of([max(1, int(size)) for size in sizes])


def load_ratio(plan: Plan) -> float:
    loads = [sum(chunk.size for chunk in plan.chunks_of(shard)) for shard in range(plan.num_shards)]
    return max(loads) / (sum(loads) / len(loads))


def check(plan: Plan) -> None:
    """What holds for every plan."""
    table = plan.table
    # Tensors in order, each at a multiple of 64, with nothing but padding between.
    end = 0
    for tensor, offset in zip(table.tensors, plan.offsets, strict=True):
        assert offset == -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.size
    assert plan.size == -(-end // ALIGNMENT) * ALIGNMENT
    # Chunks cover the flat space, without a gap, at borders of segments.
    position = 0
    for index, chunk in enumerate(plan.chunks):
        assert (chunk.index, chunk.start) == (index, position)
        assert chunk.start % SEGMENT == 0
        assert 0 < chunk.size <= MAX_CHUNK
        assert chunk.num_segments == -(-chunk.size // SEGMENT)
        assert chunk.presence_bytes == -(-len(chunk.runs) // 8)
        assert 0 <= chunk.shard < plan.num_shards
        position = chunk.stop
    assert position == plan.size
    # Runs: every tensor exactly once and in order, padding never.
    covered = [0] * len(table.tensors)
    for chunk in plan.chunks:
        last = 0
        for run in chunk.runs:
            assert last <= run.start < run.stop <= chunk.size
            last = run.stop
            assert chunk.start + run.start == plan.offsets[run.tensor] + covered[run.tensor]
            assert run.group == table.tensors[run.tensor].group
            covered[run.tensor] += run.stop - run.start
    assert covered == [tensor.size for tensor in table.tensors]
    # Every shard has its chunks in forward order, and has some.
    owned = [plan.chunks_of(shard) for shard in range(plan.num_shards)]
    assert all(chunks == tuple(sorted(chunks, key=lambda chunk: chunk.start)) and chunks for chunks in owned)
    assert sum(len(chunks) for chunks in owned) == len(plan.chunks)


def bound(size: int, num_shards: int) -> float:
    """At most 1.05 of the mean, where a segment is not more than that.

    A chunk is not cut below a segment: the least loaded shard gets the next one, so the fullest has at
    most (S - 1) / S chunks more than the mean.
    """
    return max(1.05, 1 + (num_shards - 1) * SEGMENT / size)
