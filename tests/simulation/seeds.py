"""Many seeds, on several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import partial

from tests.simulation.simulation import Outcome, simulate

#: Seeds that a process takes at once.
BATCH = 10


def outcomes(seeds: range, rough: bool, jobs: int, standbys: int = 1) -> Iterator[Outcome]:
    """Run seeds, in any order.

    Args:
        rough, standbys: as in `simulate`.
        jobs: processes; 1: this one.
    """
    if jobs == 1:
        yield from (simulate(seed, rough=rough, standbys=standbys) for seed in seeds)
        return
    # Not forked: threads of libraries that are loaded by now would be missing. And from a module that can be imported
    # by its name, which a package's __main__ cannot.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(partial(simulate, rough=rough, standbys=standbys), seeds, BATCH)
