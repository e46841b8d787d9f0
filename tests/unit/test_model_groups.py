"""Parameter groups and the parameter table."""

from __future__ import annotations

import torch
from torch import nn

from ps.types import TensorSpec
from workers.config import ModelConfig
from workers.models.gpt import GPT
from workers.models.groups import decays, embedding_names, parameter_table


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6)
        self.positions = nn.Embedding(5, 4)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.words = nn.Embedding(6, 4)
        self.words.weight = self.head.weight
        self.kernel = nn.Parameter(torch.zeros(2, 3, 4))


def test_the_table_is_in_registration_order_with_tied_once_and_frozen_left_out() -> None:
    assert parameter_table(Odd(), decay_all=False).tensors == (
        TensorSpec("scale", (), 1),
        TensorSpec("kernel", (2, 3, 4), 0),
        TensorSpec("head.weight", (6, 4), 1),
        TensorSpec("head.bias", (6,), 1),
        TensorSpec("positions.weight", (5, 4), 1),
    )


def test_decay_all_makes_one_group() -> None:
    assert {tensor.group for tensor in parameter_table(Odd(), decay_all=True).tensors} == {0}


def test_of_the_gpt_the_projections_decay() -> None:
    model = GPT(ModelConfig.model_validate({"num_layers": 1, "hidden_size": 8, "num_heads": 2}), 20, 8)
    table = parameter_table(model, decay_all=False)
    assert [tensor.name for tensor in table.tensors] == [name for name, _ in model.named_parameters()]
    assert {tensor.name for tensor in table.tensors if tensor.group == 0} == {
        tensor.name for tensor in table.tensors if tensor.name.endswith("_proj.weight")
    }
    assert table.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_decays_knows_embeddings_by_their_module() -> None:
    model = Odd()
    assert embedding_names(model) == {"head.weight", "positions.weight"}
    assert decays("kernel", model.kernel)
    assert not decays("scale", model.scale)
    assert not decays("head.weight", model.head.weight, embedding_names(model))
