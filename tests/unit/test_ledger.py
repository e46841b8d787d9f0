"""What a worker has contributed, and which version is on its way to it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ps.client.ledger import Ledger, Pulling
from ps.sharding import make_plan
from tests.support.plans import table_of_chunks

#: Shard 0 has chunks 0, 2, 4; shard 1 has 1, 3.
PLAN = make_plan(table_of_chunks(5), 2)
CHUNKS = range(5)


def test_a_contribution_is_complete_with_its_last_chunk() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    assert not ledger.complete(1)
    ledger.computed(1)
    assert [ledger.acknowledged(3, 1, chunk) for chunk in CHUNKS] == [False] * 4 + [True]
    assert ledger.complete(1)
    # Again, or of what was never computed: nothing new.
    assert not ledger.acknowledged(3, 1, 4)
    assert not ledger.acknowledged(3, 0, 4)
    assert not ledger.complete(0)


def test_acknowledgements_of_another_step_do_not_count() -> None:
    ledger = Ledger(PLAN)
    ledger.begin(3)
    ledger.computed(0)
    for chunk in CHUNKS:
        assert not ledger.acknowledged(2, 0, chunk)
        assert not ledger.acknowledged(4, 0, chunk)
    assert not ledger.acknowledged(3, 0, 99)
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
    for chunk in CHUNKS:
        ledger.acknowledged(3, 0, chunk)
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
        if is_ack:
            for chunk in chunks:
                ledger.acknowledged(0, 0, chunk)
            truth |= chunks
        else:
            owned = {chunk.index for chunk in PLAN.chunks_of(shard)}
            truth = (truth - owned) | (owned & chunks)
            lacking = ledger.missing_at(shard, {0: chunks})
            assert lacking.get(0, []) == sorted(owned - chunks)
        assert ledger.unacknowledged[0] == set(CHUNKS) - truth
        assert ledger.complete(0) == (truth == set(CHUNKS))


def make_pulling(held: int = 5) -> Pulling:
    return Pulling(PLAN, version=7, held=held, applied=6)


def test_a_pull_is_complete_when_all_chunks_are_there() -> None:
    pulling = make_pulling()
    assert not pulling.torn
    for chunk in PLAN.chunks:
        assert not pulling.complete
        assert pulling.chunk(chunk.shard, chunk.index, 6)
        assert pulling.torn == (chunk.index < 4)
    assert pulling.complete


def test_nothing_has_come_until_a_chunk_or_an_answer_has() -> None:
    pulling = make_pulling()
    assert not pulling.chunk(0, 0, 5)
    assert pulling.untouched
    assert pulling.chunk(0, 0, 6)
    assert not pulling.untouched
    skipped = make_pulling()
    assert skipped.same(1, 5)
    assert not skipped.untouched


def test_chunks_of_another_version_do_not_count() -> None:
    pulling = make_pulling()
    assert not pulling.chunk(0, 0, 5)
    assert not pulling.chunk(0, 0, 7)
    assert not pulling.started
    assert pulling.remaining[0] == {0, 2, 4}


def test_after_a_skip_every_shard_says_that_nothing_changed() -> None:
    pulling = make_pulling()
    assert pulling.same(0, 5)
    assert not pulling.complete
    assert pulling.same(1, 5)
    assert pulling.complete
    assert not pulling.started


def test_one_shard_cannot_say_same_when_another_sent_new_weights() -> None:
    pulling = make_pulling()
    assert not pulling.same(0, 4)
    assert pulling.chunk(1, 1, 6)
    assert not pulling.same(0, 5)
    assert not pulling.complete
