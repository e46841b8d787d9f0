"""Gradients that are not what the model says, in workers that are threads of a test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from ps.client.pusher import Contribution
from ps.sharding import Chunk
from workers.engine.compute import Contributor
from workers.engine.flat_model import FlatModel

#: Changes what is pushed in place: the step, the contribution, the chunk, and its gradient, FP32 [chunk.size].
Change = Callable[[int, int, Chunk, Tensor], None]


def alter(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Push other gradients than those that are computed; the sums on the device stay as they are."""
    contribute, clear, encode = Contributor.contribute, FlatModel.clear, FlatModel.encode
    #: What each model computes, and whose gradient it has: another one's until the first backward.
    computed_by: dict[FlatModel, tuple[int, int]] = {}
    present: dict[FlatModel, tuple[int, int]] = {}

    def contributing(self: Contributor, step: int, contribution: int, loss_scale: float) -> Contribution:
        computed_by[self._flat] = (step, contribution)
        return contribute(self, step, contribution, loss_scale)

    def clearing(self: FlatModel, divide: bool) -> None:
        present[self] = computed_by[self]
        clear(self, divide)

    def encoding(self: FlatModel, chunk: Chunk, slots: int, room: np.ndarray) -> bytes:
        computed = self.gradients
        self.gradients = computed.clone()
        try:
            change(*present[self], chunk, self.gradients[chunk.start : chunk.stop])
            return encode(self, chunk, slots, room)
        finally:
            self.gradients = computed

    monkeypatch.setattr(Contributor, "contribute", contributing)
    monkeypatch.setattr(FlatModel, "clear", clearing)
    monkeypatch.setattr(FlatModel, "encode", encoding)
