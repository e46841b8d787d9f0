"""The supervisor, driven with a clock of the test's own."""

from __future__ import annotations

import signal
from collections.abc import Iterable

import pytest

from ps.types import Role
from workers.launch.supervisor import (
    COORDINATOR,
    DRAIN_S,
    LEAVE_GRACE_S,
    LIMIT_WINDOW_S,
    Action,
    End,
    Exit,
    Member,
    Phase,
    Say,
    Signal,
    Start,
    Supervisor,
)

SHARD, WORKER = Member(Role.SHARD, 0), Member(Role.WORKER, 0)
EVERYBODY = [COORDINATOR, SHARD, WORKER]


def supervisor(restart_limit: int = 3) -> Supervisor:
    return Supervisor(1, 1, restart_limit, start_timeout_s=20.0, stop_timeout_s=100.0)


def running(restart_limit: int = 3) -> Supervisor:
    made = supervisor(restart_limit)
    made.start(0.0)
    made.reachable()
    return made


def said(actions: Iterable[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, Say))


def signals(actions: Iterable[Action]) -> list[tuple[Member, signal.Signals]]:
    return [(action.member, action.signum) for action in actions if isinstance(action, Signal)]


def started(actions: Iterable[Action]) -> list[Member]:
    return [action.member for action in actions if isinstance(action, Start)]


def end(actions: Iterable[Action]) -> End | None:
    return next((action for action in actions if isinstance(action, End)), None)


def killed(member: Member) -> Exit:
    return Exit(member, -signal.SIGKILL, registered=True)


def test_the_others_start_when_the_coordinator_can_be_reached() -> None:
    machine = supervisor()
    assert started(machine.start(0.0)) == [COORDINATOR]
    assert machine.tick(19.9) == []
    assert started(machine.reachable()) == [SHARD, WORKER]
    assert machine.reachable() == []
    assert machine.tick(1e6) == []


def test_a_coordinator_that_is_never_reachable_ends_the_launch() -> None:
    machine = supervisor()
    machine.start(0.0)
    assert signals(machine.tick(20.0)) == [(COORDINATOR, signal.SIGTERM)]
    ended = end(machine.tick(20.1, [Exit(COORDINATOR, 0)]))
    assert ended is not None
    assert ended.exit_code == 1
    assert ended.error is not None
    assert "membership.start_timeout_s" in ended.error


def test_a_finished_run_ends_with_0_whatever_the_order_of_the_ends() -> None:
    for order in ([SHARD, WORKER, COORDINATOR], [COORDINATOR, WORKER, SHARD]):
        machine = running()
        actions = [action for at, member in enumerate(order) for action in machine.tick(at, [Exit(member, 0)])]
        assert actions == [End(0, None, finished=True)]
    machine = running()
    assert machine.tick(1.0, [Exit(member, 0) for member in EVERYBODY]) == [End(0, None, finished=True)]


def test_an_end_is_no_death_even_if_it_fails_while_the_coordinator_ends() -> None:
    machine = running()
    machine.tick(1.0, [Exit(WORKER, 1, "the stream broke"), Exit(COORDINATOR, 0)])
    assert machine.tick(1.1, [Exit(SHARD, 0)]) == [End(0, None, finished=True)]


def test_who_does_not_end_after_the_coordinator_is_told_and_then_killed() -> None:
    machine = running()
    machine.tick(1.0, [Exit(COORDINATOR, 0), Exit(SHARD, 0)])
    assert signals(machine.tick(1.0 + DRAIN_S)) == [(WORKER, signal.SIGTERM)]
    actions = machine.tick(1.0 + 2 * DRAIN_S)
    assert signals(actions) == [(WORKER, signal.SIGKILL)]
    assert "worker-0" in said(actions)
    assert machine.tick(20.0, [killed(WORKER)]) == [End(0, None, finished=True)]


@pytest.mark.parametrize("member", EVERYBODY)
def test_what_is_killed_starts_again_after_a_backoff_that_grows_to_200_ms(member: Member) -> None:
    machine = running(restart_limit=10)
    now = 0.0
    for backoff in (0.05, 0.1, 0.2, 0.2):
        now += 1.0
        actions = machine.tick(now, [killed(member)])
        assert started(actions) == []
        assert "SIGKILL" in said(actions)
        assert started(machine.tick(now + backoff - 0.001)) == []
        assert started(machine.tick(now + backoff)) == [member]


