"""Anonymous memory that is the system's again as soon as it is let go, in huge pages where there are any.

The heap keeps what is freed (see the malloc settings of the launcher): right for messages that come
and go every millisecond, wrong for hundreds of megabytes that are needed now and then.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np


def zeros(num_bytes: int) -> mmap.mmap:
    """Map zeros that cost nothing until they are touched; unmapped with the last view of them.

    Private: a shared mapping is a file in tmpfs, which has no huge pages on most systems.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, max(num_bytes, 1))
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def float32_zeros(size: int) -> np.ndarray:
    """FP32 [size] of `zeros`."""
    return np.frombuffer(zeros(4 * size), np.float32, size)


def trim_heap() -> None:
    """Give back what the heap keeps, where the C library can: after work that will not be done again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
