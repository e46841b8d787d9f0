"""The coordinator's state machine with a scripted cluster: shards and workers that do what they are told, or not.

The machine is pure, so a whole run takes milliseconds, and every action can be looked at in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ps.config import RunConfig, validate
from ps.coordinator.actions import (
    Action,
    Configure,
    Control,
    End,
    Journal,
    PrepareCheckpoint,
    Record,
    TellCluster,
    TellDeal,
    TellDecision,
    TellForegone,
    TellSnapshot,
    WriteManifest,
)
from ps.coordinator.history import History
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.recovery import Candidate, Inspection
from ps.coordinator.run import Phase
from ps.coordinator.timings import Spent
from ps.errors import CheckpointDamaged, PeerUnavailable
from ps.types import Applied, ContributionReport, Decision, ParameterTable, Prepared, Role, TensorSpec

TABLE = ParameterTable((TensorSpec("a", (100, 100)), TensorSpec("b", (200_000,))))
DATA = "d" * 64

Kind = TypeVar("Kind")


def make_config(run_dir: Path, shards: int = 2, workers: int = 2, **sections: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "run_dir": run_dir,
        "cluster": {"shards": shards, "workers": workers},
        "batch": {"micro_batches_per_step": 4, "contributions_per_step": 2},
        "training": {"steps": 6},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 3},
        "schedule": {"warmup_steps": 0},
    }
    # A worker that does nothing for a moment is not helped at once, unless a test is about that.
    membership = {"duplicate_late": False, **sections.pop("membership", {})}
    return validate(RunConfig, {**defaults, "membership": membership, **sections})


@dataclass
class FakeShard:
    """What a shard process remembers."""

    index: int
    incarnation: int
    has_state: bool = False
    version: int = 0
    awaiting: bool = False
    #: A checkpoint is loaded and not served yet.
    loaded: bool = False
    last_decision: Decision | None = None
    #: False: its host lost power, and with it a part of what its journal held of the open step.
    reduced: bool = True
    #: Contributions whose gradients it has, of the open step.
    held: set[int] = field(default_factory=set)
    #: Told decisions are kept here until `apply` when it is slow.
    slow: bool = False
    #: Its reports do not arrive.
    silent: bool = False
    waiting: list[Decision] = field(default_factory=list)
    #: What it was told under the present fence that the decision will do, and by what chunks are updated already.
    foregone: Decision | None = None
    updated_by: Decision | None = None

    def get_ahead(self) -> None:
        """A chunk is reduced, and updated if that is foregone."""
        if self.foregone is not None and self.foregone.step == self.version:
            self.updated_by = self.foregone


@dataclass
class FakeWorker:
    """What a worker process remembers."""

    rank: int
    incarnation: int
    deals: list[TellDeal] = field(default_factory=list)
    #: Does nothing of what it is dealt.
    idle: bool = False


class FakeRun:
    """A coordinator's life, and the processes around it."""

    def __init__(
        self,
        config: RunConfig,
        records: Iterable[dict[str, Any]] = (),
        candidates: list[Candidate] | None = None,
        rejected: list[str] | None = None,
        term: int = 1,
        shards: dict[int, FakeShard] | None = None,
        now: float = 0.0,
    ) -> None:
        self.config = config
        self.records = list(records)
        history = History("run", config.contributions, self.records)
        self.machine = Machine(config, history, list(candidates or []), list(rejected or []), term, now)
        self.now = now
        self.shards = dict(shards or {})
        self.workers: dict[int, FakeWorker] = {}
        #: Every action so far, in order.
        self.log: list[Action] = []
        self.checkpoints: dict[str, Candidate] = {c.name: c for c in candidates or []}
        self.damaged: set[str] = set()
        #: False: full; None: it hangs.
        self.disk: bool | None = True
        self.square_sum = 1.0
        self.evaluation_loss = 3.0
        self._lives = 100 * term

    # -- Members ----------------------------------------------------------------------------

    def _life(self) -> int:
        self._lives += 1
        return self._lives

    def join_shard(self, index: int, again: bool = False) -> FakeShard:
        """A shard process registers and connects: a new one, or the one that is still there."""
        if not again or index not in self.shards:
            self.shards[index] = FakeShard(index, self._life())
        shard = self.shards[index]
        member = MemberState(Role.SHARD, index, shard.incarnation, address=f"s:{index}", ready=True)
        self.machine.register(member, self.now)
        self.connect(Role.SHARD, index, shard.incarnation)
        return shard

    def register_worker(self, rank: int = -1) -> FakeWorker:
        life = self._life()
        rank = self.machine.register(MemberState(Role.WORKER, rank, life), self.now)
        self.workers[rank] = FakeWorker(rank, life)
        return self.workers[rank]

    def join_worker(self, rank: int = -1, table: ParameterTable = TABLE, data: str = DATA) -> FakeWorker:
        """A worker registers, connects, and says what its model is."""
        worker = self.register_worker(rank)
        self.connect(Role.WORKER, worker.rank, worker.incarnation)
        self.machine.model(self.member(Role.WORKER, worker.rank), self.now, table, data, 2)
        return worker

    def member(self, role: Role, rank: int) -> MemberState:
        found = self.machine.members.get(role, rank)
        assert found is not None
        return found

    def connect(self, role: Role, rank: int, life: int = 0) -> None:
        """Its session opens: that of who holds the seat, or of a life that has just registered."""
        member = self.machine.members.find(role, rank, life) if life else self.member(role, rank)
        assert member is not None
        self.machine.connect(member, self.now)

    def kill_worker(self, rank: int) -> None:
        """Its session breaks, and it does nothing any more."""
        self.workers[rank].idle = True
        self.machine.disconnect(self.member(Role.WORKER, rank), self.now)

    def everybody(self) -> None:
        """All shards and workers of the job come."""
        for index in range(self.config.cluster.shards):
            self.join_shard(index, again=True)
        for rank in range(self.config.cluster.workers):
            self.join_worker(rank)

    # -- Time and work ----------------------------------------------------------------------

    def step(self, seconds: float = 0.01) -> list[Action]:
        """Let time pass and the machine advance; its actions are carried out; returns them."""
        self.now += seconds
        for rank, worker in self.workers.items():
            found = self.machine.members.get(Role.WORKER, rank)
            if not worker.idle and found is not None and found.connected:
                self.machine.seen(found, self.now)
        for index in self.shards:
            found = self.machine.members.get(Role.SHARD, index)
            if found is not None and found.connected:
                self.machine.seen(found, self.now)
        self.machine.advance(self.now)
        actions = self.machine.drain()
        self.log += actions
        for action in actions:
            self._carry_out(action)
        return actions

    def run(self, until: Any = None, seconds: float = 60.0, tick: float = 0.01) -> None:
        """Go on until something holds (or the end of the run), at most so many seconds of its time."""
        deadline = self.now + seconds
        while not (until() if until is not None else self.ended):
            assert self.now < deadline, f"stuck: {self.machine.phase}, {self.machine.waiting_for(self.now)!r}"
            self.step(tick)
            if until is None or not until():
                self.work()

    def run_to(self, version: int) -> None:
        """Go on until this version has been decided; its work is dealt and not done."""
        self.run(lambda: self.machine.state.version >= version)

    def settle(self, rounds: int = 60) -> None:
        """Let everything happen that can."""
        for _ in range(rounds):
            self.step()
            self.work()

    def work(self) -> None:
        """Workers do what they were dealt; shards report what they have."""
        for worker in self.workers.values():
            if not worker.idle:
                while worker.deals:
                    self._do_deal(worker, worker.deals.pop(0))
        for shard in self.shards.values():
            if not shard.silent:
                self.report(shard)

    def _do_deal(self, worker: FakeWorker, deal: TellDeal) -> None:
        if deal.fence != self.machine.fence:
            return
        if deal.initialize:
            for shard in self.shards.values():
                if shard.awaiting:
                    shard.has_state, shard.awaiting = True, False
        for part in deal.evaluate:
            self.machine.steps.evaluated(deal.state.version, part, self.evaluation_loss * 10, 10, 20)
        for contribution in deal.contributions:
            self.contribute(worker, deal.state.version, contribution)

    def contribute(self, worker: FakeWorker, step: int, contribution: int) -> None:
        for shard in self.shards.values():
            if shard.has_state and shard.version == step:
                shard.held.add(contribution)
        self.machine.steps.contributed(
            worker.rank, self.machine.fence, Spent(step, contribution, 0.1, 0.01, 0.001, 0.0), self.now
        )

    def report(self, shard: FakeShard) -> None:
        """A shard tells everything that it can say, as it does every second."""
        fence, machine = self.machine.fence, self.machine
        if shard.has_state and shard.version == 0:
            machine.serving.initialized(shard.index, fence)
        if shard.last_decision is not None and shard.last_decision.fence == fence:
            machine.steps.applied(Applied(fence, shard.last_decision.step, shard.index, 1000 + shard.version))
        if shard.has_state and len(shard.held) == self.config.contributions and not shard.waiting:
            shard.get_ahead()
            machine.steps.prepared(self.prepared_of(shard))

    def prepared_of(self, shard: FakeShard) -> Prepared:
        reports = tuple(ContributionReport(c, 2.0 * 2, 100, 0, 1) for c in range(self.config.contributions))
        return Prepared(self.machine.fence, shard.version, shard.index, (self.square_sum,), reports)

    # -- What the machine asks for ----------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Journal):
            self.records.append(action.record)
        elif isinstance(action, Configure):
            self._configure(action)
        elif isinstance(action, TellDecision):
            shard = self.shards[action.shard]
            if action.decision.step == shard.version and shard.has_state:
                assert shard.updated_by is None or action.decision.updates_as(shard.updated_by), "rejected"
                shard.waiting = [action.decision]
            if not shard.slow:
                self.apply(shard)
        elif isinstance(action, TellForegone):
            assert action.decision.fence == self.machine.fence
            self.shards[action.shard].foregone = action.decision
        elif isinstance(action, TellDeal | TellCluster):
            if isinstance(action, TellDeal) and action.worker in self.workers:
                self.workers[action.worker].deals.append(action)
        elif isinstance(action, TellSnapshot):
            assert self.shards[action.shard].version == action.version
            assert self.shards[action.shard].updated_by is None, "its state is between two versions"
            self._write(self.shards[action.shard], action.version)
        elif isinstance(action, WriteManifest):
            version = action.state.version
            candidate = Candidate(f"step-{version:08d}", f"sha-{version}", action.state)
            self.checkpoints[candidate.name] = candidate
            self.machine.manifest_written(candidate, version, "")

    def apply(self, shard: FakeShard) -> None:
        """Carry out what a shard was told."""
        for decision in shard.waiting:
            shard.version, shard.last_decision = decision.version, decision
            shard.held, shard.updated_by = set(), None
            if decision.snapshot:
                self._write(shard, decision.version)
        shard.waiting = []

    def _write(self, shard: FakeShard, version: int) -> None:
        if self.disk is None:
            return
        error = "" if self.disk else "No space left on device"
        self.machine.snapshot_written(
            self.machine.fence, shard.index, version, (f"shard-{shard.index}", "0" * 64, 10), error
        )

    def _configure(self, action: Configure) -> None:
        shard, fence = self.shards.get(action.shard), action.fence
        member = self.machine.members.get(Role.SHARD, action.shard)
        if shard is not None:
            shard.foregone = shard.foregone if action.control is Control.SERVE else None
        if shard is None or member is None or not member.connected:
            error = PeerUnavailable("nobody answers")
            self.machine.serving.configure_failed(action.shard, fence, action.control, error, False)
            return
        if action.control is Control.LOAD:
            if action.checkpoint in self.damaged:
                broken = CheckpointDamaged(f"{action.checkpoint} has been damaged")
                self.machine.serving.configure_failed(action.shard, fence, action.control, broken, False)
                return
            shard.last_decision, shard.held, shard.waiting, shard.updated_by = None, set(), [], None
            shard.version, shard.has_state, shard.awaiting = 0, False, not action.checkpoint
            shard.loaded = bool(action.checkpoint)
            if action.checkpoint:
                candidate = self.checkpoints[action.checkpoint]
                assert candidate.manifest_sha256 == action.manifest_sha256
                shard.version = candidate.state.version
        elif action.control is Control.SERVE and shard.loaded:
            shard.has_state, shard.loaded = True, False
        last = (shard.waiting or [shard.last_decision])[-1]
        inspection = Inspection(
            shard.has_state, shard.version, last, None if shard.waiting else shard.updated_by, shard.reduced
        )
        self.machine.serving.configured(action.shard, fence, action.control, inspection)

    # -- What can be asked ------------------------------------------------------------------

    def of(self, kind: type[Kind]) -> list[Kind]:
        """The actions of a kind so far."""
        return [action for action in self.log if isinstance(action, kind)]

    def journal(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["type"] == kind]

    @property
    def ended(self) -> bool:
        return self.machine.phase is Phase.ENDED

    @property
    def end(self) -> End:
        (end,) = self.of(End)
        return end

    def decisions(self) -> list[Decision]:
        """What was decided in this life of the coordinator, in order, each once, whatever its fence."""
        journaled = {record["step"] for record in self.journal("decision")}
        found = {tell.decision.step: tell.decision for tell in self.of(TellDecision)}
        return [replace(found[step]) for step in sorted(found) if step in journaled]

    def lines(self) -> list[dict[str, Any]]:
        return [action.line for action in self.of(Record)]

    def prepared_checkpoints(self) -> list[int]:
        return [action.version for action in self.of(PrepareCheckpoint)]

    # -- The coordinator dies ---------------------------------------------------------------

    def restart(self, config: RunConfig | None = None) -> FakeRun:
        """A new coordinator reads what the old one left behind; the shards live on."""
        return FakeRun(
            config or self.config,
            self.records,
            list(self.checkpoints.values()),
            [],
            self.machine.fence.term + 1,
            self.shards,
            self.now + 1.0,
        )