def test_more_deaths_than_the_limit_within_a_minute_end_the_run_with_the_last_words() -> None:
    machine = running(restart_limit=2)
    for now in (1.0, 2.0):
        machine.tick(now, [killed(SHARD)])
        assert started(machine.tick(now + 0.2)) == [SHARD]
    actions = machine.tick(3.0, [Exit(SHARD, 1, None, "OSError: no memory", registered=True)])
    assert signals(actions) == [(COORDINATOR, signal.SIGTERM), (WORKER, signal.SIGTERM)]
    ended = end(machine.tick(3.1, [Exit(COORDINATOR, 0), Exit(WORKER, 0)]))
    assert ended is not None
    assert ended.exit_code == 1
    assert ended.error is not None
    assert "shard-0" in ended.error
    assert "OSError: no memory" in ended.error


def test_deaths_that_are_far_apart_are_put_up_with_for_ever() -> None:
    machine = running(restart_limit=1)
    for number in range(1, 20):
        now = number * (LIMIT_WINDOW_S + 1.0)
        machine.tick(now, [killed(WORKER)])
        assert started(machine.tick(now + 0.05)) == [WORKER]


def test_a_worker_that_cannot_live_does_not_cost_what_was_trained() -> None:
    machine = running(restart_limit=0)
    actions = machine.tick(1.0, [killed(WORKER)])
    assert signals(actions) == [(COORDINATOR, signal.SIGTERM)]
    assert machine.phase is Phase.STOPPING
    ended = end(machine.tick(2.0, [Exit(SHARD, 0), Exit(COORDINATOR, 0)]))
    assert ended is not None
    assert (ended.exit_code, ended.finished) == (1, False)


def test_exit_code_2_is_never_tried_again() -> None:
    machine = running()
    machine.tick(1.0, [killed(WORKER)])
    machine.tick(2.0)
    machine.tick(3.0, [Exit(WORKER, 2, "worker.device=cuda: there is none", registered=True)])
    ended = end(machine.tick(3.1, [Exit(COORDINATOR, 0), Exit(SHARD, 0)]))
    assert ended == End(1, "worker-0: worker.device=cuda: there is none", finished=False)


def test_a_role_that_cannot_start_ends_the_run_with_its_line() -> None:
    machine = supervisor()
    machine.start(0.0)
    actions = machine.tick(0.5, [Exit(COORDINATOR, 1, "port 80 is in use")])
    assert end(actions) == End(1, "coordinator-0: port 80 is in use", finished=False)


def test_a_role_that_started_once_and_then_fails_is_started_again() -> None:
    machine = running()
    machine.tick(1.0, [Exit(WORKER, 1, "shard-0 cannot be reached", registered=True)])
    assert started(machine.tick(1.05)) == [WORKER]
    # Its second life is no first start: the cluster was good once.
    machine.tick(2.0, [Exit(WORKER, 1, "shard-0 cannot be reached", registered=False)])
    assert started(machine.tick(2.2)) == [WORKER]


def test_the_coordinators_own_error_is_its_decision_to_end() -> None:
    machine = running()
    machine.tick(1.0, [Exit(COORDINATOR, 1, "no worker came within 120 s", registered=True)])
    assert machine.phase is Phase.TERMINATING


def test_a_restarted_coordinator_may_find_its_port_taken_for_a_moment() -> None:
    machine = running()
    machine.tick(1.0, [killed(COORDINATOR)])
    machine.tick(1.1)
    machine.tick(1.2, [Exit(COORDINATOR, 1, "the port is in use", registered=False)])
    assert started(machine.tick(1.3)) == [COORDINATOR]


