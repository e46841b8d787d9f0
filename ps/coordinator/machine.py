"""The coordinator's state machine: events in, actions out. No sockets, no clock, no files.

Events note facts. `advance` then looks at all facts and does whatever they allow, so that nothing
depends on the order in which facts came. `serving` makes the cluster serve, `steps` trains.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ps.config import RunConfig
from ps.coordinator.actions import Dismiss, Journal, MembersChanged, TellCluster, TellDeal, TellSnapshot
from ps.coordinator.history import History
from ps.coordinator.members import MemberState
from ps.coordinator.recovery import Candidate, describe_newest
from ps.coordinator.run import Phase, Run
from ps.coordinator.serving import Serving
from ps.coordinator.standbys import REJOIN_S, Standbys
from ps.coordinator.steps import Steps
from ps.coordinator.waiting import Wait, describe_absence, describe_wait, find_waits
from ps.sharding import make_plan
from ps.types import Fence, ParameterTable, Role

log = logging.getLogger(__name__)

#: Since when something is missing is known to this.
LOOK_S = 0.05
#: A coordinator that was away for longer says so, and its members, whose connections may have broken, may come back.
AWAY_S = 1.0


class Machine(Run):
    """All decisions of one life (term) of the coordinator."""

    def __init__(
        self,
        config: RunConfig,
        history: History,
        candidates: list[Candidate],
        rejected: list[str],
        term: int,
        now: float,
    ) -> None:
        super().__init__(config, history, candidates, rejected, term)
        self.standbys = Standbys(self, now)
        self.steps = Steps(self, self.standbys)
        self.serving = Serving(self, self.steps, self.standbys, now)
        self.members.expected_until = now + REJOIN_S
        self.started_at = now
        self._look_at = now
        self.waits(now)

    # -- Facts about members --------------------------------------------------------------------

    def register(self, member: MemberState, now: float) -> int:
        """Take a member in and return its rank.

        Raises:
            MismatchError: it cannot be part of this run.
            PeerUnavailable: whether it can is not known yet.
        """
        rank = self.members.place(member.role, member.rank, member.incarnation, now)
        role = member.role
        if role is Role.SHARD:
            role = self.members.seat(rank, member.incarnation, self.standbys.in_sync(rank), now)
        member = replace(member, role=role, rank=rank)
        if not self.members.queue_up(member, now):
            self._seat(member, now)
        return rank

    def _seat(self, member: MemberState, now: float) -> None:
        """A member takes its seat, from an earlier life of it if there is one."""
        before = self.members.admit(member, now)
        if before is not None:
            log.info("%s has come back in a new life", member.name)
            self.ask(Dismiss(before.incarnation, f"{before.name} was replaced by a newer life of it"))
            left = member.role is Role.WORKER and before.met and not before.ready
            self._lost(before, "was replaced", asked=left)
        if not self.is_seated(member):
            # Known already.
            return
        who = {"role": str(member.role), "rank": member.rank, "life": member.incarnation}
        self.ask(Journal({"type": "member", **who}))
        if member.role is Role.SHARD:
            self.snapshots.lose(member.rank, self.state.version)
        if member.role is Role.SHARD and self.phase is not Phase.GATHERING:
            # A shard in a new life holds what it finds on a disk, if anything: the cluster is made to serve again.
            self.serving.gather(f"{member.name} started anew")

    def is_seated(self, member: MemberState) -> bool:
        """Whether it has its seat, and nobody has taken it."""
        return self.members.get(member.role, member.rank) is member

    def connect(self, member: MemberState, now: float, starting: bool = False) -> None:
        """A member's session is open: what it may have missed is told again.

        Args:
            starting: it is a shard that cannot be configured yet.
        """
        if not self.is_seated(member):
            self._seat(member, now)
        member.connected = member.met = True
        if member.role in (Role.SHARD, Role.STANDBY):
            member.ready = not starting
        self.seen(member, now)
        self.ask(MembersChanged())
        if member.role is Role.SHARD and self.phase is Phase.RUNNING:
            # First the last decision; what the shard still lacks follows from its own reports.
            if self.last_decision is not None:
                self.tell_decision(member.rank, self.last_decision)
            self.steps.tell_foregone(member.rank)
            self.standbys.tell_replicate(member.rank)
            if self.snapshots.is_pending(self.state.version):
                self.ask(TellSnapshot(member.rank, self.fence, self.state.version))
        if member.role is Role.STANDBY and self.phase is Phase.RUNNING:
            self.standbys.connected(member.rank)

    def started(self, member: MemberState, now: float) -> None:
        """A shard can be configured from now on."""
        member.ready = True
        self.seen(member, now)

    def disconnect(self, member: MemberState, now: float) -> None:
        """A member's session broke; it may be back within the grace."""
        if member.connected:
            member.connected = False
            member.last_seen = now

    def seen(self, member: MemberState, now: float, doing: str | None = None) -> None:
        """Any sign of life."""
        member.last_seen = now
        if doing is not None:
            member.doing = doing
        if not member.live and member.ready:
            member.live = member.served = True
            member.since = now
            is_spare = member.role is Role.WORKER and len(self.members.live_workers()) > self.history.contributions
            spare = f", a spare: a step has {self.history.contributions} contributions" if is_spare else ""
            log.info("%s is there%s", member.name, spare)
            self.ask(Journal({"type": "live", **self._who(member)}))
            self._welcome(member)

    def leave(self, member: MemberState, now: float) -> None:
        """A member goes by its own will. The state of a shard is saved first: the cluster stops."""
        if member.role is Role.SHARD and not self._is_replaceable(member):
            self.stop(f"{member.name} was asked to stop")
        else:
            # Not ready either: a heartbeat that is still on its way must not bring it back.
            member.live = member.connected = member.ready = False
            member.since = now
            self._lost(member, "left", asked=True)
        member.last_seen = now

    def _is_replaceable(self, shard: MemberState) -> bool:
        """Whether a shard may go without the run ending: somebody else holds the same."""
        standby = self.members.get(Role.STANDBY, shard.rank)
        return standby is not None and standby.live and standby.incarnation == self.standbys.in_sync(shard.rank)

    def model(
        self, member: MemberState, now: float, table: ParameterTable, data_digest: str, evaluation_parts: int
    ) -> None:
        """A worker's parameter table and data: the first one is the run's. Only now is it dealt work.

        Raises:
            MismatchError: this worker's are others than the run's.
            ConfigError: the table cannot be planned.
        """
        if self.history.table is None:
            make_plan(table, self.config.cluster.shards)
        record = self.history.set_model(member.name, table, data_digest, evaluation_parts)
        if record is not None:
            self.ask(Journal(record, sync=True))
        was_live = member.live
        member.ready = True
        self.seen(member, now)
        if was_live:
            self._welcome(member)

    def stop(self, reason: str) -> None:
        """End the run where it is: save the state, then leave."""
        if self.stop_reason is None:
            log.info("stopping: %s", reason)
            self.stop_reason = reason

    # -- Facts about checkpoints ----------------------------------------------------------------

    def snapshot_written(self, fence: Fence, shard: int, version: int, file: tuple[str, str, int], error: str) -> None:
        """A shard's part of a checkpoint, asked for under a fence, is on disk, or could not be written."""
        complete = self.snapshots.written(fence, shard, version, file, error, self.config.cluster.shards)
        if complete is not None:
            self.ask(complete)

    def manifest_written(self, candidate: Candidate | None, version: int, error: str) -> None:
        """A checkpoint exists now, or its manifest could not be written."""
        self.snapshots.completed(version, candidate, error)
        if candidate is not None:
            self.ask(Journal({"type": "checkpoint", "version": version, "name": candidate.name}))

    # -- Progress -------------------------------------------------------------------------------

    def was_away(self, seconds: float, now: float) -> None:
        """The coordinator was stopped, or waited for its disk, for a while of which `now` knows nothing."""
        self.away_s += seconds
        if seconds > AWAY_S:
            log.warning("this coordinator was stopped, or its disk slow, for %.1f s: it counts against nobody", seconds)
            self.members.patient_until = now + REJOIN_S

    def advance(self, now: float) -> None:
        """Do whatever the facts allow."""
        if self.phase is Phase.ENDED:
            return
        for member in self.members.expire(now):
            self._lost(member, "has been silent for too long" if member.connected else "broke its connection")
        for member in self.members.heirs(now):
            self._seat(member, now)
        taken_over = self.standbys.take_over(now)
        if taken_over is not None:
            self.ask(MembersChanged())
            self.serving.gather(f"the standby of shard {taken_over} takes over", goes_on=True)
        before = None
        while before is not self.phase:
            before = self.phase
            missing = bool(self.members.missing_shards())
            if missing and (before is Phase.RUNNING or (before is Phase.GATHERING and self.serving.goes_on)):
                self._give_up_stopping(now)
            if before is not Phase.RUNNING:
                self.serving.advance(now)
            elif not missing:
                self.steps.advance(now)
                self._recover()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self.waits(now)

    def _recover(self) -> None:
        """Make the cluster serve anew, if a step asked for that."""
        if self.recovery_reason:
            self.serving.gather(self.recovery_reason, goes_on=True)
            self.recovery_reason = ""

    def waits(self, now: float) -> list[Wait]:
        """Whom the run waits for."""
        return find_waits(self, self.steps, self.serving, now)

    def waiting_for(self, now: float) -> str:
        """Say what is waited for, since when, and when it was last seen; empty: nothing."""
        return describe_wait(self, self.waits(now))

    def _lost(self, member: MemberState, why: str, asked: bool = False) -> None:
        expected = asked or (member.role is Role.WORKER and self.steps.is_over())
        log.log(logging.INFO if expected else logging.WARNING, "%s %s", member.name, why)
        self.ask(MembersChanged())
        self.ask(Journal({"type": "gone", **self._who(member), "why": why}))
        if member.role is Role.STANDBY:
            self.standbys.lose(member)
        if member.role is Role.WORKER:
            lost = self.steps.lose(member.rank)
            self.serving.lose(member.rank)
            if lost and self.phase is Phase.RUNNING:
                log.info("step %d: contributions %s are dealt again", self.state.version, lost)

    def _who(self, member: MemberState) -> dict[str, Any]:
        """Who it is, and when, for the journal."""
        life = {"role": str(member.role), "rank": member.rank, "life": member.incarnation}
        return {**life, "step": self.state.version}

    def _welcome(self, member: MemberState) -> None:
        """Tell a worker that has (again) come where the run is, and what it had been dealt."""
        if member.role is not Role.WORKER or self.phase not in (Phase.INITIALIZING, Phase.RUNNING):
            return
        self.ask(TellCluster(member.rank, self.fence, self.state))
        contributions, evaluate = self.steps.outstanding(member.rank)
        self.ask(
            TellDeal(
                member.rank,
                self.fence,
                self.state,
                contributions,
                evaluate,
                self.serving.initializer == member.rank,
            )
        )

    def _give_up_stopping(self, now: float) -> None:
        """Asked to stop, with a shard that does not come back: what it held cannot be saved."""
        missing = self.members.missing_shards()[0]
        member = self.members.get(Role.SHARD, missing)
        gone = member is None or now - member.last_seen > self.config.membership.lease_s
        if self.stop_reason is not None and self.snapshots.exists(self.state.version):
            self.end(True, self.steps.end_reason())
        elif self.stop_reason is not None and gone:
            self.end(
                False,
                f"{self.stop_reason}, but {describe_absence(self, Role.SHARD, missing, now)}: "
                f"version {self.state.version} could not be saved; {describe_newest(self.snapshots.candidates)}",
            )
