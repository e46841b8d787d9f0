"""Plans of any table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ConfigError
from ps.sharding import make_plan
from ps.types import SEGMENT, ParameterTable, TensorSpec
from tests.support.plans import bound, check, load_ratio

SIZES = st.one_of(
    st.integers(1, 300),
    st.integers(1, 300_000),
    st.sampled_from([63, 64, 65, SEGMENT - 1, SEGMENT, SEGMENT + 1, 16 * SEGMENT, 16 * SEGMENT + 1, 5_000_000]),
)


@given(st.lists(st.tuples(SIZES, st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_a_plan_is_whole_and_even(tensors: list[tuple[int, int]], num_shards: int) -> None:
    table = ParameterTable(tuple(TensorSpec(str(i), (size,), group) for i, (size, group) in enumerate(tensors)))
    try:
        plan = make_plan(table, num_shards)
    except ConfigError:
        with pytest.raises(ConfigError, match="use at most"):
            make_plan(table, num_shards)
        assert sum(-(-size // 64) * 64 for size, _ in tensors) <= SEGMENT * (num_shards - 1)
        return
    check(plan)
    assert make_plan(ParameterTable.unpack(table.packed()), num_shards).digest == plan.digest
    # The chunk, not the segment, may be the step when padding is most of it: sizes of 1 to 64.
    assert load_ratio(plan) <= max(bound(plan.size, num_shards), 1 + (num_shards - 1) * plan.chunks[0].size / plan.size)
