"""The GPT: Llama's names and numbers, initial values from the seed alone, every precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.config import ModelConfig
from workers.models.gpt import GPT

CONFIG = ModelConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48})
VOCAB, LENGTH = 50, 12


def build(seed: int = 1, **changes: object) -> GPT:
    model = GPT(CONFIG.model_copy(update=changes), VOCAB, LENGTH)
    model.initialize(seed)
    return model


def tokens(batch: int = 3, length: int = LENGTH + 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def llama(state: dict[str, Tensor], config: ModelConfig, tokens_BL: Tensor) -> Tensor:
    """Llama's forward pass as transformers computes it (eager attention), from a state dictionary."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps))

    def rotate_half(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    batch, length = tokens_BL.shape
    head = config.hidden_size // config.num_heads
    inverse = 1.0 / (config.rope_theta ** (torch.arange(0, head, 2).float() / head))
    angles = torch.arange(length).float()[:, None] * inverse
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    mask = torch.full((length, length), -math.inf).triu(1)
    x = state["model.embed_tokens.weight"][tokens_BL]
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        h = norm(x, state[prefix + "input_layernorm.weight"])
        q, k, v = (
            (h @ state[prefix + f"self_attn.{name}_proj.weight"].T)
            .view(batch, length, config.num_heads, head)
            .transpose(1, 2)
            for name in "qkv"
        )
        q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        mixed = (q @ k.transpose(2, 3) / math.sqrt(head) + mask).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).reshape(x.shape) @ state[prefix + "self_attn.o_proj.weight"].T
        h = norm(x, state[prefix + "post_attention_layernorm.weight"])
        gate, up, down = (state[prefix + f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T


def test_names_are_llamas_and_the_head_is_tied() -> None:
    model = build()
    layer = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
    expected = {f"model.layers.{index}.{name}.weight" for index in range(2) for name in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(model.state_dict()) == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "model.embed_tokens.weight"
    assert set(names) == expected - {"lm_head.weight"}


def test_logits_are_llamas() -> None:
    model = build(rope_theta=500.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    inputs = tokens()[:, :-1]
    torch.testing.assert_close(model(inputs), llama(model.state_dict(), model.config, inputs), rtol=1e-4, atol=1e-4)


def test_the_default_model_has_at_least_3m_parameters() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig.model_validate({}), 4096, 256)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 3_000_000


def test_a_token_does_not_see_what_comes_after_it() -> None:
    model = build()
    inputs = tokens()[:, :-1]
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model = build()
    batch = tokens()
    log_probabilities = model(batch[:, :-1]).log_softmax(-1)
    expected = -log_probabilities.gather(-1, batch[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(batch), expected)
    assert model.loss(batch).item() == pytest.approx(math.log(VOCAB), rel=0.02)


def test_initial_values_follow_from_the_seed_alone() -> None:
    first = build(seed=5)
    torch.manual_seed(99)
    again = build(seed=5)
    other = build(seed=6)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name]) == name.endswith("norm.weight")


def test_initial_values_have_llamas_scales() -> None:
    config = ModelConfig.model_validate({"num_layers": 8, "hidden_size": 64, "num_heads": 2})
    model = GPT(config, 500, 16)
    model.initialize(1)
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value))
        else:
            scale = 0.25 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            assert value.std().item() == pytest.approx(0.02 * scale, rel=0.05), name
            assert abs(value.mean().item()) < 0.002, name


def test_dropout_works_in_training_only_and_follows_the_seed() -> None:
    model = build(dropout=0.5)
    batch = tokens()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(batch).item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2) == build().loss(batch).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_compute_close_to_float32(dtype: torch.dtype) -> None:
    reference, model = build(), build().to(dtype)
    batch = tokens()
    losses = reference.loss(batch), model.loss(batch)
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
    torch.autograd.backward([losses[0], losses[1] * 1024])
    for (name, expected), actual in zip(reference.named_parameters(), model.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert actual.grad.dtype == dtype
        error = (actual.grad.float() / 1024 - expected.grad).norm() / expected.grad.norm()
        assert error < 0.05, name


def test_a_cast_to_half_and_back_keeps_the_positions() -> None:
    model = build()
    weights = {name: value.half().float() for name, value in model.state_dict().items()}
    there_and_back = build().half().float()
    model.load_state_dict(weights)
    inputs = tokens()[:, :-1]
    assert torch.equal(model(inputs), there_and_back(inputs))


def test_it_learns() -> None:
    model = build()
    batch = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(batch)
        torch.autograd.backward(loss)
        optimizer.step()
    assert model.loss(batch).item() < 0.5
