"""A module over two flat buffers: views, ties, presence, accumulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ps.sharding import Plan, make_plan
from ps.types import WireDtype
from workers.engine.flat_model import FlatModel, without_values
from workers.models.groups import parameter_table


class Net(nn.Module):
    """A tied embedding, a branch that may be left out, and a frozen tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 40)
        self.used = nn.Linear(40, 40)
        self.unused = nn.Linear(40, 40)
        self.head = nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens: Tensor, everything: bool = False) -> Tensor:
        hidden = self.used(self.embed(tokens))
        hidden = hidden + self.unused(hidden) if everything else hidden
        logits: Tensor = self.head(hidden)
        return logits.float().logsumexp(-1).mean()


TOKENS = torch.arange(24).reshape(2, 12)


def flatten(
    module: nn.Module, dtype: torch.dtype = torch.float32, accumulate_fp16: bool = False
) -> tuple[FlatModel, Plan]:
    plan = make_plan(parameter_table(module, decay_all=False), 1)
    values = torch.Generator().manual_seed(1)

    def initial(name: str) -> Tensor:
        return torch.randn(module.get_parameter(name).shape, generator=values) * 0.1

    flat = FlatModel(module, plan, torch.device("cpu"), dtype, WireDtype.FP32, accumulate_fp16, initial)
    for chunk in plan.chunks:
        room = np.zeros(chunk.size, np.float32)
        flat.initial(chunk, room)
        flat.decode(chunk, room)
    return flat, plan


def gradient(flat: FlatModel, plan: Plan, slots: int) -> tuple[np.ndarray, list[bool]]:
    """The encoded gradient of the only chunk, and its presence bits."""
    (chunk,) = plan.chunks
    room = np.zeros(chunk.size, np.float32)
    present = flat.encode(chunk, slots, room).present
    return room, [bool(present[run // 8] >> run % 8 & 1) for run in range(len(chunk.runs))]


@pytest.mark.parametrize("values", [True, False])
def test_parameters_are_views_and_tied_ones_are_one(values: bool) -> None:
    if values:
        module = Net()
    else:
        with without_values():
            module = Net()
        module.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    flat, plan = flatten(module)
    assert module.head.weight is module.embed.weight
    names = [tensor.name for tensor in plan.table.tensors]
    assert names == ["embed.weight", "used.weight", "used.bias", "unused.weight", "unused.bias"]
    flat.weights.fill_(0.25)
    for name in names:
        assert torch.all(module.get_parameter(name) == 0.25)
    assert torch.equal(module.frozen, torch.ones(3))


def test_gradients_add_up_over_slots_and_are_divided_when_they_are_read() -> None:
    module, reference = Net(), Net()
    flat, plan = flatten(module)
    reference.load_state_dict(module.state_dict())
    flat.clear(divide=True)
    for _ in range(3):
        module(TOKENS, everything=True).backward()
    reference(TOKENS, everything=True).backward()
    found, present = gradient(flat, plan, 3)
    assert all(present)
    for tensor, offset in zip(plan.table.tensors, plan.offsets, strict=True):
        expected = reference.get_parameter(tensor.name).grad
        assert expected is not None
        np.testing.assert_allclose(found[offset : offset + tensor.size], expected.flatten().numpy(), rtol=1e-6)


def test_what_had_no_gradient_says_so() -> None:
    module = Net()
    flat, plan = flatten(module)
    flat.clear(divide=True)
    module(TOKENS).backward()
    assert gradient(flat, plan, 1)[1] == [True, True, True, False, False]
    module(TOKENS, everything=True).backward()
    assert all(gradient(flat, plan, 2)[1])
    flat.clear(divide=True)
    found, present = gradient(flat, plan, 1)
    assert not any(present)
    assert not found.any()


@pytest.mark.parametrize(
    ("dtype", "accumulate_fp16"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)]
)
def test_nothing_of_an_earlier_contribution_is_left(dtype: torch.dtype, accumulate_fp16: bool) -> None:
    """Not even a NaN that it ended with, nor a gradient of a tensor that has none this time."""
    module = Net()
    flat, plan = flatten(module, dtype, accumulate_fp16)
    flat.clear(divide=True)
    module(TOKENS).backward()
    alone, _ = gradient(flat, plan, 1)
    flat.clear(divide=True)
    (module(TOKENS, everything=True) * float("nan")).backward()
    assert not np.isfinite(gradient(flat, plan, 1)[0]).all()
    flat.clear(divide=True)
    module(TOKENS).backward()
    np.testing.assert_array_equal(gradient(flat, plan, 1)[0], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sparse_gradient_counts_as_a_dense_one(dtype: torch.dtype) -> None:
    """The first of a contribution, which replaces what is there, and those that add to it."""
    found = []
    for sparse in (True, False):
        module = nn.Embedding(300, 40, sparse=sparse)
        flat, plan = flatten(module, dtype)
        for slots in (2, 1):
            flat.clear(divide=True)
            for _ in range(slots):
                module(TOKENS).float().square().sum().backward()
        found.append(gradient(flat, plan, 1)[0])
    assert found[0].any()
    np.testing.assert_array_equal(*found)


def test_half_precision_gradients_add_up_in_fp32() -> None:
    """Where FP16 would stay at 2048, FP32 goes on counting."""
    module = nn.Linear(1, 1, bias=False)
    flat, plan = flatten(module, torch.float16)
    flat.clear(divide=True)
    for value in (2048.0, 1.0, 1.0, 1.0):
        (module.weight * value).sum().backward()
    assert gradient(flat, plan, 1)[0][0] == 2051.0
    assert module.weight.grad is None, "the half-precision gradient is freed at once"


def test_half_precision_accumulation_stays_half_and_is_not_divided() -> None:
    module = nn.Linear(1, 1, bias=False)
    flat, plan = flatten(module, torch.float16, accumulate_fp16=True)
    flat.clear(divide=False)
    for value in (2048.0, 1.0):
        (module.weight * value).sum().backward()
    assert flat.gradients.dtype is torch.float16
    assert gradient(flat, plan, 4)[0][0] == 2048.0
