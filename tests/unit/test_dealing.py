"""Work is dealt whole, evenly, to those who are there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ps.coordinator.dealing import LATE_S, Dealing, Finish

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

    @rule(seconds=st.floats(0.1, 5.0))
    def duplicate(self, seconds: float) -> None:
        before = {rank: self.dealing.outstanding(rank) for rank in range(5)}
        pace = {rank: seconds * (1 + rank) for rank in self.live}
        for rank, units in self.dealing.duplicate(sorted(self.live), self.now, pace).items():
            assert len(before[rank]) <= 1
            assert len(units) == 1
            assert any(unit in before[other] for other in before if other != rank for unit in units)
            assert units[0] not in before[rank]

    @rule(unit=st.integers(-2, 9), rank=st.integers(0, 4))
    def finish(self, unit: int, rank: int) -> None:
        holders, done = self.dealing.holders(unit), set(self.dealing.done)
        finish = self.dealing.finish(unit, rank, self.now)
        assert (finish is not None) == (unit in set(range(7)) - done)
        if finish is not None:
            assert sorted(finish.others) == [holder for holder in holders if holder != rank]
            assert (finish.took_s is not None) == (rank in holders)
        assert self.dealing.finish(unit, rank, self.now) is None

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
        outstanding = {unit for rank in range(5) for unit in dealing.outstanding(rank)}
        assert outstanding == set(dealing.owner) - dealing.done
        for unit in outstanding:
            assert dealing.owner[unit] in dealing.holders(unit)
            assert set(dealing.holders(unit)) <= self.live
        assert set(dealing.owner) == set(dealing.dealt_at)
        assert all(self.now - dealing.dealt_at[unit] <= 10.0 for unit in outstanding)


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


def test_by_speed_everybody_is_through_at_about_the_same_time() -> None:
    pace = {0: 1.0, 1: 1.0, 2: 1.0, 3: 4.0}
    dealt = Dealing(8).deal([0, 1, 2, 3], 0.0, pace)
    assert {rank: len(units) for rank, units in dealt.items()} == {0: 3, 1: 3, 2: 2}
    dealt = Dealing(13).deal([0, 1, 2, 3], 0.0, pace)
    assert {rank: len(units) for rank, units in dealt.items()} == {0: 4, 1: 4, 2: 4, 3: 1}


@given(st.integers(0, 60), st.dictionaries(st.integers(0, 20), st.floats(0.01, 100.0), min_size=1, max_size=8))
@settings(deadline=None)
def test_by_speed_nobody_could_have_taken_a_unit_of_the_last_ones(count: int, pace: dict[int, float]) -> None:
    dealt = Dealing(count).deal(sorted(pace), 0.0, pace)
    assert sorted(unit for units in dealt.values() for unit in units) == list(range(count))
    last = max((len(units) * pace[rank] for rank, units in dealt.items()), default=0.0)
    for rank, one in pace.items():
        assert (len(dealt.get(rank, [])) + 1) * one >= last * (1 - 1e-9)


def test_what_is_late_is_given_to_whoever_is_idle_the_last_unit_first() -> None:
    dealing = Dealing(8)
    pace = dict.fromkeys(range(4), 1.0)
    dealing.deal(range(4), 0.0)
    for unit in range(6):
        dealing.finish(unit, unit // 2, 1.0 + unit % 2)
    # Nobody knows yet that worker 3 is slow, but it should be through with both by now.
    assert dealing.outstanding(3) == [6, 7]
    assert dealing.duplicate(range(4), 2.0, pace) == {0: [7]}
    assert dealing.duplicate(range(4), 2.5, pace) == {1: [6]}
    # Both are expected by 3.5 now.
    assert dealing.duplicate(range(4), 3.0, pace) == {}


def test_who_is_at_its_last_unit_is_given_what_is_late_before_it_is_idle() -> None:
    """The slow one is at its first of two until 4: three fast ones need a third round, and nobody waits for it."""
    dealing, pace = Dealing(8), {0: 1.0, 1: 1.0, 2: 1.0, 3: 4.0}
    dealing.deal(range(4), 0.0)
    assert dealing.duplicate(range(4), 0.5, pace) == {}, "everybody has two"
    dealing.finish(2, 1, 1.0)
    assert dealing.duplicate(range(4), 1.0, pace) == {1: [7]}
    dealing.finish(0, 0, 1.0)
    dealing.finish(4, 2, 1.0)
    assert dealing.duplicate(range(4), 1.0, pace) == {0: [6]}
    assert dealing.duplicate(range(4), 1.5, pace) == {}, "both are expected by 3"
    # What a worker is late with itself is not left for what another one is late with.
    assert dealing.duplicate([2], 4.0, pace) == {}


def test_what_will_be_done_in_about_the_time_that_an_idle_worker_takes_is_left_to_its_owner() -> None:
    dealing = Dealing(2)
    dealing.deal([0, 1], 0.0)
    assert dealing.finish(0, 0, 1.0) == Finish(1.0, {})
    late = {0: 1.0, 1: 2.0 + LATE_S}
    assert dealing.duplicate([0, 1], 1.0, late) == {}
    assert dealing.duplicate([0, 1], 1.0, {0: 1.0, 1: late[1] + 0.1}) == {0: [1]}
    # It has it now.
    assert dealing.duplicate([0, 1], 1.0, {0: 1.0, 1: 100.0}) == {}


def test_who_should_be_through_and_is_not_is_expected_to_be_late_by_as_much_again() -> None:
    dealing, pace = Dealing(2), {0: 1.0, 1: 1.0}
    dealing.deal([0, 1], 0.0)
    dealing.finish(0, 0, 1.0)
    late_at = 2.0 + LATE_S
    assert dealing.duplicate([0, 1], late_at - 0.01, pace) == {}
    assert dealing.duplicate([0, 1], late_at + 0.01, pace) == {0: [1]}
    # Both have it: the next one, only when the second is late as well.
    assert dealing.duplicate([2], late_at + 1.0, {**pace, 2: 1.0}) == {}
    assert dealing.duplicate([2], 2 * late_at + 0.1, {**pace, 2: 1.0}) == {2: [1]}
    assert dealing.owner[1] == 1
    assert dealing.holders(1) == [0, 1, 2]


def test_before_anybody_was_measured_nothing_is_late() -> None:
    dealing = Dealing(2)
    dealing.deal([0, 1], 0.0)
    dealing.finish(0, 0, 1.0)
    assert dealing.duplicate([0, 1], 1000.0, {}) == {}


def late_unit() -> Dealing:
    """Worker 1 is at its only unit, and worker 0 has it as well."""
    dealing = Dealing(2)
    dealing.deal([0, 1], 0.0)
    dealing.finish(0, 0, 1.0)
    assert dealing.duplicate([0], 5.0, {0: 1.0, 1: 1.0}) == {0: [1]}
    return dealing


def test_whoever_is_first_has_done_it_and_the_other_one_was_at_it_for_so_long() -> None:
    assert late_unit().finish(1, 0, 6.0) == Finish(1.0, {1: 6.0})
    assert late_unit().finish(1, 1, 6.0) == Finish(6.0, {0: 1.0})
    # By somebody from whom it had been taken.
    assert late_unit().finish(1, 7, 6.0) == Finish(None, {0: 1.0, 1: 6.0})


def test_of_two_who_have_it_one_may_die() -> None:
    dealing = late_unit()
    assert dealing.lose(1) == []
    assert dealing.owner[1] == 0
    assert dealing.lose(0) == [1]
    assert dealing.deal([2], 6.0) == {2: [1]}
    dealing = late_unit()
    assert dealing.lose(0) == []
    assert dealing.holders(1) == [1]


def test_what_is_overdue_is_taken_from_all_who_have_it() -> None:
    dealing = late_unit()
    assert dealing.overdue(14.0, 10.0) == [], "worker 0 was given it at 5"
    assert dealing.overdue(15.5, 10.0) == [1]
    assert dealing.holders(1) == []
    assert dealing.late == {0, 1}
    assert dealing.deal([0, 1, 2], 15.5) == {2: [1]}


def test_a_unit_that_was_not_begun_says_nothing_of_who_had_it() -> None:
    dealing = Dealing(3)
    dealing.deal([0], 0.0)
    assert dealing.duplicate([1], 1.0, {0: 1.0, 1: 0.1}) == {1: [2]}
    assert dealing.finish(2, 1, 1.1) == Finish(0.10000000000000009, {0: 0.0})
    assert dealing.finish(0, 0, 1.5) == Finish(1.5, {})


def test_what_units_take_is_counted_from_when_they_can_be_begun() -> None:
    dealing = Dealing(2)
    dealing.deal([0], 0.0)
    dealing.begin(4.0)
    assert dealing.finish(0, 0, 5.0) == Finish(1.0, {})
    assert dealing.finish(1, 0, 7.0) == Finish(2.0, {})
