"""Every planted bug is found within some seeds, by what it does and not by how it looks."""

from __future__ import annotations

import random

import pytest

from ps.types import Role
from tests.simulation import faults, planted
from tests.simulation.planted import Plant
from tests.simulation.simulation import MESSAGES, Outcome, simulate

#: Rough runs in which a bug has to show, at most.
SEEDS = 400
#: Shards that die in a run, of the bugs that show then.
DEATHS = 25


@pytest.mark.timeout(600)
@pytest.mark.parametrize("plant", [*planted.ALONE, *planted.OF_STANDBYS], ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    def rough(seed: int) -> Outcome:
        drawn = faults.deaths(random.Random(f"{seed}-deaths"), MESSAGES, DEATHS, Role.SHARD)
        only = drawn if plant in planted.OF_DEATHS else None
        return simulate(seed, rough=True, standbys=int(plant in planted.OF_STANDBYS), only=only)

    with plant():
        seed = next((seed for seed in range(SEEDS) if rough(seed).wrong), None)
    assert seed is not None, "nobody noticed"
    assert rough(seed).wrong == [], "it is the bug that was found"
