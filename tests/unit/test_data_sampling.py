"""The order of samples: a pure function, and every window exactly once per data pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.data.sampling import slot_indices, slot_seed


@given(
    seed=st.integers(0, 2**63 - 1),
    num_windows=st.integers(1, 700),
    micro_batch_size=st.integers(1, 9),
    slots_per_step=st.integers(1, 5),
    data_pass=st.integers(0, 3),
)
def test_every_window_comes_once_in_each_pass(
    seed: int, num_windows: int, micro_batch_size: int, slots_per_step: int, data_pass: int
) -> None:
    first, end = data_pass * num_windows, (data_pass + 1) * num_windows
    batches = range(first // micro_batch_size, -(-end // micro_batch_size))
    stream = np.concatenate(
        [
            slot_indices(
                seed,
                batch // slots_per_step,
                batch % slots_per_step,
                slots_per_step,
                micro_batch_size,
                num_windows,
            )
            for batch in batches
        ]
    )
    skip = first - batches.start * micro_batch_size
    assert sorted(stream[skip : skip + num_windows]) == list(range(num_windows))


def test_the_order_does_not_depend_on_how_samples_are_dealt() -> None:
    one = np.concatenate([slot_indices(7, 0, slot, 8, 4, 1000) for slot in range(8)])
    other = np.concatenate([slot_indices(7, step, slot, 2, 8, 1000) for step in range(2) for slot in range(2)])
    assert one.dtype == np.int64
    assert one.tolist() == other.tolist()


def test_the_order_is_pinned() -> None:
    """A change of these numbers changes what a resumed run reads."""
    assert slot_indices(1, 0, 0, 1, 8, 100).tolist() == [19, 8, 54, 33, 67, 40, 0, 56]
    assert slot_seed(1, 0, 0) == 7950191023777093753


def test_seeds_and_passes_shuffle_differently() -> None:
    first = slot_indices(1, 0, 0, 1, 500, 500)
    assert (first == slot_indices(1, 1, 0, 1, 500, 500)).mean() < 0.05
    assert (first == slot_indices(2, 0, 0, 1, 500, 500)).mean() < 0.05
    assert (first == np.arange(500)).mean() < 0.05


@pytest.mark.parametrize("num_windows", [500, 512, 513])
def test_the_shuffle_is_spread_evenly(num_windows: int) -> None:
    """Over seeds, the first sample is uniform: chi-square over ten bins, far below a 1e-6 tail (50)."""
    firsts = [slot_indices(seed, 0, 0, 1, 1, num_windows)[0] for seed in range(2000)]
    counts = np.histogram(firsts, bins=10, range=(0, num_windows))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 50


def test_large_corpora_and_late_steps() -> None:
    indices = slot_indices(3, 10**9, 100, 8192, 64, 3 * 10**9)
    assert len(set(indices.tolist())) == 64
    assert indices.min() >= 0
    assert indices.max() < 3 * 10**9


def test_slot_seeds_differ_and_fit_torch() -> None:
    seeds = [slot_seed(seed, step, slot) for seed in range(3) for step in range(30) for slot in range(30)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("slot", "num_windows"), [(2, 10), (-1, 10), (0, 0)])
def test_what_cannot_be_is_refused(slot: int, num_windows: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        slot_indices(1, 0, slot, 2, 4, num_windows)
