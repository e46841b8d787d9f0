"""Sampling, decoding and the held-out loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from workers.config import ModelConfig
from workers.data import bpe
from workers.models.evaluate import evaluate_windows
from workers.models.generate import decode, generate
from workers.models.gpt import GPT

VOCAB, LENGTH = 40, 8


@pytest.fixture
def model() -> GPT:
    config = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "dropout": 0.3}
    model = GPT(ModelConfig.model_validate(config), VOCAB, LENGTH)
    model.initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)
    return model


def test_the_seed_decides_and_the_global_generator_does_not(model: GPT) -> None:
    def write(seed: int) -> list[int]:
        torch.manual_seed(seed * 7)
        return generate(model, [1, 2], 30, 1.5, 0, seed)

    first = write(1)
    torch.manual_seed(5)
    assert len(first) == 30
    assert generate(model, [1, 2], 30, 1.5, 0, 1) == first != write(2)
    assert all(0 <= token < VOCAB for token in first)


def test_no_temperature_and_top_1_take_the_likeliest(model: GPT) -> None:
    greedy = generate(model, [4], 12, 0.0, 0, 1)
    assert greedy == generate(model, [4], 12, 2.0, 1, 9)
    model.eval()
    assert int(model(torch.tensor([[4, *greedy[:5]]]))[0, -1].argmax()) == greedy[5]


def test_it_looks_back_one_sequence_and_no_further(model: GPT) -> None:
    seen: list[list[int]] = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))
    prompt = [1, 2, 3, 4, 5]
    written = prompt + generate(model, prompt, 10, 1.0, 0, 1)
    assert seen == [written[:end][-LENGTH:] for end in range(5, 15)]


def test_top_k_keeps_to_the_likeliest(model: GPT) -> None:
    model.eval()
    likeliest = set(model(torch.tensor([[4]]))[0, -1].topk(3).indices.tolist())
    drawn = {generate(model, [4], 1, 5.0, 3, seed)[0] for seed in range(60)}
    assert drawn == likeliest


def test_it_stops_before_the_stop_token(model: GPT) -> None:
    whole = generate(model, [4], 20, 1.0, 0, 1)
    stop = whole[10]
    assert generate(model, [4], 20, 1.0, 0, 1, stop_token=stop) == whole[: whole.index(stop)]


def test_an_empty_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="the prompt has no token"):
        generate(model, [], 3, 1.0, 0, 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model: GPT, training: bool) -> None:
    model.train(training)
    generate(model, [1], 2, 1.0, 0, 1)
    assert model.training is training
    evaluate_windows(model, np.zeros((1, 5), dtype=np.int64), 1)
    assert model.training is training
    with pytest.raises(IndexError):
        evaluate_windows(model, np.full((1, 5), VOCAB), 1)
    assert model.training is training


def test_decoded_text_is_always_valid(tmp_path: Path) -> None:
    text = "汉字 🎈 text"
    tokenizer = bpe.train([text.encode()], len(text), 260)
    tokens = tokenizer.encode(text).ids
    assert decode(tokenizer, tokens) == text
    end = tokenizer.token_to_id(bpe.END_OF_TEXT)
    assert decode(tokenizer, [*tokens, end]) == text
    chance = np.random.default_rng(1)
    for _ in range(50):
        written = decode(tokenizer, chance.integers(0, tokenizer.get_vocab_size(), 20).tolist())
        (tmp_path / "sample.txt").write_bytes(written.encode("utf-8"))
    assert "\ufffd" in decode(tokenizer, tokens[:1])


def test_the_held_out_loss_is_the_sum_over_tokens(model: GPT) -> None:
    windows = np.random.default_rng(0).integers(0, VOCAB, (7, LENGTH + 1))
    loss_sum, count = evaluate_windows(model, windows, batch_size=3)
    model.eval()
    expected = model.loss(torch.from_numpy(windows)).item()
    assert count == 7 * LENGTH
    assert loss_sum / count == pytest.approx(expected, rel=1e-6)


def test_no_windows_cost_nothing(model: GPT) -> None:
    assert evaluate_windows(model, np.zeros((0, LENGTH + 1), dtype=np.int64), 4) == (0.0, 0)
