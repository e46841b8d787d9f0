"""The built-in GPT's parameters and its work, from its configuration alone: no torch. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ps.types import ParameterTable, TensorSpec
from workers.config import ModelConfig

#: As in workers.models.groups, which needs torch; a test holds the two together.
DECAYED, NOT_DECAYED = 0, 1


def parameter_table(model: ModelConfig, vocab_size: int, decay_all: bool) -> ParameterTable:
    """List the trainable tensors, as `workers.models.groups.parameter_table` lists those of the module."""
    return ParameterTable(
        tuple(
            TensorSpec(name, shape, DECAYED if decay_all or decays else NOT_DECAYED)
            for name, shape, decays in _tensors(model, vocab_size)
        )
    )


def _tensors(model: ModelConfig, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    hidden, wide = model.hidden_size, model.feed_forward_size
    yield "model.embed_tokens.weight", (vocab_size, hidden), False
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), False
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}self_attn.{name}.weight", (hidden, hidden), True
        yield prefix + "post_attention_layernorm.weight", (hidden,), False
        yield prefix + "mlp.gate_proj.weight", (wide, hidden), True
        yield prefix + "mlp.up_proj.weight", (wide, hidden), True
        yield prefix + "mlp.down_proj.weight", (hidden, wide), True
    yield "model.norm.weight", (hidden,), False


def flops_per_token(model: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """Count the multiplications and additions of forward and backward, per token.

    Six for each element of a matrix (the tied embedding counts once, as the output projection), and
    12 * layers * hidden * length for the attention, masked part included.

    Source: Chowdhery et al., "PaLM" (2022), appendix B.
    """
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.feed_forward_size
    matrices = model.num_layers * layer + vocab_size * model.hidden_size
    return 6 * matrices + 12 * model.num_layers * model.hidden_size * sequence_length


def saved_elements(model: ModelConfig, tokens: int) -> int:
    """Count the elements that forward keeps for backward in a micro-batch, logits left out.

    A layer keeps for each token: both norms' inputs, normalized values and outputs (6 E), query, key,
    value and attention's result (4 E) with the logarithm of its sums (one per head), and four of the
    feed-forward's width. Dropout keeps its masks.

    Args:
        tokens: of the micro-batch, samples times length.
    """
    hidden = model.hidden_size
    layer = 10 * hidden + 4 * model.feed_forward_size + model.num_heads
    masks = (2 * model.num_layers + 1) * hidden if model.dropout else 0
    return tokens * (model.num_layers * layer + 2 * hidden + masks)
