"""The coordinator's loop: facts before time, and no time passes for leases while it is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ps.coordinator import loop as loops
from ps.coordinator.lease_clock import LeaseClock
from ps.coordinator.loop import TICK_S, Loop
from ps.coordinator.machine import AWAY_S, Machine
from ps.types import Role
from tests.support.fake_run import FakeRun, make_config


class Clock:
    """The loop's clock, which passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(loops, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def test_a_lease_clock_follows_the_clock_but_not_while_its_owner_is_away() -> None:
    clock = LeaseClock(100.0, 0.5)
    assert (clock.look(100.25), clock.away_s) == (100.25, 0.0)
    assert (clock.look(100.75), clock.away_s) == (100.75, 0.0)
    assert (clock.look(110.75), clock.away_s) == (101.25, 9.5)
    assert (clock.look(111.0), clock.away_s) == (101.5, 0.0)


def run_events(machine: Machine, *events: Callable[[float], None]) -> list[tuple[float, float]]:
    """Have a loop handle these, which are waiting when it begins; returns the time and absence at each look."""
    looks: list[tuple[float, float]] = []
    looked = threading.Event()

    def look(now: float, away_s: float) -> None:
        looks.append((now, away_s))
        machine.was_away(away_s, now)
        machine.advance(now)
        # The one after the last event saw it.
        if len(looks) == 2:
            looked.set()

    def failed(error: BaseException) -> None:
        raise error

    loop = Loop(lambda: None, look, failed)
    for event in events:
        loop.post(event)
    loop.start()
    assert looked.wait(10.0)
    loop.stop()
    return looks


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> FakeRun:
    """2 shards and 2 workers that train, with a lease of 2 s, at the clock's time."""
    made = FakeRun(make_config(tmp_path, training={"steps": 1000}, membership={"lease_s": 2.0}), now=clock.now)
    made.everybody()
    made.run_to(3)
    clock.now = made.now
    return made


def live(run: FakeRun) -> list[str]:
    return [m.name for role in (Role.SHARD, Role.WORKER) for m in run.machine.members.of(role) if m.live]


def test_what_waits_behind_something_slow_is_heard_before_a_lease_is_looked_at(run: FakeRun, clock: Clock) -> None:
    there = live(run)
    assert len(there) == 4

    def slow(_now: float) -> None:
        # A record finds no room, and waits for it.
        clock.now += 3.0

    def heartbeat(now: float) -> None:
        run.machine.seen(run.member(Role.WORKER, 0), now)

    looks = run_events(run.machine, slow, heartbeat)
    assert live(run) == there
    assert (looks[0][1], looks[1][1]) == (0.0, pytest.approx(3.0 - TICK_S))
    assert run.machine.away_s == pytest.approx(3.0 - TICK_S)


def test_a_coordinator_that_was_stopped_throws_nobody_out(
    run: FakeRun, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stopped while it waits, and what its members have said meanwhile has not reached its queue yet."""
    there, epoch = live(run), run.machine.fence.epoch
    loops_wait = threading.Event()
    looks: list[float] = []

    def look(now: float, away_s: float) -> None:
        looks.append(now)
        if len(looks) == 2:
            # From here to the next look nothing runs.
            clock.now += 3600.0
        run.machine.was_away(away_s, now)
        run.machine.advance(now)
        if len(looks) == 4:
            loops_wait.set()

    loop = Loop(lambda: None, look, lambda _: None)
    loop.start()
    assert loops_wait.wait(10.0)
    loop.stop()
    assert looks[-1] - looks[0] <= 3 * TICK_S
    assert live(run) == there
    assert run.machine.fence.epoch == epoch
    assert "was stopped, or its disk slow, for 3599.9 s" in caplog.text


def test_who_lost_its_connection_while_the_coordinator_was_away_may_come_back(run: FakeRun) -> None:
    run.machine.was_away(AWAY_S + 1.0, run.now)
    member = run.member(Role.WORKER, 0)
    run.machine.disconnect(member, run.now)
    run.step(1.5)
    assert member.live
    run.step(1.0)
    assert not member.live


def test_seconds_of_a_step_are_those_that_people_wait(run: FakeRun) -> None:
    run.machine.was_away(7.0, run.now)
    run.run_to(run.machine.state.version + 2)
    run.settle(3)
    seconds = [line["step_seconds"] for line in run.lines() if line["kind"] == "step"]
    assert max(seconds[1:]) == pytest.approx(7.0, abs=0.5)


def test_a_failure_ends_the_loop_and_is_told() -> None:
    failed = threading.Event()

    def look(_now: float, _away_s: float) -> None:
        raise ValueError("broken")

    loop = Loop(lambda: None, look, lambda error: failed.set() if isinstance(error, ValueError) else None)
    loop.start()
    assert failed.wait(10.0)
    loop.stop()
