"""How many threads a shard's kernels get. Pure."""

from __future__ import annotations

#: More threads of one process would wait for each other: a chunk of 1 Mi elements is 2 ms of kernels and about a tenth
#: of that of the interpreter, which one thread at a time may use.
MAX_THREADS = 8


def kernel_threads(asked: int | None, cores: int, shards_on_machine: int, chunks: int) -> int:
    """Choose the kernel threads of a shard; what it computes does not depend on them.

    A core is one shard's: two threads of two processes do more than two of one. Workers are not counted: they wait
    while a step is updated, and while they compute a shard has little to do.

    Args:
        asked: `cluster.threads_per_shard`; None: automatic.
        cores: that the shard's process may use.
        shards_on_machine: shards of the run that share these cores, this one included.
        chunks: of this shard; a chunk is one thread's.
    """
    if asked is not None:
        return asked
    return max(1, min(cores // shards_on_machine, chunks, MAX_THREADS))
