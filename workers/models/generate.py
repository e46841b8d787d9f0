"""Sampling from a model. L: sequence length, V: vocabulary, K: candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.models.evaluate import evaluating
from workers.models.gpt import GPT


def generate(
    model: GPT,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    stop_token: int | None = None,
) -> list[int]:
    """Continue a prompt, looking back at most the model's sequence length.

    Args:
        model: On any device; its mode is restored.
        tokens: The prompt, at least one token.
        max_new_tokens: How many to write at most.
        temperature: 0 takes the likeliest token always.
        top_k: Choose among so many of the likeliest; 0: among all.
        seed: The same seed gives the same tokens.
        stop_token: Stop before writing this one.

    Returns:
        The new tokens, without the prompt.
    """
    if not tokens:
        raise ValueError("the prompt has no token; give at least one, such as the end-of-text token")
    device = next(model.parameters()).device
    generator = torch.Generator("cpu").manual_seed(seed)
    written = list(tokens)
    with evaluating(model):
        for _ in range(max_new_tokens):
            window_1L = torch.tensor([written[-model.sequence_length :]], device=device)
            logits_V = model.logits(model.model(window_1L)[0, -1]).cpu()
            token = _choose(logits_V, temperature, top_k, generator)
            if token == stop_token:
                break
            written.append(token)
    return written[len(tokens) :]


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    candidates = min(top_k, len(logits_V)) if top_k > 0 else len(logits_V)
    values_K, tokens_K = logits_V.topk(candidates)
    chosen = torch.multinomial((values_K / temperature).softmax(-1), 1, generator=generator)
    return int(tokens_K[chosen])


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Turn tokens into text that is valid UTF-8 whatever they are: broken characters become U+FFFD.

    Args:
        tokenizer: A byte-level `tokenizers.Tokenizer`.
        tokens: Its tokens; the special one is left out.
    """
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.encode("utf-8", errors="replace").decode("utf-8")
