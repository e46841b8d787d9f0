"""A scripted cluster whose shards have standbys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ps.coordinator.actions import Action, Follow, Journal, TellDecision, TellReplicate
from ps.coordinator.members import MemberState
from ps.types import Applied, Prepared, Role
from tests.support.fake_run import FakeRun, FakeShard


class StandbyRun(FakeRun):
    """Shards whose second processes follow them at once, and hold everything, unless a test says otherwise."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.standbys: dict[int, FakeShard] = {}
        #: The life that each shard sends to.
        self.sent_to: dict[int, int] = {}
        #: Standbys that answer, and do not get what their shard sends.
        self.cut_off: set[int] = set()
        #: What standbys have to say, while they say nothing.
        self.unsaid: list[Applied] | None = None
        self.hash_of_standby = 0
        super().__init__(*arguments, **named)

    def join_process(self, index: int, life: int = 0) -> MemberState:
        """A process of a shard registers and connects; it gets the seat that it is given."""
        life = life or self._life()
        self.machine.register(MemberState(Role.SHARD, index, life, address=f"p:{life}", ready=True), self.now)
        member = self.machine.members.find(Role.SHARD, index, life)
        assert member is not None
        held = self.shards if member.role is Role.SHARD else self.standbys
        if index not in held or held[index].incarnation != life:
            held[index] = FakeShard(index, life)
        self.machine.connect(member, self.now)
        return member

    def kill_shard(self, index: int) -> None:
        self.machine.disconnect(self.member(Role.SHARD, index), self.now)
        self.shards[index].silent = True

    def step(self, seconds: float = 0.01) -> list[Action]:
        for index in self.standbys:
            found = self.machine.members.get(Role.STANDBY, index)
            if found is not None and found.connected:
                self.machine.seen(found, self.now + seconds)
        return super().step(seconds)

    def prepared_of(self, shard: FakeShard) -> Prepared:
        standby = self.standbys.get(shard.index)
        sent = self.sent_to.get(shard.index, 0)
        holds = standby is not None and standby.incarnation == sent and shard.index not in self.cut_off
        if standby is not None and holds:
            standby.held, standby.has_state = set(shard.held), True
        return replace(super().prepared_of(shard), standby=sent if holds else 0)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, TellDecision) and action.standby:
            standby = self.standbys.get(action.shard)
            if standby is None:
                return
            if action.decision.step >= standby.version:
                standby.version, standby.last_decision, standby.held = action.decision.version, action.decision, set()
            state_hash = self.hash_of_standby or 1000 + standby.version
            report = Applied(self.machine.fence, action.decision.step, action.shard, state_hash)
            if self.unsaid is not None:
                self.unsaid.append(report)
                return
            self.machine.standbys.applied(report)
        elif isinstance(action, Follow):
            standby = self.standbys[action.shard]
            if not action.keep:
                standby.version, standby.has_state = action.state.version, False
            self.machine.standbys.following(action.shard, standby.incarnation, action.fence, standby.version)
        elif isinstance(action, TellReplicate):
            self.sent_to[action.shard] = action.life
        else:
            super()._carry_out(action)
            if isinstance(action, Journal) and action.record["type"] == "promotion":
                self.shards[action.record["shard"]] = self.standbys.pop(action.record["shard"])

    def went_back(self) -> list[int]:
        """The versions that were gone back to after the start."""
        return [record["version"] for record in self.journal("rollback")[1:]]

    def promoted(self) -> list[int]:
        return [record["shard"] for record in self.journal("promotion")]

    def recorded(self) -> list[int]:
        return [line["step"] for line in self.lines() if line["kind"] == "step"]

    def in_sync(self, index: int = 0) -> int:
        return self.machine.standbys.in_sync(index)

    def await_standby(self, index: int = 0) -> None:
        self.run(lambda: self.in_sync(index) != 0)
        # The record is written.
        self.step()
