"""Compile, or load from the cache, everything that a process will need, before it says that it is ready."""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable

import numpy as np

from ps.errors import StartupError
from ps.kernels import jit
from ps.kernels.convert import decode, encode
from ps.kernels.digest import hash_payload
from ps.kernels.jit import cache_directory
from ps.kernels.reduce import fold, reduce
from ps.kernels.update import RunTable, Update
from ps.sharding import Run
from ps.types import Decision, Fence, GroupScalars, WireDtype

__all__ = ["cache_directory", "check_denormals", "warm_up", "warm_up_worker"]

logger = logging.getLogger(__name__)

_SIZE = 64


def warm_up(update: Update | None, dtype: WireDtype) -> None:
    """Make every kernel ready that a shard needs, so that no step waits for the compiler.

    Args:
        update: the shard's rule; None: only what reduces.
        dtype: of the wire.

    Concurrency: processes may do it at once; each compiles what it does not find in the cache.
    """
    wire = np.zeros(_SIZE, dtype.numpy)
    accumulator, mean = np.zeros(_SIZE), np.zeros(_SIZE, np.float32)
    _ready("hash_payload", lambda: hash_payload(wire))
    _ready("fold", lambda: fold(accumulator, [wire], [1], dtype))
    _ready("reduce", lambda: reduce([wire], [1], accumulator, 1, dtype, mean, np.zeros(1)))
    if update is None:
        return
    weights, moments = np.zeros(_SIZE, np.float32), [np.zeros(_SIZE, np.float32) for _ in update.moment_names]
    runs, present = RunTable.build([Run(0, _SIZE, 0, 0)], _SIZE), np.ones(1, np.bool_)
    _ready("apply", lambda: update.apply(mean, weights, moments, runs, present, _DECISION, wire, 0))
    _ready("publish", lambda: update.publish(weights, wire))
    _ready("state_hash", lambda: update.state_hash(weights, moments, 0))


def warm_up_worker(dtype: WireDtype) -> None:
    """Make the conversions ready that a worker needs."""
    wire, values = np.zeros(_SIZE, dtype.numpy), np.zeros(_SIZE, np.float32)
    _ready("encode", lambda: encode(values, 1, dtype, wire))
    _ready("hash_payload", lambda: hash_payload(wire))
    _ready("decode", lambda: decode(wire, dtype, values))


def check_denormals(dtype: WireDtype = WireDtype.FP16) -> None:
    """Check that the calling thread, and so the threads that it starts, keeps denormal numbers.

    Raises:
        StartupError: something in this process (often a library built with -ffast-math) turned them off.
    """
    bits = np.ones(1, np.uint32).astype(dtype.numpy) if dtype is not WireDtype.FP32 else _SMALLEST.copy()
    values, back = np.empty(1, np.float32), np.empty(1, dtype.numpy)
    _ready("decode", lambda: decode(bits, dtype, values))
    _ready("encode", lambda: encode(values, 1, dtype, back))
    halved = np.full(1, 2.0**-126, np.float32) * np.float32(0.5)
    restored = halved * np.float32(2.0)
    if values[0] == 0 or back.tobytes() != bits.tobytes() or restored[0] != np.float32(2.0**-126):
        raise StartupError(
            "denormal numbers are flushed to zero in this process, so small gradients would vanish and "
            "results differ from other processes; remove what sets it (a library built with -ffast-math, "
            "torch.set_flush_denormal) or import it after the shard has started"
        )


_SMALLEST = np.ones(1, np.uint32).view(np.float32)

_DECISION = Decision(
    fence=Fence(0, 0),
    step=0,
    skip=False,
    applied=1,
    skipped=0,
    loss=0.0,
    tokens=0,
    gradient_norm=0.0,
    loss_scale=1.0,
    gradient_multiplier=1.0,
    groups=(GroupScalars(lr=0.0, weight_decay=0.0),),
    bias_correction1=1.0,
    bias_correction2=1.0,
    next_loss_scale=1.0,
    next_hysteresis=0,
    next_last_overflow=0,
    snapshot=False,
)


def _ready(name: str, call: Callable[[], object]) -> None:
    """Call a kernel once; a cache that fails is no reason not to start.

    numba keeps a compiled kernel before it writes the cache, so after a failed write the second call works.
    """
    start = time.perf_counter()
    try:
        call()
    except OSError as error:
        logger.warning("the compiled kernel %s could not be kept in %s: %s", name, jit.CACHE, error)
        call()
    except (EOFError, pickle.UnpicklingError) as error:
        logger.warning("the kernel cache %s is damaged and is made anew: %s", jit.CACHE, error)
        shutil.rmtree(jit.CACHE or "", ignore_errors=True)
        call()
    logger.debug("kernel %s is ready after %.2f s", name, time.perf_counter() - start)
