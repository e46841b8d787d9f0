"""The built-in GPT: Llama's computation under Llama's names, so that Hugging Face loads it as Llama.

B: batch, L: sequence, T: L + 1, V: vocabulary, E: hidden, F: feed-forward, H: heads, D: head (E / H).
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import ModelConfig

_INITIAL_STD = 0.02
#: The projections that write into the residual stream: smaller at the start, by depth.
_RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


def _norm(config: ModelConfig) -> nn.RMSNorm:
    """Root mean square normalization; torch computes it in float32 whatever the weights are, as Llama does.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


def rotary_tables(length: int, head_size: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos_LD and sin_LD, the sine's first half negated, in the dtype and on the device of `like`.

    They are computed where they are used: no buffer that a cast to half precision would spoil.

    Source: Su et al., "RoFormer" (2021), in Llama's arrangement (element i is rotated with i + D/2).
    """
    exponents = torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size
    positions = torch.arange(length, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, theta**-exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(like.dtype), torch.cat((-sin, sin), -1).to(like.dtype)


def rotate(x_BHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) by its position's angle."""
    return torch.addcmul(x_BHLD * cos_LD, x_BHLD.roll(x_BHLD.shape[-1] // 2, -1), sin_LD)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x_BLE: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
        query = rotate(self._heads(self.q_proj(x_BLE)), cos_LD, sin_LD)
        key = rotate(self._heads(self.k_proj(x_BLE)), cos_LD, sin_LD)
        value = self._heads(self.v_proj(x_BLE))
        mixed_BHLD = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed_BHLD.transpose(1, 2).reshape(x_BLE.shape))

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU. Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLE)) * self.up_proj(x_BLE))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x_BLE: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
        x_BLE = x_BLE + self._dropped(self.self_attn(self.input_layernorm(x_BLE), cos_LD, sin_LD))
        return x_BLE + self._dropped(self.mlp(self.post_attention_layernorm(x_BLE)))

    def _dropped(self, x_BLE: Tensor) -> Tensor:
        return F.dropout(x_BLE, self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and last norm: what Llama calls `model`."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.config = config

    def forward(self, tokens_BL: Tensor) -> Tensor:
        config = self.config
        x_BLE = F.dropout(self.embed_tokens(tokens_BL), config.dropout, self.training)
        head_size = config.hidden_size // config.num_heads
        cos_LD, sin_LD = rotary_tables(tokens_BL.shape[1], head_size, config.rope_theta, x_BLE)
        for layer in self.layers:
            x_BLE = layer(x_BLE, cos_LD, sin_LD)
        return self.norm(x_BLE)


class GPT(nn.Module):
    """A causal language model.

    Args:
        config: Its shape.
        vocab_size: V.
        sequence_length: L that it is trained at; a longer input is computed, though it never saw one.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.model = Decoder(config, vocab_size)
        self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits, float32 [B, L, V], of the token after each."""
        return self.logits(self.model(tokens_BL))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [..., V] from the decoder's output [..., E].

        A half-precision product adds up in float32 in every backend; what follows it stays there.
        """
        return self.lm_head(hidden).float()

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Return the mean cross entropy in nats, a float32 scalar, over B x L predicted tokens."""
        logits_BLV = self(tokens_BT[:, :-1])
        return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_value(name, seed))

    def initial_value(self, name: str, seed: int) -> Tensor:
        """Return a parameter's initial value, float32 on the CPU: a pure function of (seed, name, shape)."""
        parameter = self.get_parameter(name)
        if parameter.ndim < 2:
            return torch.ones(parameter.shape)
        depth_scale = 1 / math.sqrt(2 * self.config.num_layers)
        std = _INITIAL_STD * (depth_scale if name.endswith(_RESIDUAL_PROJECTIONS) else 1.0)
        return torch.empty(parameter.shape).normal_(0.0, std, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each tensor: adding a layer changes no other one."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
