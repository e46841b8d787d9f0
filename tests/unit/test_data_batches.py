"""Windows of tokens: the right ones, and the bytes that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from workers.config import DataConfig
from workers.data.batches import HeldOut, TokenBatches
from workers.data.prepare import PreparedData, prepare

LENGTH = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("batches")
    for index in range(20):
        (folder / f"{index:02}.txt").write_text("".join(f"{index} 第 {line} line\n" for line in range(60)))
    return prepare(
        DataConfig(
            paths=(folder,),
            cache_dir=folder / "cache",
            vocab_size=300,
            sequence_length=LENGTH,
            validation_fraction=0.2,
        )
    )


def test_a_pass_reads_every_training_window_once(prepared: PreparedData) -> None:
    batches = TokenBatches(prepared, LENGTH, micro_batch_size=4, seed=1, slots_per_step=2)
    assert batches.num_windows == (prepared.train_tokens - 1) // LENGTH
    tokens = prepared.train()
    expected = sorted(
        tuple(tokens[start : start + LENGTH + 1].tolist()) for start in range(0, batches.num_windows * LENGTH, LENGTH)
    )
    read = [batches.batch(n // 2, n % 2) for n in range(-(-batches.num_windows // 4))]
    assert all(batch.shape == (4, LENGTH + 1) and batch.dtype == np.int64 for batch in read)
    assert sorted(map(tuple, np.concatenate(read)[: batches.num_windows].tolist())) == expected


def test_another_seed_reads_other_windows(prepared: PreparedData) -> None:
    first, second = (TokenBatches(prepared, LENGTH, 8, seed, 1).batch(3, 0) for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, TokenBatches(prepared, LENGTH, 8, 1, 1).batch(3, 0))


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_parts_join_to_the_whole(prepared: PreparedData, parts: int) -> None:
    whole = HeldOut(prepared, LENGTH, 20, 1)
    cut = HeldOut(prepared, LENGTH, 20, parts)
    windows = np.concatenate([cut.part(p) for p in range(parts)])
    assert windows.shape == (20, LENGTH + 1)
    assert np.array_equal(windows, whole.part(0))
    assert sum(cut.bytes_of(p) for p in range(parts)) == whole.bytes_of(0)


def test_windows_are_spread_over_the_held_out_part(prepared: PreparedData) -> None:
    held_out = HeldOut(prepared, LENGTH, 4, 1)
    available = (prepared.validation_tokens - 1) // LENGTH
    tokens = prepared.validation()
    starts = [index * available // 4 * LENGTH for index in range(4)]
    assert [row.tolist() for row in held_out.part(0)] == [
        tokens[start : start + LENGTH + 1].tolist() for start in starts
    ]


def test_all_windows_stand_for_all_bytes_but_the_ends(prepared: PreparedData) -> None:
    held_out = HeldOut(prepared, LENGTH, 10**6, 7)
    assert held_out.num_windows == (prepared.validation_tokens - 1) // LENGTH
    tokens, lengths = prepared.validation(), prepared.token_bytes()
    end = held_out.num_windows * LENGTH + 1
    unread = lengths[tokens[0]] + lengths[tokens[end:]].sum()
    assert sum(held_out.bytes_of(p) for p in range(7)) == prepared.validation_bytes - unread


def test_bytes_are_those_of_the_decoded_text(prepared: PreparedData) -> None:
    held_out = HeldOut(prepared, LENGTH, 10**6, 1)
    targets = held_out.part(0)[:, 1:].flatten().tolist()
    text = prepared.tokenizer().decode(targets, skip_special_tokens=True)
    assert "\ufffd" not in text
    assert held_out.bytes_of(0) == len(text.encode())


@pytest.mark.parametrize("part", [-1, 3])
def test_a_part_that_does_not_exist_is_refused(prepared: PreparedData, part: int) -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.2"):
        HeldOut(prepared, LENGTH, 20, 3).part(part)
