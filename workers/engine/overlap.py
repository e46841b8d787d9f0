"""When a layer's weights are needed, and when a chunk's gradient is finished: hooks on a module.

Both are learned in the first contribution, not assumed. Its forward shows which modules are called at all:
what belongs to one that is not (its weight is read by somebody else) is needed before the forward begins.
Its backward shows whether each gradient comes once: the chunks of one that comes more often wait for its end.

What this does not see is a module whose weight somebody else reads before it is called itself: such a model
needs `worker.overlap=false`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ps.errors import GradientError
from ps.sharding import Chunk, Plan

Need = Callable[[Sequence[Chunk] | None], None]


class Layers:
    """Has modules wait for their own weights before their forward."""

    def __init__(self, module: nn.Module, chunks_of: Callable[[Iterable[nn.Parameter]], list[Chunk]]) -> None:
        self._module = module
        self._chunks_of = chunks_of
        self._need: Need | None = None
        #: Modules with trainable parameters of their own, until the first forward has ended.
        self._uncalled: dict[nn.Module, list[Chunk]] = {}
        self._learned = False
        #: What is needed before the forward.
        self._first: list[Chunk] = []

    def watch(self) -> None:
        """Put the hooks in place, once the parameters are."""
        for module in self._module.modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                chunks = self._chunks_of(own)
                self._uncalled[module] = chunks
                module.register_forward_pre_hook(self._hook(chunks))

    def _hook(self, chunks: list[Chunk]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _: Any) -> None:
            if self._need is None:
                return
            if self._learned:
                self._need(chunks)
            else:
                self._uncalled.pop(module, None)

        return hook

    @contextmanager
    def needing(self, need: Need) -> Iterator[None]:
        """Have the forwards inside wait.

        Args:
            need: returns when weights of these chunks are there; None: of all.
        """
        need(self._first if self._learned else None)
        self._need = need
        try:
            yield
        finally:
            self._need = None
        if not self._learned:
            self._learned = True
            unique = {chunk.index: chunk for chunks in self._uncalled.values() for chunk in chunks}
            self._first = [unique[index] for index in sorted(unique)]
            self._uncalled.clear()


class AtTheEnd:
    """In the place of `Finishing`: every chunk is finished when its backward is over, and not before."""

    @contextmanager
    def telling(self, on_chunk: Callable[[Chunk], None]) -> Iterator[None]:
        del on_chunk
        yield

    def came(self, tensor: int) -> None:
        """The gradient of a tensor has come, maybe not for the last time."""


class Finishing:
    """Tells which chunks a backward has finished."""

    def __init__(self, plan: Plan) -> None:
        tensors = len(plan.table.tensors)
        self._plan = plan
        self._chunks: list[list[Chunk]] = [[] for _ in range(tensors)]
        #: How many tensors each chunk has a part of.
        self._parts: dict[int, int] = {}
        for chunk in plan.chunks:
            parts = {run.tensor for run in chunk.runs}
            self._parts[chunk.index] = len(parts)
            for tensor in parts:
                self._chunks[tensor].append(chunk)
        #: Tensors whose gradient came more than once in one backward.
        self._repeated: set[int] = set()
        self._times = [0] * tensors
        self._learned = False
        self._missing: dict[int, int] = {}
        self._on_chunk: Callable[[Chunk], None] | None = None

    @contextmanager
    def telling(self, on_chunk: Callable[[Chunk], None]) -> Iterator[None]:
        """Call `on_chunk` with each chunk that the one backward inside finishes, where that can be known."""
        self._times = [0] * len(self._times)
        self._missing = dict(self._parts)
        self._on_chunk = on_chunk
        try:
            yield
        finally:
            self._on_chunk = None
        self._learned = True

    def came(self, tensor: int) -> None:
        """The gradient of a tensor has come.

        Raises:
            GradientError: it had come already, and was pushed.
        """
        if self._on_chunk is None:
            return
        self._times[tensor] += 1
        if not self._learned:
            if self._times[tensor] > 1:
                self._repeated.add(tensor)
            return
        if tensor in self._repeated:
            return
        if self._times[tensor] > 1:
            raise GradientError(
                f"the gradient of {self._plan.table.tensors[tensor].name} came twice in one backward, where it came "
                "once before, and may have been pushed already; set worker.overlap=false"
            )
        for chunk in self._chunks[tensor]:
            self._missing[chunk.index] -= 1
            if not self._missing[chunk.index]:
                self._on_chunk(chunk)
