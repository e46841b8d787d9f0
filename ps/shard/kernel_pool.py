"""The threads that a shard's kernels run on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ps.errors import WaitTimeout
from ps.shard import metrics
from ps.sharding import Chunk

log = logging.getLogger(__name__)

#: What the kernels at work may take to end before state is loaded.
QUIESCE_S = 60.0


class KernelPool:
    """A few threads, and jobs that wait for one. Thread-safe.

    Args:
        failed: told of what a job raises.
    """

    def __init__(self, threads: int, failed: Callable[[BaseException], None]) -> None:
        self.threads = threads
        self._failed = failed
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kernel")
        metrics.KERNEL_THREADS.set(threads)

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Have something done, some time."""
        metrics.JOBS_WAITING.inc()
        self._pool.submit(self._guarded, work, *arguments)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        metrics.JOBS_WAITING.dec()
        try:
            work(*arguments)
        except BaseException as error:
            log.exception("a kernel thread failed")
            self._failed(error)

    def for_each(self, work: Callable[[Chunk], None], chunks: Iterable[Chunk]) -> None:
        """Do something with each chunk, on all threads; returns when all is done."""
        for _ in self._pool.map(work, chunks):
            pass

    def quiesce(self) -> None:
        """Wait until everything that was submitted has been done.

        Raises:
            WaitTimeout: a kernel does not end; asking again may succeed.
        """
        barrier = threading.Barrier(self.threads + 1)
        for _ in range(self.threads):
            self._pool.submit(barrier.wait, QUIESCE_S)
        try:
            barrier.wait(QUIESCE_S)
        except threading.BrokenBarrierError:
            raise WaitTimeout(f"the kernel threads are still busy after {QUIESCE_S:.0f} s") from None

    def close(self) -> None:
        """Stop the threads; pending work is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
