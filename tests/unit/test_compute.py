"""A contribution's order of work: what was computed before stays to be pushed until something is written over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ps.client.pusher import Contribution
from ps.sharding import Chunk, make_plan
from ps.types import WireDtype
from workers.config import ModelConfig
from workers.data.batches import HeldOut
from workers.engine.compute import Contributor
from workers.engine.flat_model import FlatModel, without_values
from workers.models.gpt import GPT
from workers.models.groups import parameter_table

CONFIG = ModelConfig.model_validate({"num_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48})
VOCAB, LENGTH, SLOTS = 50, 12, 4


class Bench:
    """A contributor, whose batches and steps it is itself; it writes down what happens."""

    def __init__(self, contributions: int) -> None:
        with without_values():
            model = GPT(CONFIG, VOCAB, LENGTH)
        plan = make_plan(parameter_table(model, decay_all=False), 1)
        on_cpu = torch.device("cpu")

        def initial_value(name: str) -> Tensor:
            return torch.zeros(model.get_parameter(name).shape)

        self.flat = FlatModel(model, plan, on_cpu, torch.float32, WireDtype.FP32, False, initial_value)
        values = np.random.default_rng(0).standard_normal(plan.size, np.float32) * np.float32(0.1)
        for chunk in plan.chunks:
            self.flat.decode(chunk, values[chunk.start : chunk.stop])
        self.slots_each = SLOTS // contributions
        self.events: list[str] = []
        #: The gradient, at each time at which it was said that it is about to be overwritten.
        self.forgotten: list[Tensor] = []
        # Nothing is evaluated.
        no_data = cast(HeldOut, None)
        self.contributor = Contributor(model, self.flat, self, no_data, 1, SLOTS, contributions, 1, False, self)

    def batch(self, step: int, slot: int) -> np.ndarray:
        self.events.append(f"forward {slot}")
        return np.random.default_rng((step, slot)).integers(0, VOCAB, (2, LENGTH + 1))

    def await_weights(self, chunks: Sequence[Chunk] | None) -> None:
        pass

    def forget_gradient(self) -> None:
        self.events.append("forget")
        self.forgotten.append(self.flat.gradients.clone())

    def begin_push(self, contribution: int, report: Callable[[], tuple[float, int]]) -> Contribution:
        self.events.append(f"push {contribution}")
        assert report()[1] == 2 * LENGTH * self.slots_each
        return Contribution(0, contribution, 1.0, report)

    def push_chunk(self, contribution: Contribution, chunk: Chunk) -> None:
        pass


@pytest.mark.parametrize("contributions", [2, 4])
def test_what_was_computed_is_pushed_until_the_first_backward_of_the_next(contributions: int) -> None:
    bench = Bench(contributions)
    each = bench.slots_each
    bench.contributor.contribute(0, 0, 1.0)
    first = bench.flat.gradients.clone()
    assert first.any()
    bench.contributor.contribute(0, 1, 1.0)
    forwards = [f"forward {slot}" for slot in range(2 * each)]
    expected = []
    for contribution in range(2):
        mine = forwards[contribution * each :][:each]
        expected += [mine[0], "forget", *mine[1:], f"push {contribution}"]
    assert bench.events == expected
    assert torch.equal(bench.forgotten[1], first), "whole until then"
    assert not torch.equal(bench.flat.gradients, first)
