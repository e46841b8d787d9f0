"""Standbys: who stands by for whom, who may take over, and what a step waits for because of it.

Only the coordinator adds, removes and promotes a standby, by records that are on disk before anything follows from
them. A shard says with each report whether its standby holds everything of the step; the first report that does makes
the standby one that may take over. From then on no step is decided without it, so that what it holds is never behind.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ps.coordinator.actions import Dismiss, Follow, Journal, TellReplicate
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase, Run
from ps.types import Applied, Decision, Fence, Prepared, Role

log = logging.getLogger(__name__)

#: A shard that the journal knows may come back so long after the coordinator's start, before its standby takes over.
REJOIN_S = 2.0
#: A step waits so long for a standby that its shard does not reach. To be without one for a while costs less.
UNCOVERED_S = 1.0
#: Between two attempts to have a standby follow.
RETRY_S = 0.5


@dataclass
class _Following:
    """A standby that was told to follow."""

    life: int
    #: Of the shard.
    primary: int
    fence: Fence
    keep: bool
    #: The open step when it was told. What it holds of that one, if it begins anew, nobody has said since.
    told_at: int
    #: Its answer has come, and the shard knows of it.
    answered: bool = False
    #: The last decision that it has carried out.
    applied: Applied | None = None


class Standbys:
    """The standbys of a run."""

    def __init__(self, run: Run, now: float) -> None:
        self._run = run
        self._following: dict[int, _Following] = {}
        #: The last decision that each shard has carried out.
        self._shards: dict[int, Applied] = {}
        self._retry_at: dict[int, float] = {}
        #: Since when a report waits for its standby.
        self._uncovered: dict[int, float] = {}
        self._started_at = now
        #: Standbys whose state differed from their shard's.
        self.diverged = 0
        #: Standbys that became the shard.
        self.takeovers = 0
        if not run.members.has_standbys:
            # The run goes on without those that it had.
            for shard in list(run.history.standbys):
                self._note(shard, 0)

    def in_sync(self, shard: int) -> int:
        """The life of the standby that holds the same as the shard; 0: none does."""
        return self._run.history.standbys.get(shard, 0)

    # -- Facts ----------------------------------------------------------------------------------

    def prepared(self, report: Prepared) -> None:
        """A shard has reported the open step: its standby may be found to hold everything."""
        shard = report.shard
        member = self._run.members.get(Role.STANDBY, shard)
        known = self._following.get(shard)
        if not report.standby or member is None or not member.live or known is None or not known.answered:
            return
        if not known.keep and report.step <= known.told_at:
            # It may be the report of what the standby held before it was told to begin anew.
            return
        if report.standby == member.incarnation == known.life and self.in_sync(shard) != report.standby:
            log.info("standby %d holds the same as shard %d, and may take over", shard, shard)
            self._note(shard, report.standby)

    def applied(self, report: Applied) -> None:
        """A standby has carried out a decision."""
        known = self._following.get(report.shard)
        if known is not None and report.fence == self._run.fence:
            known.applied = report
            self._compare(report.shard)

    def shard_applied(self, report: Applied) -> None:
        """A shard has carried out a decision, under the present fence."""
        self._shards[report.shard] = report
        self._compare(report.shard)

    def following(self, shard: int, life: int, fence: Fence, version: int) -> None:
        """A standby follows; the shard is told where it is."""
        known, member = self._following.get(shard), self._run.members.get(Role.STANDBY, shard)
        if known is None or member is None or (known.life, known.fence) != (life, fence):
            return
        state, last = self._run.state, self._run.last_decision
        if known.keep and version not in (state.version, state.version - 1):
            self._forget(shard, f"is at version {version}, not {state.version}")
            return
        known.answered = True
        known.applied = Applied(fence, version - 1, shard, 0)
        if version < state.version and last is not None:
            # While it was asked, or before the last fence. One that holds nothing yet goes to any version.
            self.tell_decision(shard, last)
        self.tell_replicate(shard)

    def follow_failed(self, shard: int, life: int, fence: Fence, why: str) -> None:
        """A standby could not be told to follow; it is tried again."""
        known = self._following.get(shard)
        if known is not None and (known.life, known.fence) == (life, fence):
            log.warning("standby %d does not follow: %s", shard, why)
            self._forget(shard, "does not answer")

    def connected(self, shard: int) -> None:
        """A standby's session is open: it is told again what it may have missed."""
        known, last = self._following.get(shard), self._run.last_decision
        if known is not None and self.in_sync(shard) != known.life:
            # Nothing waits for it: it may have missed more than the last decision.
            self._forget(shard, "has lost its connection")
        elif last is not None:
            self.tell_decision(shard, last)

    def lose(self, member: MemberState) -> None:
        """A standby is gone."""
        self._forget(member.rank, "is gone")

    # -- What a step waits for ------------------------------------------------------------------

    def covers(self, report: Prepared) -> bool:
        """Whether a shard's report can be decided on: its standby holds it too, or there is none to take over."""
        return self.in_sync(report.shard) in (0, report.standby)

    def not_applied(self, step: int) -> list[int]:
        """The shards whose standby has not carried out the decision of a step."""
        behind = []
        for shard, known in self._following.items():
            is_waited_for = known.answered and self.in_sync(shard) == known.life
            if is_waited_for and (known.applied is None or known.applied.step < step):
                behind.append(shard)
        return behind

    # -- Messages -------------------------------------------------------------------------------

    def tell_decision(self, shard: int, decision: Decision) -> None:
        """Tell a decision to a shard's standby, if it follows."""
        known = self._following.get(shard)
        if known is not None and known.answered:
            self._run.tell_decision(shard, decision, standby=True)

    def tell_replicate(self, shard: int) -> None:
        """Tell a shard (again) who stands by for it."""
        known, member = self._following.get(shard), self._run.members.get(Role.STANDBY, shard)
        if known is not None and known.answered and member is not None:
            self._run.ask(TellReplicate(shard, self._run.fence, member.address, member.incarnation))
        else:
            self._run.ask(TellReplicate(shard, self._run.fence))

    # -- Progress -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Another fence: whoever follows is told again; after a rollback nobody is in sync, and all begin anew."""
        self._following.clear()
        self._shards.clear()
        self._retry_at.clear()
        self._uncovered.clear()

    def advance(self, reports: dict[int, Prepared], now: float) -> None:
        """Have standbys follow; give up one that its shard cannot reach."""
        if self._run.phase is not Phase.RUNNING or not self._run.members.has_standbys:
            return
        for shard in self._run.shards:
            self._follow(shard, now)
            report = reports.get(shard)
            if report is None or self.covers(report):
                self._uncovered.pop(shard, None)
            elif now - self._uncovered.setdefault(shard, now) > UNCOVERED_S:
                self._forget(shard, f"cannot be reached by shard {shard}")

    def take_over(self, now: float) -> int | None:
        """Promote the standby of a shard that is gone; returns the shard. None: there is none to be promoted."""
        members = self._run.members
        for shard in members.missing_shards():
            primary, standby = members.get(Role.SHARD, shard), members.get(Role.STANDBY, shard)
            if standby is None or not standby.live:
                continue
            holds, lease_s = standby.incarnation == self.in_sync(shard), self._run.config.membership.lease_s
            if primary is None:
                gone = now - self._started_at > (REJOIN_S if holds else lease_s)
            elif holds:
                # Whether it holds the same is known a moment later where the shard was faster with its last words.
                known = primary.served and not self._lags(shard)
                gone = known or now - primary.last_seen > lease_s
            else:
                # It holds nothing, as whoever comes in the shard's place; but that one may have a journal.
                gone = not primary.connected and now - primary.last_seen > lease_s
            if gone:
                self._promote(shard)
                return shard
        return None

    def _promote(self, shard: int) -> None:
        held = self.in_sync(shard)
        before = self._run.members.get(Role.SHARD, shard)
        member = self._run.members.promote(shard)
        log.warning("standby %d takes over as shard %d", shard, shard)
        self.takeovers += 1
        self._following.pop(shard, None)
        self._run.ask(
            Journal(
                {"type": "promotion", "shard": shard, "life": member.incarnation, "in_sync": held == member.incarnation}
            )
        )
        self._note(shard, 0)
        self._run.snapshots.lose(shard, self._run.state.version)
        if before is not None:
            self._run.ask(Dismiss(before.incarnation, f"{before.name} was replaced by a newer life of it"))

    def _follow(self, shard: int, now: float) -> None:
        primary = self._run.members.get(Role.SHARD, shard)
        standby = self._run.members.get(Role.STANDBY, shard)
        if primary is None or standby is None or not standby.live:
            return
        known = self._following.get(shard)
        if known is not None and (known.life, known.primary) == (standby.incarnation, primary.incarnation):
            return
        if now < self._retry_at.get(shard, now):
            return
        self._retry_at[shard] = now + RETRY_S
        keep = self.in_sync(shard) == standby.incarnation
        self._following[shard] = _Following(
            standby.incarnation, primary.incarnation, self._run.fence, keep, self._run.state.version
        )
        self._run.ask(Follow(shard, self._run.fence, self._run.state, keep))

    def _forget(self, shard: int, why: str) -> None:
        """A standby does not count any more."""
        if self.in_sync(shard):
            log.warning("standby %d %s: until there is another one, shard %d has none", shard, why, shard)
            self._note(shard, 0)
        self._uncovered.pop(shard, None)
        if self._following.pop(shard, None) is not None and self._run.phase is Phase.RUNNING:
            self.tell_replicate(shard)

    def _compare(self, shard: int) -> None:
        """Hold a standby's state against its shard's as soon as both are known, after the same decision.

        Not later: the shard may die before the others have carried it out, and the standby would take its place.
        """
        known, of_shard = self._following.get(shard), self._shards.get(shard)
        applied = known.applied if known is not None else None
        if applied is None or of_shard is None or applied.step != of_shard.step:
            return
        # A standby that does not hold everything says 0, and so does a shard at its initial values.
        if applied.state_hash and of_shard.state_hash and applied.state_hash != of_shard.state_hash:
            self.diverged += 1
            log.error("standby %d holds another state than shard %d after step %d", shard, shard, applied.step)
            self._dismiss(shard, f"its state after step {applied.step} is not that of shard {shard}")

    def _lags(self, shard: int) -> bool:
        """Whether a shard has carried out a decision that its standby has not."""
        known, of_shard = self._following.get(shard), self._shards.get(shard)
        if known is None or known.applied is None or of_shard is None:
            return False
        return known.applied.step < of_shard.step

    def _dismiss(self, shard: int, reason: str) -> None:
        member = self._run.members.get(Role.STANDBY, shard)
        self._forget(shard, "is dismissed")
        if member is not None:
            self._run.ask(Dismiss(member.incarnation, reason))
            self._run.members.remove(member)

    def _note(self, shard: int, life: int) -> None:
        if self.in_sync(shard) != life:
            self._run.ask(Journal(self._run.history.note_standby(shard, life), sync=True))
