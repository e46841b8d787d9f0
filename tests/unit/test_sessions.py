"""Sessions of the Coordinator service: whoever changes its seat keeps its session, and a broken one is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.ps.v1 import common_pb2
from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator.loop import Loop
from ps.coordinator.members import MemberState
from ps.coordinator.service import CoordinatorServicer, Sessions
from ps.coordinator.timeline import Timeline
from ps.types import Role
from tests.support.fake_run import make_config
from tests.support.standby_run import StandbyRun


class AtOnce(Loop):
    """Events happen when they are posted."""

    def __init__(self, run: StandbyRun) -> None:
        self._run = run

    def post(self, event: Callable[[float], None]) -> None:
        event(self._run.now)

    def call(self, function: Callable[[float], Any]) -> Any:
        return function(self._run.now)


class Context:
    """A call whose other side is there, and silent."""

    def add_callback(self, _callback: Callable[[], None]) -> bool:
        return True

    def auth_context(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def run(tmp_path: Path) -> StandbyRun:
    """2 shards, the first of which has a standby that may take over."""
    config = make_config(tmp_path, cluster={"shards": 2, "workers": 2, "standbys": 1}, training={"steps": 1000})
    made = StandbyRun(config)
    made.everybody()
    made.run_to(2)
    made.join_process(0)
    made.await_standby()
    return made


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


def open_session(run: StandbyRun, sessions: Sessions, life: int) -> Iterator[pb.SessionResponse]:
    timeline = Timeline(run.config.run_dir, "run", range(0), MemberState(Role.COORDINATOR, 0, 0))
    servicer = CoordinatorServicer(AtOnce(run), run.machine, sessions, "run", "{}", common_pb2.Member(), timeline)
    hello = pb.Hello(member=common_pb2.Member(role="shard", rank=0, incarnation=life))
    opened = servicer.Session(iter([pb.SessionRequest(hello=hello)]), Context())  # type: ignore[arg-type]
    assert next(opened) == pb.SessionResponse()
    return opened


def promote(run: StandbyRun) -> None:
    run.kill_shard(0)
    run.run(lambda: bool(run.promoted()))


def test_a_session_that_breaks_right_after_a_promotion_is_noticed(run: StandbyRun, sessions: Sessions) -> None:
    life = run.in_sync()
    session = open_session(run, sessions, life)
    promote(run)
    assert run.member(Role.SHARD, 0).incarnation == life
    # The record of the promotion is being put on disk.
    session.close()  # type: ignore[attr-defined]
    assert not run.member(Role.SHARD, 0).connected
    assert len(sessions) == 0


def test_what_is_told_to_the_shard_reaches_who_was_its_standby_when_it_came(
    run: StandbyRun, sessions: Sessions
) -> None:
    life = run.in_sync()
    session = open_session(run, sessions, life)
    promote(run)
    sessions.tell(life, end=pb.End(ok=True, reason="finished"))
    assert next(session).end.reason == "finished"


def test_a_life_that_is_replaced_before_it_has_said_anything_stays_replaced(
    run: StandbyRun, sessions: Sessions
) -> None:
    life = run.member(Role.SHARD, 0).incarnation
    session = open_session(run, sessions, life)
    before = run.member(Role.SHARD, 0)
    promote(run)
    sessions.tell(life, end=pb.End(ok=False, reason="replaced"))
    assert next(session).end.reason == "replaced"
    assert not before.connected
    assert not before.live
