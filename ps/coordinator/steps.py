"""The running phase: deal work, decide steps, evaluate. Looks at facts, never at events."""

from __future__ import annotations

import logging

from ps.coordinator.accounts import accounts
from ps.coordinator.actions import Journal, PrepareCheckpoint, Record, TellDeal, TellForegone, TellSnapshot
from ps.coordinator.dealing import EVEN, Dealing
from ps.coordinator.decision import TrainingState, after, decide, foregone, same_content
from ps.coordinator.evaluation import Evaluation
from ps.coordinator.pace import Pace
from ps.coordinator.recovery import describe_newest
from ps.coordinator.run import Run
from ps.coordinator.standbys import Standbys
from ps.coordinator.timings import Speed, Spent, Timings, finite
from ps.types import Applied, Decision, Fence, Prepared, Role
from ps.wire.proto import to_record

log = logging.getLogger(__name__)


class Steps:
    """The open step: who computes what, which reports have come, what follows from them."""

    def __init__(self, run: Run, standbys: Standbys) -> None:
        self._run = run
        self._standbys = standbys
        self.dealing = Dealing(run.history.contributions)
        self.evaluation: Evaluation | None = None
        self._closed_at: float | None = None
        self._timings = Timings()
        self.speed = Speed()
        self.pace = Pace()
        #: Contributions that were late and given to a second worker, in this life of the coordinator.
        self.duplicated = 0
        #: Each worker's last contribution.
        self.spent: dict[int, Spent] = {}
        self._reports: dict[int, Prepared] = {}
        self._applied: dict[int, Applied] = {}
        #: What shards may do of the open step without its decision.
        self._foregone: Decision | None = None
        #: Shards may have updated chunks of the open step: it has to be completed.
        self._ahead = False
        self._resumed_at = 0.0

    def reset(self) -> None:
        """A new fence: what belongs to another one is forgotten."""
        self._reports.clear()
        self._applied.clear()
        self._foregone = None
        self.evaluation = None
        self._closed_at = None
        self.dealing = Dealing(self._run.history.contributions)

    # -- Facts ----------------------------------------------------------------------------------

    def prepared(self, report: Prepared) -> None:
        if report.fence == self._run.fence and report.step == self._run.state.version:
            self._reports[report.shard] = report
            self._standbys.prepared(report)

    def applied(self, report: Applied) -> None:
        if report.fence == self._run.fence:
            self._applied[report.shard] = report
            self._standbys.shard_applied(report)

    def contributed(
        self,
        rank: int,
        fence: Fence,
        spent: Spent,
        now: float,
    ) -> bool:
        """Every shard holds a whole contribution; before a rollback they may have held what is lost now.

        Whoever else is at it hears that it may leave it.

        Returns:
            False when that was known, or is not of the open step: nothing is counted twice.
        """
        self.spent[rank] = spent
        if fence != self._run.fence or spent.step != self._run.state.version:
            return False
        finish = self.dealing.finish(spent.contribution, rank, now)
        if finish is None:
            return False
        if finish.took_s is not None and self.evaluation is None:
            self.pace.took(rank, finish.took_s)
        for other, seconds in finish.others.items():
            if self.evaluation is None:
                self.pace.at_least(other, seconds)
            self._run.ask(TellDeal(other, self._run.fence, self._run.state, done=(spent.contribution,)))
        self._timings.add(rank, spent.compute_s, spent.push_s, spent.pull_s, spent.wait_s)
        return True

    def evaluated(self, version: int, part: int, loss_sum: float, tokens: int, num_bytes: int) -> None:
        if self.evaluation is not None and self.evaluation.version == version:
            self.evaluation.add(part, loss_sum, tokens, num_bytes)

    def note_applied(self, shard: int, state_hash: int = 0) -> None:
        """A shard at the present version has nothing left to acknowledge."""
        self.applied(Applied(self._run.fence, self._run.state.version - 1, shard, state_hash))

    def lose(self, rank: int) -> list[int]:
        """Take back what a worker had not finished; returns its contributions."""
        self.pace.forget(rank)
        if self.evaluation is not None:
            self.evaluation.dealing.lose(rank)
        return self.dealing.lose(rank)

    def outstanding(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a worker has been dealt and has not finished: contributions, parts of the evaluation."""
        evaluate = self.evaluation.dealing.outstanding(rank) if self.evaluation is not None else []
        return tuple(self.dealing.outstanding(rank)), tuple(evaluate)

    # -- Progress -------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Do whatever the facts allow; every shard is there."""
        self._standbys.advance(self._reports, now)
        self._close_step(now)
        self._save_first()
        if self._finish_evaluation():
            self.dealing.begin(now)
            self._deal(now)
        if self.is_over():
            self._finish()
        elif not self._run.snapshots.has_first() and self._run.snapshots.failure(self._run.state.version):
            # Without it there is nothing to go back to, so nothing may be decided.
            failure = self._run.snapshots.failure(self._run.state.version)
            self._run.end(False, f"the first checkpoint could not be written: {failure}")
        elif self._may_decide():
            self._decide(now)
        elif self._run.stop_reason is not None:
            self._stop_step(now)
        self._foresee()
        self._deal(now)

    def resume(self, ahead: bool, now: float) -> None:
        """Go on with the open step.

        Args:
            ahead: a shard has updated chunks of it already, so that it has to be completed.
        """
        self._ahead, self._resumed_at = ahead, now
        self.begin_step(now)

    def begin_step(self, now: float) -> None:
        """Plan the work of the open step, and of the evaluation that is due before it."""
        version = self._run.state.version
        self.dealing = Dealing(self._run.history.contributions if not self.is_over() else 0)
        self.pace.next_step()
        parts = self._run.history.evaluation_parts
        if parts and version not in self._run.history.evaluations and self._is_evaluation_due(version):
            self.evaluation = Evaluation(version, parts)
        self._deal(now, all_workers=True)

    def _deal(self, now: float, all_workers: bool = False) -> None:
        """Give out what nobody has, and what is late; at the start of a step every worker hears of it."""
        membership, timeout = self._run.config.membership, self._run.config.training.step_timeout_s
        for units in (self.dealing, self.evaluation.dealing if self.evaluation else None):
            if units is not None and units.overdue(now, timeout):
                log.warning(
                    "step %d: work is overdue after %.0f s and is dealt again", self._run.state.version, timeout
                )
        live = self._run.members.live_workers()
        # A spare takes over from one that sends signs of life and nothing else, too.
        late = self.dealing.late | (self.evaluation.dealing.late if self.evaluation else set())
        first = sorted(live, key=late.__contains__)
        workers = first[: membership.max_workers] if not self.lacks_workers() else []
        pace = self.pace.of(live)
        evaluate = self.evaluation.dealing.deal(workers, now) if self.evaluation else {}
        contributions = self.dealing.deal(workers, now, pace if membership.balance == "speed" else EVEN)
        # An evaluation comes before contributions, and is not what they take.
        seconds = membership.duplicate_late and self.evaluation is None
        duplicated = self.dealing.duplicate(workers, now, pace) if seconds else {}
        for rank, also in duplicated.items():
            step = self._run.state.version
            log.info("step %d: contributions %s are late: worker %d computes them too", step, also, rank)
            self.duplicated += len(also)
            contributions.setdefault(rank, []).extend(also)
        for rank in live:
            if all_workers or rank in evaluate or rank in contributions:
                self._run.ask(
                    TellDeal(
                        rank,
                        self._run.fence,
                        self._run.state,
                        tuple(contributions.get(rank, ())),
                        tuple(evaluate.get(rank, ())),
                    )
                )

    def lacks_workers(self) -> bool:
        """Whether too few workers are there to be dealt work; what has to be completed before a stop may be."""
        few = len(self._run.members.live_workers()) < self._run.config.membership.min_workers
        return few and not (self._ahead and self._run.stop_reason is not None)

    # -- Eager steps ----------------------------------------------------------------------------

    def _foresee(self) -> None:
        """Let the shards update without the decision, where it is foregone and nothing can stop the step any more."""
        run = self._run
        # After an overflow steps are decided until going back cannot lead before it again.
        begun = run.snapshots.newest > run.history.last_overflow and self.evaluation is None
        if self._foregone is not None or not begun or run.stop_reason is not None or self.is_over():
            return
        self._foregone = self.foregone(run.state)
        self._ahead |= self._foregone is not None
        for shard in run.shards:
            self.tell_foregone(shard)

    def foregone(self, state: TrainingState) -> Decision | None:
        """What the decision of a state's open step will do; None: it depends on its reports."""
        if state.version == self._run.history.last_overflow:
            return None
        return foregone(self._run.config, state, self._run.fence)

    def tell_foregone(self, shard: int) -> None:
        """Tell a shard (again) what is foregone, if anything is."""
        if self._foregone is not None:
            self._run.ask(TellForegone(shard, self._foregone))

    def _decide_later(self, step: int) -> None:
        """An eager step overflowed: some chunks are updated that should not be. It is made again, and decided."""
        log.warning("step %d overflowed after chunks of it were updated: going back, to skip it", step)
        self._run.history.last_overflow = step
        self._run.ask(Journal({"type": "overflow", "step": step}, sync=True))
        self._run.recover(f"step {step} overflowed")

    def _stop_step(self, now: float) -> None:
        """Asked to stop in an eager step: it has to be completed where chunks of it are updated, and only there."""
        version = self._run.state.version
        if self._foregone is not None:
            # A new fence withdraws what is foregone, and shows whether anybody has used it.
            self._run.recover(f"{self._run.stop_reason}; is step {version} begun?")
        elif self._is_alone(now):
            self._run.end(
                False,
                f"{self._run.stop_reason}, but step {version} is half done and no worker is left; "
                f"{describe_newest(self._run.snapshots.candidates)}",
            )

    def _is_alone(self, now: float) -> bool:
        """No worker is there, and none that was there comes back."""
        members = self._run.members
        seen = max([self._resumed_at, *(member.last_seen for member in members.of(Role.WORKER))])
        return not members.live_workers() and now - seen > self._run.config.membership.lease_s

    # -- Decisions ------------------------------------------------------------------------------

    def _may_decide(self) -> bool:
        shards = self._run.config.cluster.shards
        return (
            len(self._reports) == shards
            and not self.not_covered()
            and self._is_carried_out()
            and self.evaluation is None
            and self._run.snapshots.has_first()
        )

    def _all_applied(self) -> bool:
        return not self.not_applied()

    def _is_carried_out(self) -> bool:
        """Whether every shard, and every standby that may take over, has acknowledged the last decision."""
        return self._all_applied() and not self.standbys_not_applied()

    def not_applied(self) -> list[int]:
        """The shards that have not acknowledged the last decision."""
        wanted = self._run.state.version - 1
        return [s for s in self._run.shards if s not in self._applied or self._applied[s].step != wanted]

    def standbys_not_applied(self) -> list[int]:
        """The shards whose standby, which may take over, has not acknowledged the last decision."""
        return self._standbys.not_applied(self._run.state.version - 1)

    def not_covered(self) -> list[int]:
        """The shards that have reported the open step, which their standby, which may take over, does not hold."""
        return [shard for shard, report in self._reports.items() if not self._standbys.covers(report)]

    def not_prepared(self) -> list[int]:
        """The shards that have not reported the open step."""
        return [shard for shard in self._run.shards if shard not in self._reports]

    def _decide(self, now: float) -> None:
        decision = decide(self._run.config, self._run.state, list(self._reports.values()), self._run.fence)
        if self._ahead and decision.skip:
            self._decide_later(decision.step)
            return
        self._foregone, self._ahead = None, False
        before = self._run.history.superseded.get(decision.step)
        if before is not None and not same_content(before, decision):
            log.error(
                "step %d was decided otherwise before the rollback: this device does not repeat its own bits",
                decision.step,
            )
        counted = accounts(self._reports.values())
        self._run.ask(Journal({"type": "decision", **to_record(decision), "counted": counted}))
        self._run.history.note(decision)
        self._run.state = after(self._run.state, decision)
        self._run.last_decision = decision
        self._reports.clear()
        if decision.snapshot:
            self._begin_snapshot()
        for shard in self._run.shards:
            self._run.tell_decision(shard, decision)
            self._standbys.tell_decision(shard, decision)
        self.begin_step(now)

    def _close_step(self, now: float) -> None:
        """Record a step once every shard has carried its decision out."""
        decision = self._run.last_decision
        if decision is None or decision.step in self._run.history.recorded or not self._is_carried_out():
            return
        self._run.history.recorded.add(decision.step)
        self.dealing.begin(now)
        # For people: with the time that does not count for leases.
        now += self._run.away_s
        seconds = now - self._closed_at if self._closed_at is not None else None
        self._closed_at = now
        hashes = [self._applied[shard].state_hash for shard in self._run.shards]
        # The line first: at a start, lines that the journal does not confirm are dropped.
        line = self._timings.line(decision, seconds)
        self.speed.note(line)
        self._run.ask(Record(line))
        self._run.ask(Journal({"type": "applied", "step": decision.step, "hashes": hashes}))
        self._timings = Timings()

    def _is_evaluation_due(self, version: int) -> bool:
        every = self._run.config.evaluation.every_steps
        return version > 0 and (self._reached_end() or bool(every and version % every == 0))

    def _finish_evaluation(self) -> bool:
        if self.evaluation is None or not self.evaluation.dealing.complete:
            return False
        result = self.evaluation.result()
        self.evaluation = None
        self._run.history.evaluations[result["version"]] = result
        self._run.ask(Record({"kind": "evaluation", **{key: finite(value) for key, value in result.items()}}))
        self._run.ask(Journal({"type": "evaluation", **result}))
        return True

    # -- The end --------------------------------------------------------------------------------

    def _reached_end(self) -> bool:
        return self._run.state.version >= self._run.config.training.end

    def _target_reached(self) -> bool:
        target = self._run.config.training.target_loss
        result = self._run.history.evaluations.get(self._run.state.version)
        return target is not None and result is not None and result["loss"] <= target

    def is_over(self) -> bool:
        if self._ahead:
            return False
        return self._reached_end() or self._target_reached() or self._run.stop_reason is not None

    def _finish(self) -> None:
        """Save the present version, then leave."""
        if not self._is_carried_out() or (self.evaluation is not None and self._run.stop_reason is None):
            return
        version = self._run.state.version
        if self._run.snapshots.exists(version):
            self._run.end(True, self.end_reason())
        elif self._run.snapshots.failure(version):
            self._run.end(False, f"the last checkpoint could not be written: {self._run.snapshots.failure(version)}")
        elif not self._run.snapshots.is_pending(version):
            self._save()

    def _save_first(self) -> None:
        """Without any checkpoint there is nothing to go back to: one is made before the next decision."""
        version = self._run.state.version
        begun = (
            self._run.snapshots.has_first()
            or self._run.snapshots.is_pending(version)
            or self._run.snapshots.failure(version)
        )
        if not begun and self._all_applied():
            self._save()

    def end_reason(self) -> str:
        version = self._run.state.version
        if version >= self._run.config.training.steps:
            return f"finished: {version} steps"
        if self._target_reached():
            return f"the held-out loss reached its target after {version} steps"
        if self._reached_end():
            return f"stopped at step {version} as asked (training.stop_at)"
        return f"stopped at step {version}: {self._run.stop_reason}"

    def _begin_snapshot(self) -> None:
        self._run.snapshots.begin(self._run.state, self._run.fence)
        self._run.ask(PrepareCheckpoint(self._run.state.version))

    def _save(self) -> None:
        """Have the present version written, which every shard has applied."""
        self._begin_snapshot()
        for shard in self._run.shards:
            self._run.ask(TellSnapshot(shard, self._run.fence, self._run.state.version))
