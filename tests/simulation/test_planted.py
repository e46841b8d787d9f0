"""Every planted bug is found within some seeds, by what it does and not by how it looks."""

from __future__ import annotations

import pytest

from tests.simulation import planted
from tests.simulation.planted import Plant
from tests.simulation.simulation import simulate

#: Rough runs in which a bug has to show, at most.
SEEDS = 150


@pytest.mark.timeout(600)
@pytest.mark.parametrize("plant", [*planted.ALONE, *planted.OF_STANDBYS], ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    standbys = int(plant in planted.OF_STANDBYS)
    with plant():
        found = (seed for seed in range(SEEDS) if simulate(seed, rough=True, standbys=standbys).wrong)
        seed = next(found, None)
    assert seed is not None, "nobody noticed"
    assert simulate(seed, rough=True, standbys=standbys).wrong == [], "it is the bug that was found"
