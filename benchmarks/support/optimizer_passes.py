"""The passes of a shard and of a worker over one problem, and the loops that move the same bytes.

Everything works on the same arrays, in huge pages as in a shard, chunk by chunk. A loop's arithmetic is one addition
an element that the compiler cannot leave out; `nothing` is 0, so that it changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from ps.config import OptimizerConfig
from ps.kernels.convert import decode, encode
from ps.kernels.formats import widen
from ps.kernels.jit import kernel
from ps.kernels.reduce import fold, reduce
from ps.kernels.update import RunTable, Update
from ps.kernels.vectors import WIDTH, load, prefetch, settle, start_of, stream
from ps.pages import zeros
from ps.sharding import Run
from ps.types import MAX_CHUNK, SEGMENT, Decision, Fence, GroupScalars, WireDtype

#: As in the issue's table: two contributions of FP16, a loss scale of 1024.
GRADIENTS = 2
LOSS_SCALE = 1024.0
OPTIMIZER = OptimizerConfig(name="adamw", weight_decay=0.1)
LR = 1e-3

Pass = Callable[[], object]


@numba.njit(nogil=True)
def loop_8(g0: Any, g1: Any, mean: Any) -> None:
    """2 + 2 bytes in, 4 out."""
    for i in range(mean.size):
        mean[i] = np.float32(g0[i] + g1[i])


@kernel
def loop_8_past_the_caches(g0: Any, g1: Any, mean: Any) -> None:
    """The same, with FP16 arithmetic in vectors, without reading the memory that is written."""
    size, g0, g1, mean = mean.size, start_of(g0), start_of(g1), start_of(mean)
    for i in range(0, size, WIDTH):
        prefetch(g0, i)
        prefetch(g1, i)
        stream(mean, i, widen(load(g0, i)) + widen(load(g1, i)), True)
    settle()


@numba.njit(nogil=True)
def loop_30(mean: Any, weights: Any, first: Any, second: Any, published: Any, nothing: Any) -> None:
    """4 bytes in, 3 x 4 in and out, 2 out."""
    for i in range(weights.size):
        gradient = mean[i] * nothing
        weights[i] += gradient
        first[i] += gradient
        second[i] += gradient
        published[i] = np.uint16(np.float32(weights[i]).view(np.uint32))


@numba.njit(nogil=True)
def loop_encode(source: Any, out: Any) -> None:
    """4 bytes in, 2 out."""
    for i in range(out.size):
        out[i] = np.uint16(np.float32(source[i]).view(np.uint32))


@numba.njit(nogil=True)
def loop_decode(source: Any, out: Any) -> None:
    """2 bytes in, 4 out."""
    for i in range(out.size):
        out[i] = np.float32(source[i])


def huge(size: int, dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    return np.frombuffer(zeros(size * dtype.itemsize), dtype, size)


class Problem:
    """A shard's arrays for `size` parameters, with values as in training."""

    def __init__(self, size: int) -> None:
        self.size = size
        rng = np.random.default_rng(0)
        self.gradients = [huge(size, np.uint16) for _ in range(GRADIENTS)]
        self.mean, self.weights, self.first, self.second = (huge(size, np.float32) for _ in range(4))
        self.published = huge(size, np.uint16)
        sample = rng.standard_normal((2, MAX_CHUNK)).astype(np.float32)
        for low, high in self.chunks():
            for index, gradient in enumerate(self.gradients):
                scaled = sample[index, : high - low] * np.float32(1e-3 * LOSS_SCALE)
                encode(scaled, 1, WireDtype.FP16, gradient[low:high])
            self.weights[low:high] = sample[0, : high - low] * np.float32(0.02)
            self.mean[low:high] = self.published[low:high] = 0

    def chunks(self) -> Iterator[tuple[int, int]]:
        for low in range(0, self.size, MAX_CHUNK):
            yield low, min(low + MAX_CHUNK, self.size)


def decision(optimizer: OptimizerConfig) -> Decision:
    return Decision(
        fence=Fence(1, 1),
        step=9,
        skip=False,
        applied=10,
        skipped=0,
        loss=0.0,
        tokens=0,
        gradient_norm=1.0,
        loss_scale=LOSS_SCALE,
        gradient_multiplier=1 / LOSS_SCALE,
        groups=(GroupScalars(LR, optimizer.weight_decay),),
        bias_correction1=1 - optimizer.betas[0] ** 10,
        bias_correction2=1 - optimizer.betas[1] ** 10,
        next_loss_scale=LOSS_SCALE,
        next_hysteresis=1,
        next_last_overflow=-1,
        snapshot=False,
    )


