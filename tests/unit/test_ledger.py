"""What a worker has contributed, and what the shards hold of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ps.client.ledger import Ledger
from ps.sharding import make_plan
from tests.support.plans import table_of_chunks

#: Shard 0 has chunks 0, 2, 4; shard 1 has 1, 3.
PLAN = make_plan(table_of_chunks(5), 2)
CHUNKS = range(5)


def test_a_contribution_is_complete_with_its_last_shard() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    assert not ledger.complete(1)
    ledger.computed(1)
    assert [ledger.acknowledged(3, 1, shard) for shard in (1, 0)] == [False, True]
    assert ledger.complete(1)
    # Again, or of what was never computed: nothing new.
    assert not ledger.acknowledged(3, 1, 0)
    assert not ledger.acknowledged(3, 0, 0)
    assert not ledger.complete(0)


def test_one_shard_cannot_speak_for_another() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    ledger.computed(0)
    for _ in range(2):
        assert not ledger.acknowledged(3, 0, 1)
    assert ledger.unacknowledged == {0: {0, 2, 4}}


def test_acknowledgements_of_another_step_do_not_count() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    ledger.computed(0)
    for shard in range(2):
        assert not ledger.acknowledged(2, 0, shard)
        assert not ledger.acknowledged(4, 0, shard)
    assert ledger.unacknowledged == {0: set(CHUNKS)}


def test_a_new_step_forgets_the_last_one() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    ledger.computed(0)
    ledger.begin(4)
    assert ledger.unacknowledged == {}
    assert not ledger.complete(0)


def test_after_a_reconnect_the_shard_says_what_it_holds() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    ledger.computed(0)
    ledger.computed(1)
    for shard in range(2):
        ledger.acknowledged(3, 0, shard)
    # Shard 0 came back in a new life, or lost the open step: it holds chunk 2 of contribution 1 only.
    assert ledger.missing_at(0, {1: {2}}) == {0: [0, 2, 4], 1: [0, 4]}
    assert not ledger.complete(0)
    assert ledger.unacknowledged == {0: {0, 2, 4}, 1: {0, 1, 3, 4}}
    # Shard 1 has everything, though its acknowledgements were lost on the way.
    assert ledger.missing_at(1, {0: {1, 3}, 1: {1, 3}}) == {}
    assert ledger.unacknowledged == {0: {0, 2, 4}, 1: {0, 4}}
    assert ledger.missing_at(0, {0: {0, 2, 4}, 1: {0, 2, 4}}) == {}
    assert ledger.complete(0)
    assert ledger.complete(1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.sets(st.sampled_from(CHUNKS))), max_size=20))
@settings(deadline=None)
def test_the_ledger_believes_the_shards(events: list[tuple[bool, int, set[int]]]) -> None:
    """Whatever was acknowledged and whatever a shard then says that it holds: what it said last counts."""
    ledger = Ledger(PLAN)
    ledger.begin(0)
    ledger.computed(0)
    truth: set[int] = set()
    for is_ack, shard, chunks in events:
        owned = {chunk.index for chunk in PLAN.chunks_of(shard)}
        if is_ack:
            ledger.acknowledged(0, 0, shard)
            truth |= owned
        else:
            truth = (truth - owned) | (owned & chunks)
            lacking = ledger.missing_at(shard, {0: chunks})
            assert lacking.get(0, []) == sorted(owned - chunks)
        assert ledger.unacknowledged[0] == set(CHUNKS) - truth
        assert ledger.complete(0) == (truth == set(CHUNKS))
