"""The coordinator's state machine: events in, actions out. No sockets, no clock, no files.

Events note facts. `advance` then looks at all facts and does whatever they allow, so that nothing
depends on the order in which facts came. Making a cluster serve is one sequence, whether it starts,
resumes or lost a shard: gather, inspect, load, serve (`Phase`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from enum import Enum

from ps.config import RunConfig
from ps.coordinator.actions import (
    Action,
    Configure,
    Control,
    End,
    Journal,
    MembersChanged,
    PrepareCheckpoint,
    Record,
    Rewind,
    TellCluster,
    TellDeal,
    TellDecision,
    TellSnapshot,
)
from ps.coordinator.dealing import Dealing
from ps.coordinator.decision import TrainingState, after, decide, same_content
from ps.coordinator.evaluation import Evaluation
from ps.coordinator.history import History
from ps.coordinator.members import Members, MemberState
from ps.coordinator.recovery import Candidate, Inspection, choose_checkpoint, surviving_version
from ps.coordinator.snapshots import Snapshots
from ps.coordinator.timings import Timings, finite
from ps.errors import PsError, StorageError
from ps.sharding import make_plan
from ps.types import Applied, Decision, Fence, ParameterTable, Prepared, Role
from ps.wire.proto import to_record

log = logging.getLogger(__name__)


#: Between two attempts to make the cluster serve.
RETRY_S = 0.2
#: Members that a message names, at most.
NAMED = 4


class Phase(Enum):
    GATHERING = "gathering"
    INSPECTING = "inspecting"
    LOADING = "loading"
    OPENING = "opening"
    INITIALIZING = "initializing"
    RUNNING = "running"
    ENDED = "ended"


class Machine:
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
        self.config = config
        self.history = history
        self.members = Members(config.membership.lease_s, config.membership.reconnect_grace_s, config.cluster.shards)
        self.snapshots = Snapshots(candidates, rejected)
        self.phase = Phase.GATHERING
        self.state = TrainingState.start(config)
        self.fence = Fence(term, history.epoch)
        self.last_decision: Decision | None = None
        self.evaluation: Evaluation | None = None
        self.dealing = Dealing(history.contributions)
        self.stop_reason: str | None = None
        self._started_at = now
        self._served = False
        self._retry_at = now
        self._closed_at: float | None = None
        self._timings = Timings()
        self._inspections: dict[int, Inspection] = {}
        self._answered: set[int] = set()
        self._reports: dict[int, Prepared] = {}
        self._applied: dict[int, Applied] = {}
        self._initialized: set[int] = set()
        self._initializer: int | None = None
        self._checkpoint: Candidate | None = None
        self._actions: list[Action] = []

    def drain(self) -> list[Action]:
        """Take the actions that have come up, in order."""
        actions, self._actions = self._actions, []
        return actions

    # -- Facts about members --------------------------------------------------------------------

    def register(self, member: MemberState, now: float) -> int:
        """Take a member in and return its rank.

        Raises:
            MismatchError: it cannot be part of this run.
        """
        rank = self.members.place(member.role, member.rank, member.incarnation, now)
        member = replace(member, rank=rank)
        before = self.members.admit(member, now)
        if before is not None:
            log.info("%s has come back in a new life", member.name)
            self._lost(before, "was replaced")
        if self.members.find(member.role, rank, member.incarnation) is member:
            self._actions.append(
                Journal({"type": "member", "role": str(member.role), "rank": rank, "life": member.incarnation})
            )
            if member.role is Role.SHARD and self.phase is not Phase.GATHERING:
                # A shard in a new life holds nothing: the cluster is made to serve again.
                self._gather(f"{member.name} started anew")
        return rank

    def connect(self, member: MemberState, now: float) -> None:
        """A member's session is open: what it may have missed is told again."""
        member.connected = member.met = True
        self.seen(member, now)
        self._actions.append(MembersChanged())
        if member.role is Role.SHARD and self.phase is Phase.RUNNING:
            # First the last decision; what the shard still lacks follows from its own reports.
            if self.last_decision is not None:
                self._tell_decision(member.rank, self.last_decision)
            if self.snapshots.is_pending(self.state.version):
                self._actions.append(TellSnapshot(member.rank, self.fence, self.state.version))

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
            member.live = True
            log.info("%s is there", member.name)
            self._welcome(member)

    def leave(self, member: MemberState, now: float) -> None:
        """A member goes by its own will. The state of a shard is saved first: the cluster stops."""
        if member.role is Role.SHARD:
            self.stop(f"{member.name} was asked to stop")
        else:
            # Not ready either: a heartbeat that is still on its way must not bring it back.
            member.live = member.connected = member.ready = False
            self._lost(member, "left")
        member.last_seen = now

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
            self._actions.append(Journal(record, sync=True))
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

    # -- Facts from shards ----------------------------------------------------------------------

    def configured(self, shard: int, fence: Fence, control: Control, inspection: Inspection) -> None:
        """A shard carried out Configure."""
        if fence == self.fence and control is _CONTROL_OF.get(self.phase):
            self._answered.add(shard)
            self._inspections[shard] = inspection

    def configure_failed(self, shard: int, fence: Fence, control: Control, error: PsError, fatal: bool) -> None:
        """A shard could not carry out Configure: a damaged checkpoint, or it is gone."""
        if fence != self.fence or control is not _CONTROL_OF.get(self.phase):
            return
        # A shard that died while it loaded says nothing about the checkpoint.
        damaged = control is Control.LOAD and isinstance(error, StorageError)
        if damaged and self._checkpoint is not None and not fatal:
            log.error(
                "checkpoint %s cannot be loaded by shard %d: %s; going back to the one before",
                self._checkpoint.name,
                shard,
                error.message,
            )
            self.snapshots.reject(self._checkpoint)
            self._gather(f"checkpoint {self._checkpoint.name} is damaged")
        elif fatal:
            self._end(False, f"shard {shard}: {error.message}")
        else:
            self._gather(f"shard {shard} did not answer: {error.message}")

    def prepared(self, report: Prepared) -> None:
        if report.fence == self.fence and report.step == self.state.version:
            self._reports[report.shard] = report

    def applied(self, report: Applied) -> None:
        if report.fence == self.fence:
            self._applied[report.shard] = report

    def initialized(self, shard: int, fence: Fence) -> None:
        if fence == self.fence:
            self._initialized.add(shard)

    def snapshot_written(self, shard: int, version: int, file: tuple[str, str, int], error: str) -> None:
        """A shard's part of a checkpoint is on disk, or could not be written."""
        complete = self.snapshots.written(shard, version, file, error, self.config.cluster.shards)
        if complete is not None:
            self._actions.append(complete)

    def manifest_written(self, candidate: Candidate | None, version: int, error: str) -> None:
        """A checkpoint exists now, or its manifest could not be written."""
        self.snapshots.completed(version, candidate, error)
        if candidate is not None:
            self._actions.append(Journal({"type": "checkpoint", "version": version, "name": candidate.name}))

    # -- Facts from workers ---------------------------------------------------------------------

    def contributed(
        self, rank: int, step: int, contribution: int, compute_s: float, push_s: float, pull_s: float
    ) -> None:
        """Every shard holds a whole contribution."""
        if step == self.state.version:
            self.dealing.finish(contribution)
            self._timings.add(rank, compute_s, push_s, pull_s)

    def evaluated(self, version: int, part: int, loss_sum: float, tokens: int, num_bytes: int) -> None:
        if self.evaluation is not None and self.evaluation.version == version:
            self.evaluation.add(part, loss_sum, tokens, num_bytes)

    # -- Progress -------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Do whatever the facts allow."""
        if self.phase is Phase.ENDED:
            return
        for member in self.members.expire(now):
            self._lost(member, "has been silent for too long" if member.connected else "broke its connection")
        before = None
        while before is not self.phase:
            before = self.phase
            step = _STEPS.get(before)
            if step is not None:
                step(self, now)

    def _lost(self, member: MemberState, why: str) -> None:
        log.warning("%s %s", member.name, why)
        self._actions.append(MembersChanged())
        if member.role is Role.WORKER:
            lost = self.dealing.lose(member.rank)
            if self.evaluation is not None:
                self.evaluation.dealing.lose(member.rank)
            if self._initializer == member.rank:
                self._initializer = None
            if lost and self.phase is Phase.RUNNING:
                log.info("step %d: contributions %s are dealt again", self.state.version, lost)

    def _welcome(self, member: MemberState) -> None:
        """Tell a worker that has (again) come where the run is, and what it had been dealt."""
        if member.role is not Role.WORKER or self.phase not in (Phase.INITIALIZING, Phase.RUNNING):
            return
        self._actions.append(TellCluster(member.rank, self.fence, self.state))
        evaluate = self.evaluation.dealing.outstanding(member.rank) if self.evaluation is not None else []
        contributions = self.dealing.outstanding(member.rank)
        self._actions.append(
            TellDeal(
                member.rank,
                self.fence,
                self.state,
                tuple(contributions),
                tuple(evaluate),
                self._initializer == member.rank,
            )
        )

    # -- Making the cluster serve ---------------------------------------------------------------

    def _gather(self, why: str) -> None:
        if self.phase is Phase.ENDED:
            return
        if self.phase is not Phase.GATHERING:
            log.info("the cluster is made to serve again: %s", why)
        self.phase = Phase.GATHERING
        self._answered.clear()
        self._inspections.clear()

    def _gathering(self, now: float) -> None:
        if self.stop_reason is not None:
            self._end(True, self.stop_reason)
            return
        if self.history.table is None or self.members.missing_shards():
            waited = now - self._started_at
            if waited > self.config.membership.start_timeout_s and not self._served:
                self._end(False, f"{self.waiting_for(now)}; membership.start_timeout_s is over")
            return
        if now < self._retry_at:
            return
        self._retry_at = now + RETRY_S
        # One recovery, one epoch: an interrupted recovery's calls are fenced off by the next one's.
        self.fence = Fence(self.fence.term, self.history.next_epoch())
        shards = [member.incarnation for member in self.members.of(Role.SHARD)]
        self._actions.append(
            Journal({"type": "epoch", "epoch": self.fence.epoch, "term": self.fence.term, "shards": shards}, sync=True)
        )
        self._enter(Phase.INSPECTING, Control.INSPECT)

    def _enter(self, phase: Phase, control: Control) -> None:
        self.phase = phase
        self._answered.clear()
        checkpoint = self._checkpoint if control is Control.LOAD else None
        for shard in range(self.config.cluster.shards):
            self._actions.append(
                Configure(
                    shard,
                    control,
                    self.fence,
                    checkpoint.name if checkpoint else "",
                    checkpoint.manifest_sha256 if checkpoint else "",
                    self.state if control is Control.SERVE else None,
                )
            )

    def _all_answered(self) -> bool:
        return len(self._answered) == self.config.cluster.shards

    def _inspecting(self, _now: float) -> None:
        if not self._all_answered():
            return
        inspections = [self._inspections[shard] for shard in range(self.config.cluster.shards)]
        if not self._adopt([i.last_decision for i in inspections if i.last_decision is not None]):
            return
        version = surviving_version(inspections, self.history.last_decision)
        if version is not None:
            log.info("every shard still holds its state: going on at version %d", version)
            self.last_decision = self.history.decisions.get(version - 1)
            if self.last_decision is not None:
                self.state = after(self.state, self.last_decision)
            self._open()
            return
        self._checkpoint = choose_checkpoint(self.snapshots.candidates)
        if self._checkpoint is None and (self.history.decisions or self.snapshots.rejected):
            damaged = ", ".join(self.snapshots.rejected) or "none was found"
            self._end(
                False,
                f"no checkpoint in {self.config.checkpoint_dir} can be loaded ({damaged}); restore one, or start "
                "again with a new run_dir",
            )
            return
        self._enter(Phase.LOADING, Control.LOAD)

    def _adopt(self, heard: list[Decision]) -> bool:
        """Take over what shards were told and the journal has lost; False: the run has ended, they conflict."""
        for decision in sorted(heard, key=lambda decision: decision.step):
            known = decision.step in self.history.decisions
            if not self.history.adopt(decision):
                self._end(
                    False,
                    f"two decisions of step {decision.step} differ between a shard and the journal; "
                    "the run folder belongs to another run, or its disk has lost data",
                )
                return False
            if not known and decision.step in self.history.decisions:
                log.warning("the journal has lost the decision of step %d; it is taken from a shard", decision.step)
                self._actions.append(Journal({"type": "decision", **to_record(decision)}, sync=True))
        return True

    def _loading(self, _now: float) -> None:
        if not self._all_answered():
            return
        self.last_decision = None
        self.state = self._checkpoint.state if self._checkpoint else TrainingState.start(self.config)
        self.history.rollback(self.state.version)
        self.snapshots.forget_pending()
        self._actions.append(
            Journal(
                {"type": "rollback", "epoch": self.fence.epoch, "version": self.state.version},
                sync=True,
            )
        )
        self._actions.append(Rewind(self.state.version))
        self._open()

    def _open(self) -> None:
        self._reports.clear()
        self._applied.clear()
        self._initialized.clear()
        self._initializer = None
        self.evaluation = None
        self._closed_at = None
        self._enter(Phase.OPENING, Control.SERVE)

    def _opening(self, now: float) -> None:
        if not self._all_answered():
            return
        self._served = True
        empty = not all(inspection.has_state for inspection in self._inspections.values())
        self.dealing = Dealing(self.history.contributions)
        self.phase = Phase.INITIALIZING if empty else Phase.RUNNING
        for rank in self.members.live_workers():
            self._actions.append(TellCluster(rank, self.fence, self.state))
        if self.phase is Phase.RUNNING:
            for shard in range(self.config.cluster.shards):
                if self._inspections[shard].version < self.state.version and self.last_decision is not None:
                    self._tell_decision(shard, self.last_decision)
                else:
                    self._note_applied(shard)
            self._begin_step(now)

    def _note_applied(self, shard: int) -> None:
        """A shard at the present version has nothing left to acknowledge."""
        self._applied[shard] = Applied(self.fence, self.state.version - 1, shard, 0)

    def _initializing(self, now: float) -> None:
        if self.stop_reason is not None:
            self._end(True, self.stop_reason)
            return
        if len(self._initialized) == self.config.cluster.shards:
            log.info("every shard holds its initial values")
            self.phase = Phase.RUNNING
            for shard in range(self.config.cluster.shards):
                self._note_applied(shard)
            self._begin_step(now)
            return
        workers = self.members.live_workers()
        if self._initializer is None and workers:
            self._initializer = workers[0]
            self._actions.append(TellDeal(workers[0], self.fence, self.state, initialize=True))

    # -- Steps ----------------------------------------------------------------------------------

    def _running(self, now: float) -> None:
        if self.members.missing_shards():
            self._give_up_stopping(now)
            return
        self._close_step(now)
        self._save_first()
        if self._finish_evaluation():
            self._deal(now)
        if self._is_over():
            self._finish()
        elif not self.snapshots.has_first() and self.snapshots.failure(self.state.version):
            # Without it there is nothing to go back to, so nothing may be decided.
            self._end(False, f"the first checkpoint could not be written: {self.snapshots.failure(self.state.version)}")
        elif self._may_decide():
            self._decide(now)
        self._deal(now)

    def _begin_step(self, now: float) -> None:
        """Plan the work of the open step, and of the evaluation that is due before it."""
        version = self.state.version
        self.dealing = Dealing(self.history.contributions if not self._is_over() else 0)
        parts = self.history.evaluation_parts
        if parts and version not in self.history.evaluations and self._is_evaluation_due(version):
            self.evaluation = Evaluation(version, parts)
        self._deal(now, all_workers=True)

    def _deal(self, now: float, all_workers: bool = False) -> None:
        """Give out what nobody has; at the start of a step every worker hears of it."""
        timeout = self.config.training.step_timeout_s
        for units in (self.dealing, self.evaluation.dealing if self.evaluation else None):
            if units is not None and units.overdue(now, timeout):
                log.warning("step %d: work is overdue after %.0f s and is dealt again", self.state.version, timeout)
        workers = self.members.live_workers()
        evaluate = self.evaluation.dealing.deal(workers, now) if self.evaluation else {}
        contributions = self.dealing.deal(workers, now)
        for rank in workers:
            if all_workers or rank in evaluate or rank in contributions:
                self._actions.append(
                    TellDeal(
                        rank,
                        self.fence,
                        self.state,
                        tuple(contributions.get(rank, ())),
                        tuple(evaluate.get(rank, ())),
                    )
                )

    def _may_decide(self) -> bool:
        shards = self.config.cluster.shards
        return (
            len(self._reports) == shards
            and self._all_applied()
            and self.evaluation is None
            and self.snapshots.has_first()
        )

    def _all_applied(self) -> bool:
        wanted = self.state.version - 1
        return all(
            shard in self._applied and self._applied[shard].step == wanted
            for shard in range(self.config.cluster.shards)
        )

    def _decide(self, now: float) -> None:
        decision = decide(self.config, self.state, list(self._reports.values()), self.fence)
        before = self.history.superseded.get(decision.step)
        if before is not None and not same_content(before, decision):
            log.error(
                "step %d was decided otherwise before the rollback: this device does not repeat its own bits",
                decision.step,
            )
        owners = [[c.rank, c.incarnation] for c in self._reports[0].contributions]
        self._actions.append(Journal({"type": "decision", **to_record(decision), "owners": owners}))
        self.history.note(decision)
        self.state = after(self.state, decision)
        self.last_decision = decision
        self._reports.clear()
        if decision.snapshot:
            self._begin_snapshot()
        for shard in range(self.config.cluster.shards):
            self._tell_decision(shard, decision)
        self._begin_step(now)

    def _tell_decision(self, shard: int, decision: Decision) -> None:
        self._actions.append(TellDecision(shard, replace(decision, fence=self.fence)))

    def _close_step(self, now: float) -> None:
        """Record a step once every shard has carried its decision out."""
        decision = self.last_decision
        if decision is None or decision.step in self.history.recorded or not self._all_applied():
            return
        self.history.recorded.add(decision.step)
        seconds = now - self._closed_at if self._closed_at is not None else None
        self._closed_at = now
        hashes = [self._applied[shard].state_hash for shard in range(self.config.cluster.shards)]
        # The line first: at a start, lines that the journal does not confirm are dropped.
        self._actions.append(Record(self._timings.line(decision, seconds)))
        self._actions.append(Journal({"type": "applied", "step": decision.step, "hashes": hashes}))
        self._timings = Timings()

    # -- Evaluation and end ---------------------------------------------------------------------

    def _is_evaluation_due(self, version: int) -> bool:
        every = self.config.evaluation.every_steps
        return version > 0 and (self._reached_end() or bool(every and version % every == 0))

    def _finish_evaluation(self) -> bool:
        if self.evaluation is None or not self.evaluation.dealing.complete:
            return False
        result = self.evaluation.result()
        self.evaluation = None
        self.history.evaluations[result["version"]] = result
        self._actions.append(Record({"kind": "evaluation", **{key: finite(value) for key, value in result.items()}}))
        self._actions.append(Journal({"type": "evaluation", **result}))
        return True

    def _reached_end(self) -> bool:
        return self.state.version >= self.config.training.end

    def _target_reached(self) -> bool:
        target = self.config.training.target_loss
        result = self.history.evaluations.get(self.state.version)
        return target is not None and result is not None and result["loss"] <= target

    def _is_over(self) -> bool:
        return self._reached_end() or self._target_reached() or self.stop_reason is not None

    def _finish(self) -> None:
        """Save the present version, then leave."""
        if not self._all_applied() or (self.evaluation is not None and self.stop_reason is None):
            return
        version = self.state.version
        if self.snapshots.exists(version):
            self._end(True, self._end_reason())
        elif self.snapshots.failure(version):
            self._end(False, f"the last checkpoint could not be written: {self.snapshots.failure(version)}")
        elif not self.snapshots.is_pending(version):
            self._save()

    def _give_up_stopping(self, now: float) -> None:
        """Asked to stop, with a shard that does not come back: what it held cannot be saved."""
        missing = self.members.missing_shards()[0]
        member = self.members.get(Role.SHARD, missing)
        gone = member is None or now - member.last_seen > self.config.membership.lease_s
        if self.stop_reason is not None and self.snapshots.exists(self.state.version):
            self._end(True, self._end_reason())
        elif self.stop_reason is not None and gone:
            newest = choose_checkpoint(self.snapshots.candidates)
            left = f"the last checkpoint is {newest.name}" if newest is not None else "there is no checkpoint"
            self._end(
                False,
                f"{self.stop_reason}, but {self._absent(Role.SHARD, missing, now)}: version {self.state.version} "
                f"could not be saved; {left}",
            )

    def _save_first(self) -> None:
        """Without any checkpoint there is nothing to go back to: one is made before the next decision."""
        version = self.state.version
        begun = self.snapshots.has_first() or self.snapshots.is_pending(version) or self.snapshots.failure(version)
        if not begun and self._all_applied():
            self._save()

    def _end_reason(self) -> str:
        version = self.state.version
        if version >= self.config.training.steps:
            return f"finished: {version} steps"
        if self._target_reached():
            return f"the held-out loss reached its target after {version} steps"
        if self._reached_end():
            return f"stopped at step {version} as asked (training.stop_at)"
        return f"stopped at step {version}: {self.stop_reason}"

    def _begin_snapshot(self) -> None:
        self.snapshots.begin(self.state)
        self._actions.append(PrepareCheckpoint(self.state.version))

    def _save(self) -> None:
        """Have the present version written, which every shard has applied."""
        self._begin_snapshot()
        for shard in range(self.config.cluster.shards):
            self._actions.append(TellSnapshot(shard, self.fence, self.state.version))

    def _end(self, ok: bool, reason: str) -> None:
        self.phase = Phase.ENDED
        self._actions.append(End(ok, reason))

    # -- For people -----------------------------------------------------------------------------

    def waiting_for(self, now: float) -> str:
        """Say what is waited for, since when, and when it was last seen; empty: nothing."""
        missing = self.members.missing_shards()
        if missing:
            named = ", ".join(self._absent(Role.SHARD, shard, now) for shard in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more shards" if len(missing) > NAMED else ""
            return f"waiting for {named}{more}"
        if self.history.table is None or not self.members.live_workers():
            return f"waiting for a worker; none is there after {now - self._started_at:.1f} s"
        if self.phase is Phase.RUNNING:
            waits = [*self._unfinished(now)]
            if self.snapshots.pending():
                waits.append(f"checkpoint of version {self.snapshots.pending()[0]}")
            return f"step {self.state.version}: waiting for {', '.join(waits)}" if waits else ""
        return f"{self.phase.value}: {len(self._answered)} of {self.config.cluster.shards} shards have answered"

    def _absent(self, role: Role, rank: int, now: float) -> str:
        member = self.members.get(role, rank)
        seen = f"last seen {now - member.last_seen:.1f} s ago" if member is not None else "never seen"
        return f"{role} {rank}, {seen}"

    def _unfinished(self, now: float) -> list[str]:
        waits = []
        for rank in self.members.live_workers():
            outstanding = self.dealing.outstanding(rank)
            if outstanding:
                waits.append(f"{self._absent(Role.WORKER, rank, now)} (contributions {outstanding})")
        return waits


_CONTROL_OF = {
    Phase.INSPECTING: Control.INSPECT,
    Phase.LOADING: Control.LOAD,
    Phase.OPENING: Control.SERVE,
}
_STEPS = {
    Phase.GATHERING: Machine._gathering,
    Phase.INSPECTING: Machine._inspecting,
    Phase.LOADING: Machine._loading,
    Phase.OPENING: Machine._opening,
    Phase.INITIALIZING: Machine._initializing,
    Phase.RUNNING: Machine._running,
}
