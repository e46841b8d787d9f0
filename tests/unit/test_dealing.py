"""Work is dealt whole, evenly, to those who are there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ps.coordinator.dealing import Dealing

RANKS = st.lists(st.integers(0, 20), unique=True, min_size=1, max_size=8)


@given(st.integers(0, 40), RANKS)
@settings(deadline=None)
def test_a_first_deal_is_even_and_neighbours_stay_together(count: int, ranks: list[int]) -> None:
    dealing = Dealing(count)
    dealt = dealing.deal(ranks, 0.0)
    assert sorted(unit for units in dealt.values() for unit in units) == list(range(count))
    shares = [len(dealt.get(rank, [])) for rank in ranks]
    assert max(shares) - min(shares) <= 1
    for units in dealt.values():
        assert units == list(range(units[0], units[-1] + 1))
    # In the order of ranks, whatever order they were given in; the same every time.
    assert [rank for rank in sorted(ranks) if rank in dealt] == sorted(dealt, key=lambda rank: dealt[rank][0])
    assert Dealing(count).deal(list(reversed(ranks)), 5.0) == dealt
    assert dealing.deal(ranks, 1.0) == {}


@given(st.integers(1, 40), RANKS, st.data())
@settings(deadline=None)
def test_what_is_lost_is_spread_over_the_others(count: int, ranks: list[int], data: st.DataObject) -> None:
    dealing = Dealing(count)
    dealing.deal(ranks, 0.0)
    for unit in data.draw(st.sets(st.integers(0, count - 1))):
        dealing.finish(unit)
    gone = data.draw(st.sampled_from(ranks))
    unfinished = dealing.outstanding(gone)
    assert dealing.lose(gone) == unfinished
    assert dealing.outstanding(gone) == []
    assert dealing.lose(gone) == []
    rest = [rank for rank in ranks if rank != gone]
    before = {rank: len(dealing.outstanding(rank)) for rank in rest}
    dealt = dealing.deal(rest, 1.0)
    assert sorted(unit for units in dealt.values() for unit in units) == (unfinished if rest else [])
    # Nobody gets more while somebody has less to do.
    for rank, units in dealt.items():
        assert units
        assert len(dealing.outstanding(rank)) - 1 <= min(len(dealing.outstanding(other)) for other in rest)
        assert len(dealing.outstanding(rank)) == before[rank] + len(units)


class Dealings(RuleBasedStateMachine):
    """Any order of joining, dying, finishing and time."""

    def __init__(self) -> None:
        super().__init__()
        self.dealing = Dealing(7)
        self.live: set[int] = set()
        self.now = 0.0

    @rule(rank=st.integers(0, 4))
    def join(self, rank: int) -> None:
        self.live.add(rank)

    @rule(rank=st.integers(0, 4))
    def die(self, rank: int) -> None:
        self.live.discard(rank)
        self.dealing.lose(rank)

    @rule()
    def deal(self) -> None:
        owners = dict(self.dealing.owner)
        for rank, units in self.dealing.deal(sorted(self.live), self.now).items():
            assert rank in self.live
            assert not set(units) & (set(owners) | self.dealing.done)
        if self.live:
            assert set(self.dealing.owner) | self.dealing.done == set(range(7))

    @rule(unit=st.integers(-2, 9))
    def finish(self, unit: int) -> None:
        self.dealing.finish(unit)
        self.dealing.finish(unit)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        overdue = self.dealing.overdue(self.now, 10.0)
        assert all(unit not in self.dealing.owner and unit not in self.dealing.done for unit in overdue)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        dealing = self.dealing
        assert dealing.done <= set(range(7))
        assert dealing.complete == (dealing.done == set(range(7)))
        outstanding = [unit for rank in range(5) for unit in dealing.outstanding(rank)]
        assert len(outstanding) == len(set(outstanding))
        assert set(dealing.owner) == set(dealing.dealt_at)
        assert all(self.now - dealing.dealt_at[unit] <= 10.0 for unit in outstanding)
        assert {dealing.owner[unit] for unit in outstanding} <= self.live


Dealings.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDealings = Dealings.TestCase


def test_nobody_to_deal_to() -> None:
    dealing = Dealing(3)
    assert dealing.deal([], 0.0) == {}
    assert dealing.deal([4], 0.0) == {4: [0, 1, 2]}


def test_overdue_work_is_timed_from_its_last_deal() -> None:
    dealing = Dealing(2)
    dealing.deal([0, 1], 0.0)
    dealing.finish(0)
    assert dealing.overdue(10.0, 10.0) == []
    assert dealing.overdue(10.5, 10.0) == [1]
    assert dealing.deal([0, 1], 10.5) == {0: [1]}
    assert dealing.overdue(20.0, 10.0) == []


def test_work_that_is_all_said_to_be_done_and_leads_nowhere_is_dealt_again() -> None:
    dealing = Dealing(2)
    dealing.deal([0], 0.0)
    dealing.finish(0)
    dealing.finish(1)
    assert dealing.overdue(10.0, 10.0) == []
    assert dealing.overdue(10.5, 10.0) == [0, 1]
    assert dealing.deal([1], 11.0) == {1: [0, 1]}