def passes(problem: Problem) -> dict[str, Pass]:
    """What a shard and a worker do, and their loops."""
    p, nothing = problem, np.float32(0)
    weights = [1] * GRADIENTS

    def over_chunks(work: Callable[[slice], object]) -> Pass:
        slices = [slice(low, high) for low, high in p.chunks()]
        return lambda: [work(part) for part in slices]

    def reduce_chunk(part: slice) -> None:
        sums = np.empty(-(-(part.stop - part.start) // SEGMENT))
        gradients = [gradient[part] for gradient in p.gradients]
        reduce(gradients, weights, None, GRADIENTS, WireDtype.FP16, p.mean[part], sums)

    def move_30(part: slice) -> None:
        loop_30(p.mean[part], p.weights[part], p.first[part], p.second[part], p.published[part], nothing)

    first, second = p.gradients
    return {
        "reduce": over_chunks(reduce_chunk),
        "reduce's loop": over_chunks(lambda part: loop_8(first[part], second[part], p.mean[part])),
        "reduce's loop past the caches": over_chunks(
            lambda part: loop_8_past_the_caches(first[part], second[part], p.mean[part])
        ),
        "apply": apply_pass(p, OPTIMIZER, WireDtype.FP16, p.published),
        "apply's loop": over_chunks(move_30),
        "encode": over_chunks(lambda part: encode(p.mean[part], 3, WireDtype.FP16, p.published[part])),
        "encode's loop": over_chunks(lambda part: loop_encode(p.mean[part], p.published[part])),
        "decode": over_chunks(lambda part: decode(first[part], WireDtype.FP16, p.mean[part])),
        "decode's loop": over_chunks(lambda part: loop_decode(first[part], p.mean[part])),
    }


def apply_pass(problem: Problem, optimizer: OptimizerConfig, wire: WireDtype, published: np.ndarray) -> Pass:
    update = Update(optimizer, wire)
    moments = [problem.first, problem.second][: len(update.moment_names)]
    present, decided = np.ones(1, np.bool_), decision(optimizer)
    parts = []
    for low, high in problem.chunks():
        runs = RunTable.build([Run(0, high - low, 0, 0)], high - low)
        parts.append((slice(low, high), [moment[low:high] for moment in moments], runs))

    def run() -> None:
        for part, state, runs in parts:
            update.apply(
                problem.mean[part],
                problem.weights[part],
                state,
                runs,
                present,
                decided,
                published[part],
                part.start,
            )

    return run


def other_paths(problem: Problem) -> dict[str, tuple[int, Pass]]:
    """Paths that the table of the passes does not show: bytes per parameter that must move, and the pass."""
    p = problem
    accumulator, wide = huge(p.size, np.float64), [huge(p.size, np.float32) for _ in range(2)]
    halves = [*p.gradients, *p.gradients]
    for low, high in p.chunks():
        accumulator[low:high] = 1.0
        for gradient in wide:
            gradient[low:high] = p.weights[low:high]

    def reducing(count: int, wire: WireDtype, total: int, start: np.ndarray | None = None) -> Pass:
        sources = wide if wire is WireDtype.FP32 else halves

        def run() -> None:
            for low, high in p.chunks():
                given = [source[low:high] for source in sources[:count]]
                sums = np.empty(-(-(high - low) // SEGMENT))
                begun = None if start is None else start[low:high]
                reduce(given, [1] * count, begun, total, wire, p.mean[low:high], sums)

        return run

    def folding() -> None:
        for low, high in p.chunks():
            fold(accumulator[low:high], [half[low:high] for half in halves], [1] * 4, WireDtype.FP16)

    def applying(wire: WireDtype, **changes: Any) -> Pass:
        # model_copy validates nothing, and nothing here is from outside.
        published = wide[0] if wire is WireDtype.FP32 else p.published
        return apply_pass(p, OPTIMIZER.model_copy(update=changes), wire, published)

    sgd = {"name": "sgd", "weight_decay": 0.0}
    return {
        "reduce, 1 gradient": (6, reducing(1, WireDtype.FP16, 2)),
        "reduce, 3 gradients, G = 3": (10, reducing(3, WireDtype.FP16, 3)),
        "reduce, 4 gradients": (12, reducing(4, WireDtype.FP16, 4)),
        "reduce, 2 gradients and an accumulator": (16, reducing(2, WireDtype.FP16, 8, accumulator)),
        "fold, 4 gradients": (24, folding),
        "reduce, BF16": (8, reducing(2, WireDtype.BF16, 2)),
        "reduce, FP32": (12, reducing(2, WireDtype.FP32, 2)),
        "apply, BF16": (30, applying(WireDtype.BF16)),
        "apply, FP32": (32, applying(WireDtype.FP32)),
        "apply, Adam with L2": (30, applying(WireDtype.FP16, name="adam")),
        "apply, SGD with momentum": (22, applying(WireDtype.FP16, **sgd, momentum=0.9)),
        "apply, SGD": (14, applying(WireDtype.FP16, **sgd, momentum=0.0)),
    }