def test_a_role_that_left_by_itself_is_missed_after_a_while() -> None:
    machine = running()
    machine.tick(1.0, [Exit(WORKER, 0)])
    assert started(machine.tick(1.0 + LEAVE_GRACE_S - 0.1)) == []
    assert started(machine.tick(1.0 + LEAVE_GRACE_S)) == [WORKER]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_the_coordinator_alone_and_waits_for_it(signum: signal.Signals, code: int) -> None:
    machine = running()
    actions = machine.interrupt(1.0, signum)
    assert signals(actions) == [(COORDINATOR, signal.SIGTERM)]
    assert "checkpoint" in said(actions)
    assert "100 s" in said(actions)
    assert machine.tick(100.9) == []
    assert machine.tick(100.95, [Exit(member, 0) for member in EVERYBODY]) == [End(code, None, finished=False)]


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_what_kills_at_once_is_named_as_it_came(signum: signal.Signals, name: str) -> None:
    assert said(running().interrupt(1.0, signum)).endswith(f"; {name} again kills at once")


def test_a_signal_after_the_end_of_the_run_kills_what_is_left_of_it_and_is_no_failure() -> None:
    machine = running()
    machine.tick(1.0, [Exit(COORDINATOR, 0)])
    assert signals(machine.interrupt(1.5, signal.SIGINT)) == [(SHARD, signal.SIGKILL), (WORKER, signal.SIGKILL)]
    assert machine.tick(1.6, [killed(SHARD), killed(WORKER)]) == [End(0, None, finished=True)]


def test_what_dies_while_stopping_stays_dead_and_the_deadline_ends_it() -> None:
    machine = running()
    machine.tick(1.0, [killed(WORKER)])
    machine.interrupt(1.01, signal.SIGINT)
    actions = machine.tick(2.0, [killed(SHARD)])
    assert started(actions) == []
    assert "may not come" in said(actions)
    actions = machine.tick(101.1)
    assert "no checkpoint within 100 s" in said(actions)
    assert signals(actions) == [(COORDINATOR, signal.SIGTERM)]
    assert machine.tick(101.2, [killed(COORDINATOR)]) == [End(130, None, finished=False)]


def test_a_coordinator_that_dies_while_stopping_ends_it_at_once() -> None:
    machine = running()
    machine.interrupt(1.0, signal.SIGTERM)
    actions = machine.tick(2.0, [Exit(COORDINATOR, 1, "no space left")])
    assert "no space left" in said(actions)
    assert signals(actions) == [(SHARD, signal.SIGTERM), (WORKER, signal.SIGTERM)]


def test_no_checkpoint_is_awaited_from_a_coordinator_that_is_not_there() -> None:
    machine = running()
    machine.tick(1.0, [killed(COORDINATOR)])
    assert signals(machine.interrupt(1.01, signal.SIGINT)) == [
        (SHARD, signal.SIGTERM),
        (WORKER, signal.SIGTERM),
    ]
    assert started(machine.tick(2.0)) == []


def test_a_second_signal_kills_at_once() -> None:
    machine = running()
    machine.interrupt(1.0, signal.SIGINT)
    assert signals(machine.interrupt(1.5, signal.SIGINT)) == [(member, signal.SIGKILL) for member in EVERYBODY]
    assert end(machine.tick(1.6, [killed(SHARD), killed(WORKER)])) is None
    assert end(machine.tick(1.7, [killed(COORDINATOR)])) == End(130, None, finished=False)
    assert machine.interrupt(1.8, signal.SIGINT) == []


@pytest.mark.parametrize("member", EVERYBODY)
def test_who_is_dismissed_stays_away_until_recalled(member: Member) -> None:
    machine = running(restart_limit=0)
    assert machine.recall(0.5, member) == []
    assert signals(machine.dismiss(member)) == [(member, signal.SIGKILL)]
    assert machine.tick(1.0, [killed(member)]) == []
    assert machine.tick(1e3) == []
    assert machine.phase is Phase.RUNNING
    machine.recall(1e3, member)
    assert started(machine.tick(1e3)) == [member]
    # From now on its end is a death again.
    assert machine.tick(1e3 + 1, [killed(member)]) != []


def test_a_member_that_is_about_to_be_started_again_can_be_dismissed() -> None:
    machine = running()
    machine.tick(1.0, [killed(SHARD)])
    machine.dismiss(SHARD)
    assert started(machine.tick(1e3)) == []
