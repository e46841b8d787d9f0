"""What a shard says it does fits into a column."""

from __future__ import annotations

import pytest

from ps.shard.doing import describe_step


@pytest.mark.parametrize(
    ("missing", "reduced", "said"),
    [
        ([0, 1], 0, "waiting for contributions 0, 1"),
        ([7], 0, "waiting for contribution 7"),
        ([0, 1, 2, 3, 4, 5], 0, "waiting for contributions 0, 1, 2, 3 and 2 more"),
        ([], 3, "reducing 3/8"),
        ([], 8, "waiting for the decision"),
    ],
)
def test_it_says_what_it_waits_for_or_reduces(missing: list[int], reduced: int, said: str) -> None:
    assert describe_step(missing, reduced, 8) == said
