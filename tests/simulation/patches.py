"""Puts the simulated modules where Windlass's modules have the real ones, for as long as a simulation runs.

Nothing in Windlass knows of the simulation: a module's `threading`, `queue`, `time`, `os` and `grpc` are names in it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from ps.coordinator import app as coordinator_app
from ps.coordinator import effects, summarizer
from ps.kernels import reduce as kernels
from ps.shard import app as shard_app
from ps.shard.store import Store
from ps.sharding import plan
from ps.wire import options
from tests.simulation import sequential, threads
from tests.simulation.disk import Disk
from tests.simulation.network import Network

#: Modules of the standard library, by the name under which they are imported, and what stands for them.
_STANDING_IN = (
    ("threading", threading, threads.threading),
    ("queue", queue, threads.queue),
    ("time", time, threads.time),
    ("futures", concurrent.futures, threads.futures),
    ("ThreadPoolExecutor", concurrent.futures.ThreadPoolExecutor, threads.ThreadPoolExecutor),
    ("Future", concurrent.futures.Future, threads.Future),
)


class _Mute:
    """Health and reflection, which nobody asks for here, and Prometheus."""

    def __init__(self, *_: Any) -> None:
        pass

    def serving(self) -> None:
        pass

    def not_serving(self) -> None:
        pass

    def look(self, _machine: Any) -> None:
        pass


def _nothing(*_: Any) -> None:
    pass


@functools.cache
def _of_every_simulation() -> list[tuple[Any, str, Any]]:
    found: list[tuple[Any, str, Any]] = []
    for name, module in sorted(sys.modules.items()):
        if (name.startswith("ps.") and not name.startswith("ps.kernels")) or name == "workers.engine.worker":
            found += [(module, as_, mine) for as_, real, mine in _STANDING_IN if getattr(module, as_, None) is real]
    found += [(module, name, _Mute) for module, name in ((coordinator_app, "Monitor"), (coordinator_app, "Health"))]
    found += [(shard_app, "Health", _Mute), (shard_app, "warm_up", _nothing), (shard_app, "check_denormals", _nothing)]
    found += [(module, "enable_reflection", _nothing) for module in (coordinator_app, shard_app)]
    found.append((effects, "distribution_version", functools.cache(effects.distribution_version)))
    # A coordinator that starts again has a summary to begin with.
    found += [(summarizer, "EVERY_RECORDS", 20), (summarizer, "CHECK_S", 0.1)]
    # A segment of 65,536 elements would take a thousand times as long to compute as its message takes to be handled.
    return [*found, (plan, "SEGMENT", sequential.CHUNK)]


@functools.cache
def _storing() -> list[Any]:
    return [m for name, m in sorted(sys.modules.items()) if name.startswith("ps.storage.") and hasattr(m, "os")]


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Cut plans as a simulation does."""
    with _replaced([(plan, "SEGMENT", sequential.CHUNK)]):
        yield


@contextlib.contextmanager
def simulated(network: Network, disk: Disk, rng: random.Random, kernel_s: float) -> Iterator[None]:
    """Run Windlass on simulated threads, a simulated clock, network and disk.

    Args:
        kernel_s: what a kernel of a shard takes at most, in seconds.
    """
    mine: list[tuple[Any, str, Any]] = [(module, "os", disk) for module in _storing()]
    mine.append((options, "grpc", network.module()))
    mine.append((shard_app, "random", SimpleNamespace(SystemRandom=lambda: rng)))
    if kernel_s:
        mine += [
            (owner, name, _slow(owner, name, rng, kernel_s)) for owner, name in ((Store, "apply"), (kernels, "reduce"))
        ]
    with _replaced([*_of_every_simulation(), *mine]):
        yield


def _slow(owner: Any, name: str, rng: random.Random, most_s: float) -> Callable[..., Any]:
    real = getattr(owner, name)

    def kernel(*arguments: Any) -> Any:
        threads.time.sleep(rng.choice((0.0, 0.01, 1.0)) * rng.random() * most_s)
        return real(*arguments)

    return kernel


@contextlib.contextmanager
def _replaced(what: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in what]
    try:
        for module, name, mine in what:
            setattr(module, name, mine)
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)
