"""What has to hold in every run, looked at whenever something happens that could break it.

1. What is decided of a step is what the sequential model decides, whoever decides it and however often.
2. Decisions follow each other; only a journaled rollback leads back.
3. Every shard's state after a decision is the sequential model's, to the bit: so shards agree, nothing counts twice and
   nothing is lost.
4. A shard's version goes back only with a checkpoint that it loads, and it serves that one only after the rollback is
   in the journal. Its fence never goes back.
5. A report counts every contribution once.
6. What was said under another fence than a shard's changes nothing there; nor a coordinator what was said under another
   one than its own.
7. Terms and epochs are never used twice, and nobody decides once there is a newer term.
8. A shard that counts as having carried out the last decision has done so.
9. No step is decided that a standby which may take over does not hold; one that takes over holds what its shard held.
   No pair is ever found to differ.
10. With durability=journal, and disks that work, no rollback takes back what was decided; but for an eager step that
   overflowed, and for a standby that took over, which has no journal before the next checkpoint.
11. A checkpoint is completed when all its files are there, and holds what the sequential model does, to the bit.
12. Of everything that is dealt to a worker it is told.
13. A coordinator that begins with a journal's summary knows what the whole journal says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ps.config import RunConfig
from ps.coordinator.actions import TellDeal
from ps.coordinator.decision import TrainingState
from ps.coordinator.history import History
from ps.coordinator.machine import Machine
from ps.coordinator.serving import Serving
from ps.coordinator.snapshots import Snapshots
from ps.coordinator.standbys import Standbys
from ps.coordinator.steps import Steps
from ps.errors import PsError
from ps.shard.engine import Held, ShardEngine
from ps.shard.protocol import StepProtocol
from ps.shard.seat import Seat
from ps.shard.service import ShardHost
from ps.storage.journal import Journal
from ps.storage.journal_files import read
from ps.storage.layout import checkpoint_folder
from ps.storage.manifest import read_manifest
from ps.storage.reader import CheckpointReader
from ps.types import Applied, Decision, Fence, Prepared
from ps.wire.proto import from_record
from tests.simulation import scheduler
from tests.simulation.scheduler import Process
from tests.simulation.sequential import Truth, content


class Watch:
    """Looks on, and keeps what it finds wrong."""

    def __init__(self, config: RunConfig, truth: Truth, note: Callable[[str], None]) -> None:
        self._config = config
        self._truth = truth
        self._note = note
        self.wrong: list[str] = []
        #: The version to which each epoch has led back.
        self.rollbacks: dict[int, int] = {}
        self.rolled_back = 0
        self.takeovers = 0
        #: A disk was full, torn, or held by a process that another one has replaced.
        self.disk_failed = False
        self.overflowed = False
        #: Checkpoints that the journal calls complete, and nobody has damaged.
        self.complete: set[Path] = set()
        #: Steps that metrics.jsonl may lack, and those that the journal confirmed at the coordinator's last start.
        self.unrecorded: set[int] = set()
        self._recorded: set[int] = set()
        #: By shard: the life of the standby that may take over, as it is on disk.
        self._in_sync: dict[int, int] = {}
        self._terms: list[int] = []
        self._epochs: list[int] = []
        self._next_step = 0
        #: The version that decisions have led to, those that power took from the journal included.
        self._reached = 0
        self._engines: list[ShardEngine] = []
        self._owners: dict[int, Process] = {}
        self._incarnations: dict[Process, int] = {}
        self._versions: dict[int, int] = {}
        self._fences: dict[int, Fence] = {}

    def fail(self, text: str) -> None:
        """Something does not hold."""
        self.wrong.append(text)
        self._note(f"WRONG: {text}")

    def expect(self, holds: bool, text: Callable[[], str]) -> None:
        if not holds:
            self.fail(text())

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Look on from now."""
        with contextlib.ExitStack() as stack:
            for owner, name, looking in (
                (Journal, "append", self._on_append),
                (Journal, "begin_term", self._on_term),
                (Machine, "__init__", self._on_machine),
                (ShardHost, "__init__", self._on_host),
                (ShardEngine, "__init__", self._on_engine),
                (ShardEngine, "_close_step", self._on_close_step),
                (ShardEngine, "initialize", self._on_initialize),
                (Seat, "serve", self._on_serve),
                (StepProtocol, "restored", self._on_restored),
                (StepProtocol, "await_initial_values", self._on_restored),
                (StepProtocol, "push", self._on_push),
                (StepProtocol, "decide", self._on_decide),
                (StepProtocol, "foresee", self._on_decide),
                (StepProtocol, "prepared", self._on_prepared),
                (Steps, "prepared", self._on_report),
                (Steps, "applied", self._on_report),
                (Steps, "_deal", self._on_deal),
                (Snapshots, "begin", self._on_begin),
                (Snapshots, "written", self._on_written),
                (Steps, "note_applied", self._on_note_applied),
                (Serving, "configured", self._on_configured),
                (Standbys, "_promote", self._on_promote),
                (Standbys, "_dismiss", self._on_dismiss),
            ):
                stack.enter_context(_around(owner, name, looking))
            yield

    def damaged(self, checkpoint: Path) -> None:
        """A disk has changed a checkpoint that was complete."""
        self.complete.discard(checkpoint)
        self.disk_failed = True

    def look(self) -> None:
        """Look at every shard; called after each message."""
        for engine in self._engines:
            self._look_at(engine)

    def forget(self, process: Process) -> None:
        """A process is gone, and its shard with it."""
        self._engines = [engine for engine in self._engines if self._owners[id(engine)] is not process]

    # -- The coordinator ------------------------------------------------------------------------

    def _on_append(
        self, call: Callable[..., Any], journal: Journal, record: dict[str, Any], sync: bool = False
    ) -> None:
        kind = record["type"]
        newest = max(self._terms, default=0)
        if kind in ("decision", "epoch", "rollback"):
            self.expect(journal.term == newest, lambda: f"term {journal.term} writes a {kind} when there is {newest}")
        if kind == "decision":
            self._see_decision(from_record(Decision, record), adopted="counted" not in record)
        elif kind == "epoch":
            last = max(self._epochs, default=0)
            self.expect(record["epoch"] > last, lambda: f"epoch {record['epoch']} comes after epoch {last}")
        elif kind == "rollback":
            lasting = self._config.durability == "journal" and not self._config.cluster.standbys
            kept = self.disk_failed or self.overflowed or record["version"] >= self._next_step
            self.expect(not lasting or kept, lambda: f"version {record['version']} follows step {self._next_step - 1}")
            if record["version"] > self._next_step:
                # Power took decisions, and a checkpoint tells of them: of their steps nothing is recorded any more.
                self.unrecorded |= set(range(record["version"])) - self._recorded
            self._next_step = self._reached = record["version"]
            self._in_sync.clear()
            self.rollbacks[record["epoch"]] = record["version"]
            self.rolled_back += 1
        elif kind == "overflow":
            self.overflowed = True
        elif kind == "standby":
            self._in_sync[record["shard"]] = record["life"]
        elif kind == "checkpoint":
            folder = checkpoint_folder(self._config.checkpoint_dir, record["version"])
            self._see_checkpoint(folder, record["version"])
            self.complete.add(folder)
        self._note(f"journal: {_short(record)}")
        call(journal, record, sync)
        if kind == "epoch":
            # Only now: one that is not on disk when power fails is used by nobody.
            self._epochs.append(record["epoch"])

    def _see_decision(self, decision: Decision, adopted: bool) -> None:
        step = decision.step
        in_order = step >= self._next_step if adopted else step == self._next_step
        self.expect(in_order, lambda: f"step {step} is decided when step {self._next_step} is next")
        expected = self._truth.contents[step]
        self.expect(content(decision) == expected, lambda: f"step {step}: {content(decision)} instead of {expected}")
        self._next_step = step + 1
        self._reached = max(self._reached, self._next_step)
        if not adopted:
            self._see_covered(step)
        if adopted:
            # Power took more than this decision: that the steps before it were carried out is nowhere any more.
            self.unrecorded |= set(range(step)) - self._recorded

    def _see_covered(self, step: int) -> None:
        """What is decided of a step is held by every standby that may take over, and is alive."""
        for shard, life in self._in_sync.items():
            for engine in self._lives(shard, life):
                follower, protocol = engine.follower, engine.protocol
                # One that took over meanwhile, and has not been asked yet, is a follower still.
                holds = follower is None or (protocol.step == step and follower.is_whole and protocol.all_reduced)
                self.expect(holds, lambda shard=shard: f"step {step} is decided; the standby of shard {shard} lacks it")

    def _lives(self, shard: int, life: int) -> list[ShardEngine]:
        return [e for e in self._engines if e.shard == shard and self._incarnations[self._owners[id(e)]] == life]

    def _on_promote(self, call: Callable[..., None], standbys: Standbys, shard: int) -> None:
        # The coordinator itself may not know it yet.
        life, version = standbys.in_sync(shard), self._next_step
        self.takeovers += 1
        for engine in self._lives(shard, life):
            at = engine.protocol.step
            holds = engine.has_state and version - 1 <= at <= max(version, self._reached)
            self.expect(holds, lambda at=at: f"standby {shard} takes over at version {version}, and is at {at}")
        call(standbys, shard)

    def _on_dismiss(self, call: Callable[..., None], standbys: Standbys, shard: int, reason: str) -> None:
        self.fail(f"standby {shard} is dismissed: {reason}")
        call(standbys, shard, reason)

    def _on_begin(self, call: Callable[..., None], snapshots: Snapshots, state: TrainingState, fence: Fence) -> None:
        self.complete.discard(checkpoint_folder(self._config.checkpoint_dir, state.version))
        call(snapshots, state, fence)

    def _on_written(self, call: Callable[..., Any], snapshots: Snapshots, *arguments: Any) -> Any:
        complete = call(snapshots, *arguments)
        if complete is not None:
            folder = checkpoint_folder(self._config.checkpoint_dir, complete.state.version)
            gone = [name for name, *_ in complete.files if not (folder / name).is_file()]
            self.expect(not gone, lambda: f"{folder.name} is completed without {', '.join(gone)}")
        return complete

    def _see_checkpoint(self, folder: Path, version: int) -> None:
        plan = self._truth.plan
        try:
            manifest, _ = read_manifest(folder)
            with CheckpointReader(folder, manifest) as reader:
                reader.verify()
                for name, expected in self._truth.arrays[version].items():
                    found = np.empty(plan.size, np.float32)
                    for chunk in plan.chunks:
                        reader.read(name, chunk.start, found[chunk.start : chunk.stop])
                    same = np.array_equal(found, expected)
                    self.expect(same, lambda name=name: f"{folder.name} has other {name} than the sequential model")
        except PsError as error:
            self.fail(f"a checkpoint counts as complete: {error.message}")

    def _on_term(self, call: Callable[..., int], journal: Journal) -> int:
        term = call(journal)
        newest = max(self._terms, default=0)
        self.expect(term > newest, lambda: f"term {term} begins after term {newest}")
        self._terms.append(term)
        self._note(f"term {term} begins")
        return term

    def _on_machine(
        self, call: Callable[..., None], machine: Machine, config: RunConfig, history: History, *arguments: Any
    ) -> None:
        whole, known = _facts(History("", 0, read(config.run_dir / "journal"))), _facts(history)
        other = [name for name in whole if known[name] != whole[name]]
        self.expect(not other, lambda: f"with a summary there is another {', '.join(other)}")
        call(machine, config, history, *arguments)
        # What power took is decided again.
        last = history.last_decision
        self._next_step = last.version if last is not None else 0
        self._recorded = set(history.recorded)
        self._in_sync = dict(history.standbys)

    def _on_report(self, call: Callable[..., None], steps: Steps, report: Prepared | Applied) -> None:
        held = steps._reports if isinstance(report, Prepared) else steps._applied
        before = held.get(report.shard)
        call(steps, report)
        taken = held.get(report.shard) is report and before is not report
        fence = steps._run.fence
        kind = type(report).__name__
        self.expect(not taken or report.fence == fence, lambda: f"{kind} under {report.fence} counts under {fence}")

    def _on_deal(self, call: Callable[..., None], steps: Steps, *arguments: Any, **named: Any) -> None:
        workers, actions = steps._run.members.live_workers(), steps._run._actions
        before = {rank: steps.outstanding(rank) for rank in workers}
        asked = len(actions)
        call(steps, *arguments, **named)
        tells = [action for action in actions[asked:] if isinstance(action, TellDeal)]
        for rank in workers:
            mine = [tell for tell in tells if tell.worker == rank]
            told = ({c for tell in mine for c in tell.contributions}, {p for tell in mine for p in tell.evaluate})
            for has, had, heard in zip(steps.outstanding(rank), before[rank], told, strict=True):
                untold = set(has) - set(had) - heard
                self.expect(not untold, lambda rank=rank, units=untold: f"worker {rank} is not told of {units}")

    def _on_note_applied(self, call: Callable[..., None], steps: Steps, shard: int, *state_hash: int) -> None:
        call(steps, shard, *state_hash)
        version = steps._run.state.version
        there = [e.protocol.step for e in self._engines if e.shard == shard and e.follower is None]
        self.expect(
            max(there, default=version) >= version,
            lambda: f"shard {shard} counts as being at version {version} where its lives are at {there}",
        )

    def _on_configured(
        self, call: Callable[..., None], serving: Serving, shard: int, fence: Fence, *arguments: Any
    ) -> None:
        before = set(serving._answered)
        call(serving, shard, fence, *arguments)
        taken, present = serving._answered != before, serving._run.fence
        self.expect(not taken or fence == present, lambda: f"an answer under {fence} counts under {present}")

    # -- Shards ---------------------------------------------------------------------------------

    def _on_host(self, call: Callable[..., None], host: ShardHost, index: int, life: int, *arguments: Any) -> None:
        call(host, index, life, *arguments)
        task = scheduler.active.current
        assert task is not None
        self._incarnations[task.process] = life

    def _on_engine(self, call: Callable[..., None], engine: ShardEngine, *arguments: Any) -> None:
        call(engine, *arguments)
        task = scheduler.active.current
        assert task is not None
        self._engines.append(engine)
        self._owners[id(engine)] = task.process
        self._versions[id(engine)] = -1
        self._fences[id(engine)] = Fence(0, 0)

    def _look_at(self, engine: ShardEngine) -> None:
        protocol, key = engine.protocol, id(engine)
        version, fence = self._versions[key], self._fences[key]
        if protocol.step < version:
            self.fail(f"shard {engine.shard} goes from version {version} to {protocol.step}")
        if protocol.fence is not fence and protocol.fence < fence:
            self.fail(f"shard {engine.shard} goes from {fence} to {protocol.fence}")
        self._versions[key], self._fences[key] = protocol.step, protocol.fence

    def _on_restored(self, call: Callable[..., None], protocol: StepProtocol, *arguments: Any) -> None:
        call(protocol, *arguments)
        for engine in self._engines:
            if engine.protocol is protocol:
                self._versions[id(engine)] = protocol.step

    def _on_serve(self, call: Callable[..., None], seat: Seat, fence: Fence, *arguments: Any) -> None:
        engine = seat.engine
        loaded = engine.held is Held.LOADED
        call(seat, fence, *arguments)
        if loaded and engine.has_state:
            version = engine.protocol.step
            self.expect(
                self.rollbacks.get(fence.epoch) == version,
                lambda: f"shard {engine.shard} serves version {version} of a checkpoint that no rollback has named",
            )
            self._compare(engine, version)

    def _on_initialize(self, call: Callable[..., bool], engine: ShardEngine, *arguments: Any) -> bool:
        had = engine.has_state
        result = call(engine, *arguments)
        if engine.has_state and not had:
            self._compare(engine, 0)
        return result

    def _on_close_step(self, call: Callable[..., None], engine: ShardEngine, decision: Decision) -> None:
        call(engine, decision)
        self._note(f"shard {engine.shard} is at version {decision.version}")
        version = engine.protocol.step
        self.expect(
            version == decision.version,
            lambda: f"shard {engine.shard} is at {version} after the decision of step {decision.step}",
        )
        self._compare(engine, version)

    def _compare(self, engine: ShardEngine, version: int) -> None:
        expected = self._truth.hashes[version][engine.shard]
        self.expect(
            engine.store.state_hash == expected,
            lambda: f"shard {engine.shard} holds another state at version {version} than the sequential model",
        )

    def _on_push(self, call: Callable[..., Any], protocol: StepProtocol, header: Any, *arguments: Any) -> Any:
        accepted = call(protocol, header, *arguments)
        self.expect(
            header.fence == protocol.fence,
            lambda: f"shard {protocol.shard} at {protocol.fence} takes a push under {header.fence}",
        )
        self.expect(
            not accepted.conflicting,
            lambda: f"step {header.step}: contribution {header.contribution} came again with other bits",
        )
        return accepted

    def _on_decide(self, call: Callable[..., Any], protocol: StepProtocol, decision: Decision) -> Any:
        result = call(protocol, decision)
        self.expect(
            decision.fence == protocol.fence,
            lambda: f"shard {protocol.shard} at {protocol.fence} takes a decision under {decision.fence}",
        )
        return result

    def _on_prepared(self, call: Callable[..., Prepared], protocol: StepProtocol, *arguments: Any) -> Prepared:
        report = call(protocol, *arguments)
        counted = [found.contribution for found in report.contributions]
        self.expect(
            counted == list(range(self._config.contributions)),
            lambda: f"shard {protocol.shard} reports contributions {counted} of step {report.step}",
        )
        return report


@contextlib.contextmanager
def _around(owner: type, name: str, looking: Callable[..., Any]) -> Iterator[None]:
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        return looking(real, self, *arguments, **named)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _facts(history: History) -> dict[str, Any]:
    table = history.table
    return {**vars(history), "table": table.packed() if table is not None else None, "recorded": list(history.recorded)}


def _short(record: dict[str, Any]) -> str:
    shown = {key: value for key, value in record.items() if key in ("type", "step", "epoch", "version", "skip", "rank")}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
