"""Making the cluster serve: one sequence, whether it starts, resumes or lost a shard.

Gather all shards, inspect what they hold, load a checkpoint if they do not hold enough, open. One
recovery has one epoch: an interrupted recovery's calls are fenced off by the next one's.
"""

from __future__ import annotations

import logging

from ps.coordinator.actions import Configure, Control, Journal, Rewind, TellCluster, TellDeal, TellSnapshot
from ps.coordinator.decision import TrainingState, after
from ps.coordinator.recovery import Candidate, Inspection, can_complete, choose_checkpoint, surviving_version
from ps.coordinator.run import Phase, Run
from ps.coordinator.standbys import Standbys
from ps.coordinator.steps import Steps
from ps.coordinator.waiting import describe_wait, find_waits
from ps.errors import CheckpointWriteFailed, DecisionRejected, PsError, StorageError
from ps.types import Decision, Fence, Role
from ps.wire.proto import to_record

log = logging.getLogger(__name__)

#: Between two attempts to make the cluster serve.
RETRY_S = 0.2

_CONTROL_OF = {
    Phase.INSPECTING: Control.INSPECT,
    Phase.LOADING: Control.LOAD,
    Phase.OPENING: Control.SERVE,
}


class Serving:
    """The way from shards that are there to a cluster that serves."""

    def __init__(self, run: Run, steps: Steps, standbys: Standbys, now: float) -> None:
        self._run = run
        self._steps = steps
        self._standbys = standbys
        self._started_at = now
        self._served = False
        self._retry_at = now
        self._inspections: dict[int, Inspection] = {}
        self._answered: set[int] = set()
        self._initialized: set[int] = set()
        #: The worker that sends the initial values.
        self.initializer: int | None = None
        self._checkpoint: Candidate | None = None
        #: A stop waits until the cluster serves: there is something to save.
        self.goes_on = False
        #: What the shards hold has turned out not to belong together.
        self._mixed = False

    # -- Facts ----------------------------------------------------------------------------------

    def configured(self, shard: int, fence: Fence, control: Control, inspection: Inspection) -> None:
        """A shard carried out Configure."""
        if fence == self._run.fence and control is _CONTROL_OF.get(self._run.phase):
            self._answered.add(shard)
            self._inspections[shard] = inspection

    def configure_failed(self, shard: int, fence: Fence, control: Control, error: PsError, fatal: bool) -> None:
        """A shard could not carry out Configure: a damaged checkpoint, or it is gone."""
        if fence != self._run.fence or control is not _CONTROL_OF.get(self._run.phase):
            return
        # A shard that died while it loaded says nothing about the checkpoint, nor does a disk that is full.
        unwritable = isinstance(error, CheckpointWriteFailed)
        damaged = control is Control.LOAD and isinstance(error, StorageError) and not unwritable
        if damaged and self._checkpoint is not None and not fatal:
            log.error(
                "checkpoint %s cannot be loaded by shard %d: %s; going back to the one before",
                self._checkpoint.name,
                shard,
                error.message,
            )
            self._run.snapshots.reject(self._checkpoint)
            self.gather(f"checkpoint {self._checkpoint.name} is damaged")
        elif fatal and not (unwritable and self._served):
            self._run.end(False, f"shard {shard}: {error.message}")
        elif control is Control.SERVE and isinstance(error, DecisionRejected):
            log.warning("%s: going back to a checkpoint", error.message)
            self._mixed = True
            self.gather(f"shard {shard} cannot go on where the others are")
        else:
            self.gather(f"shard {shard} did not answer: {error.message}")

    def initialized(self, shard: int, fence: Fence) -> None:
        if fence == self._run.fence:
            self._initialized.add(shard)

    def lose(self, rank: int) -> None:
        """A worker is gone: somebody else sends the initial values."""
        if self.initializer == rank:
            self.initializer = None

    # -- What is missing ------------------------------------------------------------------------

    def unanswered(self) -> list[int]:
        """The shards that have not carried out the present phase's Configure."""
        return [shard for shard in self._run.shards if shard not in self._answered]

    def empty(self) -> list[int]:
        """The shards whose initial values have not all come."""
        return [shard for shard in self._run.shards if shard not in self._initialized]

    @property
    def loading(self) -> str:
        """The checkpoint that is being loaded, or was; empty: none."""
        return self._checkpoint.name if self._checkpoint is not None else ""

    # -- Progress -------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Do whatever the facts allow in the present phase."""
        step = _STEPS.get(self._run.phase)
        if step is not None:
            step(self, now)

    def gather(self, why: str, *, goes_on: bool = False) -> None:
        """Make the cluster serve anew.

        Args:
            goes_on: whether that matters also when the run is to stop.
        """
        if self._run.phase is Phase.ENDED:
            return
        self.goes_on |= goes_on
        if self._run.phase is not Phase.GATHERING:
            log.info("the cluster is made to serve again: %s", why)
        self._run.phase = Phase.GATHERING
        self._answered.clear()
        self._inspections.clear()

    def _gathering(self, now: float) -> None:
        if self._run.stop_reason is not None and not self.goes_on:
            self._run.end(True, self._run.stop_reason)
            return
        if self._run.history.table is None or self._run.members.missing_shards():
            waited = now - self._started_at
            if waited > self._run.config.membership.start_timeout_s and not self._served:
                wait = describe_wait(self._run, find_waits(self._run, self._steps, self, now))
                self._run.end(False, f"{wait}; membership.start_timeout_s is over")
            return
        if now < self._retry_at:
            return
        self._retry_at = now + RETRY_S
        # One recovery, one epoch: an interrupted recovery's calls are fenced off by the next one's.
        self._run.fence = Fence(self._run.fence.term, self._run.history.next_epoch())
        shards = [member.incarnation for member in self._run.members.of(Role.SHARD)]
        self._run.ask(
            Journal(
                {"type": "epoch", "epoch": self._run.fence.epoch, "term": self._run.fence.term, "shards": shards},
                sync=True,
            )
        )
        self._enter(Phase.INSPECTING, Control.INSPECT)

    def _enter(self, phase: Phase, control: Control) -> None:
        self._run.phase = phase
        self._answered.clear()
        checkpoint = self._checkpoint if control is Control.LOAD else None
        for shard in self._run.shards:
            self._run.ask(
                Configure(
                    shard,
                    control,
                    self._run.fence,
                    checkpoint.name if checkpoint else "",
                    checkpoint.manifest_sha256 if checkpoint else "",
                    self._run.state if control is Control.SERVE else None,
                )
            )

    def _all_answered(self) -> bool:
        return len(self._answered) == self._run.config.cluster.shards

    def _inspecting(self, _now: float) -> None:
        if not self._all_answered():
            return
        inspections = [self._inspections[shard] for shard in self._run.shards]
        if not self._adopt([i.last_decision for i in inspections if i.last_decision is not None]):
            return
        version = surviving_version(inspections, self._run.history.last_decision)
        mixed, self._mixed = self._mixed, False
        if version is not None and not mixed and self._go_on(version, inspections):
            return
        self._checkpoint = choose_checkpoint(self._run.snapshots.candidates)
        if self._checkpoint is None and (self._run.history.decisions or self._run.snapshots.rejected):
            damaged = ", ".join(self._run.snapshots.rejected) or "none was found"
            self._run.end(
                False,
                f"no checkpoint in {self._run.config.checkpoint_dir} can be loaded ({damaged}); restore one, or start "
                "again with a new run_dir",
            )
            return
        self._enter(Phase.LOADING, Control.LOAD)

    def _go_on(self, version: int, inspections: list[Inspection]) -> bool:
        """Open with what the shards hold; False: the open step cannot end as some of them have begun it."""
        last = self._run.history.decisions.get(version - 1)
        state = after(self._run.state, last) if last is not None else self._run.state
        if not can_complete(inspections, last, self._steps.foregone(state)):
            log.warning("step %d was begun in a way in which it cannot be decided: going back to a checkpoint", version)
            return False
        log.info("every shard still holds its state: going on at version %d", version)
        self._run.last_decision, self._run.state = last, state
        self._open()
        return True

    def _adopt(self, heard: list[Decision]) -> bool:
        """Take over what shards were told and the journal has lost; False: the run has ended, they conflict."""
        for decision in sorted(heard, key=lambda decision: decision.step):
            known = decision.step in self._run.history.decisions
            if not self._run.history.adopt(decision):
                self._run.end(
                    False,
                    f"two decisions of step {decision.step} differ between a shard and the journal; "
                    "the run folder belongs to another run, or its disk has lost data",
                )
                return False
            if not known and decision.step in self._run.history.decisions:
                log.warning("the journal has lost the decision of step %d; it is taken from a shard", decision.step)
                self._run.ask(Journal({"type": "decision", **to_record(decision)}, sync=True))
        return True

    def _loading(self, _now: float) -> None:
        if not self._all_answered():
            return
        self._run.state = self._checkpoint.state if self._checkpoint else TrainingState.start(self._run.config)
        self._run.history.rollback(self._run.state.version, self._run.fence.epoch)
        # Loading its version carries it out: nobody may have heard before that every shard had.
        self._run.last_decision = self._run.history.decisions.get(self._run.state.version - 1)
        self._run.snapshots.forget_pending()
        self._run.ask(
            Journal(
                {"type": "rollback", "epoch": self._run.fence.epoch, "version": self._run.state.version},
                sync=True,
            )
        )
        self._run.ask(Rewind(self._run.state.version))
        self._open()

    def _open(self) -> None:
        self._steps.reset()
        self._standbys.reset()
        self._initialized.clear()
        self.initializer = None
        self._enter(Phase.OPENING, Control.SERVE)

    def _opening(self, now: float) -> None:
        if not self._all_answered():
            return
        self._served, self.goes_on = True, False
        empty = not all(inspection.has_state for inspection in self._inspections.values())
        self._run.phase = Phase.INITIALIZING if empty else Phase.RUNNING
        for rank in self._run.members.live_workers():
            self._run.ask(TellCluster(rank, self._run.fence, self._run.state))
        if self._run.phase is Phase.RUNNING:
            for shard in self._run.shards:
                if self._inspections[shard].version < self._run.state.version and self._run.last_decision is not None:
                    self._run.tell_decision(shard, self._run.last_decision)
                else:
                    self._steps.note_applied(shard, self._inspections[shard].state_hash)
                    self._save_again(shard)
            version = self._run.state.version
            ahead = [i for i in self._inspections.values() if i.ahead is not None and i.version == version]
            self._steps.resume(bool(ahead), now)

    def _save_again(self, shard: int) -> None:
        """Have a checkpoint of the present version written that a shard may have died over; who wrote it says so."""
        if self._run.snapshots.is_pending(self._run.state.version):
            self._run.ask(TellSnapshot(shard, self._run.fence, self._run.state.version))

    def _initializing(self, now: float) -> None:
        if self._run.stop_reason is not None:
            self._run.end(True, self._run.stop_reason)
            return
        if len(self._initialized) == self._run.config.cluster.shards:
            log.info("every shard holds its initial values")
            self._run.phase = Phase.RUNNING
            for shard in self._run.shards:
                self._steps.note_applied(shard)
            self._steps.resume(False, now)
            return
        workers = self._run.members.live_workers()
        if self.initializer is None and workers:
            self.initializer = workers[0]
            self._run.ask(TellDeal(workers[0], self._run.fence, self._run.state, initialize=True))


_STEPS = {
    Phase.GATHERING: Serving._gathering,
    Phase.INSPECTING: Serving._inspecting,
    Phase.LOADING: Serving._loading,
    Phase.OPENING: Serving._opening,
    Phase.INITIALIZING: Serving._initializing,
}
