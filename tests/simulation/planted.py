"""Bugs that a protocol like this one could have: each is planted in the running code, and has to be found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ps.client.pulled import PulledModel, Pulling
from ps.coordinator import decision as decisions
from ps.coordinator import serving
from ps.coordinator.actions import Action, TellDeal
from ps.coordinator.history import History
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase, Run
from ps.coordinator.serving import Serving
from ps.coordinator.standbys import Standbys
from ps.coordinator.steps import Steps
from ps.shard.follower import Follower
from ps.shard.journal import StepJournal
from ps.shard.mirroring import Mirroring
from ps.shard.protocol import StepProtocol
from ps.shard.reduction import ChunkReduction
from ps.shard.snapshot import Snapshot
from ps.storage import journal as journals
from ps.storage.journal import Journal
from ps.types import Decision, Fence, Prepared

Plant = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _instead(owner: Any, name: str, other: Callable[..., Any]) -> Iterator[None]:
    """Put another function in the place of one, which it gets first."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: other(real, *arguments, **named))
    try:
        yield
    finally:
        setattr(owner, name, real)


def count_a_duplicate() -> contextlib.AbstractContextManager[None]:
    """A contribution that comes again is added again, in the place of one that is still missing."""

    def again(real: Any, self: StepProtocol, header: Any, first: bytes) -> Any:
        reduction = self._reductions[header.chunk]
        missing = [c for c in range(self.shape.contributions) if c not in reduction.hashes]
        accepted = real(self, header, first)
        if not missing or not reduction._waiting:
            return accepted
        twice = replace(reduction._waiting[-1], contribution=missing[0])
        job = ChunkReduction.add(reduction, twice, first, b"")
        return replace(accepted, job=job)

    return _instead(StepProtocol, "_again", again)


def skip_the_fence_of_frames() -> contextlib.AbstractContextManager[None]:
    """A shard takes what a worker sends under an older fence."""

    def check(real: Any, self: StepProtocol, header: Any) -> None:
        real(self, replace(header, term=self.fence.term, epoch=self.fence.epoch))

    return _instead(StepProtocol, "check", check)


def skip_the_fence_of_decisions() -> contextlib.AbstractContextManager[None]:
    """A shard carries out what an earlier coordinator decided."""

    def decide(real: Any, self: StepProtocol, decision: Decision) -> Any:
        # Whatever is told is taken to be of the present fence.
        present, self.fence = self.fence, decision.fence
        try:
            return real(self, decision)
        finally:
            self.fence = present

    return _instead(StepProtocol, "decide", decide)


def skip_the_fence_of_reports() -> contextlib.AbstractContextManager[None]:
    """The coordinator counts reports that were made under an older fence."""

    def prepared(_real: Any, self: Steps, report: Prepared) -> None:
        if report.step == self._run.state.version:
            self._reports[report.shard] = report

    return _instead(Steps, "prepared", prepared)


def skip_the_fence_of_answers() -> contextlib.AbstractContextManager[None]:
    """An answer to an interrupted recovery counts for the present one."""

    def configured(real: Any, self: Serving, shard: int, _fence: Fence, *arguments: Any) -> None:
        real(self, shard, self._run.fence, *arguments)

    return _instead(Serving, "configured", configured)


def decide_from_some_reports() -> contextlib.AbstractContextManager[None]:
    """A step is decided when one shard has reported it."""

    def may_decide(real: Any, self: Steps) -> bool:
        lacks = set(self._run.shards) - set(self._reports)
        if len(self._reports) == 1 and len(lacks) == 1:
            there = next(iter(self._reports.values()))
            shard = lacks.pop()
            self._reports[shard] = replace(there, shard=shard, square_sums=())
            if real(self):
                return True
            del self._reports[shard]
        return bool(real(self))

    return _instead(Steps, "_may_decide", may_decide)


def decide_before_all_have_applied() -> contextlib.AbstractContextManager[None]:
    """Decision t+1 does not wait until every shard has carried out decision t."""
    return _instead(Steps, "not_applied", lambda real, self: real(self)[1:])


def use_a_term_again() -> contextlib.AbstractContextManager[None]:
    """A coordinator that starts anew does not take a new term."""

    def begin_term(real: Any, self: Journal) -> int:
        self._terms = 0
        return int(real(self))

    return _instead(Journal, "begin_term", begin_term)


def use_an_epoch_again() -> contextlib.AbstractContextManager[None]:
    """A coordinator that starts anew counts epochs from the beginning."""

    def replay(real: Any, self: History, record: dict[str, Any]) -> None:
        if record["type"] != "epoch":
            real(self, record)

    return _instead(History, "_replay", replay)


def two_coordinators() -> contextlib.AbstractContextManager[None]:
    """Nothing keeps a second coordinator from writing the journal of one that was stopped."""
    return _instead(journals.fcntl, "flock", lambda _real, *_: None)


@contextlib.contextmanager
def tell_the_fence_before_the_decision() -> Iterator[None]:
    """Shards that are one decision behind hear of the fence, and not of the decision."""
    real = serving._STEPS[Phase.OPENING]

    def opening(self: Serving, now: float) -> None:
        last, self._run.last_decision = self._run.last_decision, None
        real(self, now)
        self._run.last_decision = last

    serving._STEPS[Phase.OPENING] = opening
    try:
        yield
    finally:
        serving._STEPS[Phase.OPENING] = real


def forget_the_decision_when_a_session_resumes() -> contextlib.AbstractContextManager[None]:
    """A decision that was lost with a session is not told again."""

    def connect(real: Any, self: Machine, member: MemberState, now: float, starting: bool = False) -> None:
        last, self.last_decision = self.last_decision, None
        real(self, member, now, starting)
        self.last_decision = last

    return _instead(Machine, "connect", connect)


def a_skip_keeps_the_version() -> contextlib.AbstractContextManager[None]:
    """A step that overflowed is not counted as decided by the shards."""

    def open_next(real: Any, self: StepProtocol) -> None:
        decision = self.deciding
        real(self)
        if decision is not None and decision.skip:
            self.step = decision.step

    return _instead(StepProtocol, "_open_next", open_next)


def a_torn_publish() -> contextlib.AbstractContextManager[None]:
    """A worker computes although some of its weights are of another version."""

    def there(real: Any, self: PulledModel, version: int, chunks: Any) -> bool:
        pulling = self._pulling
        if pulling is not None and pulling.version == version and pulling.started:
            return True
        return bool(real(self, version, chunks))

    return _instead(PulledModel, "_there", there)


def take_weights_of_any_version() -> contextlib.AbstractContextManager[None]:
    """Weights of an earlier pull, still on their way, count for the present one."""

    def wants(_real: Any, self: Pulling, shard: int, chunk: int, _applied: int) -> bool:
        return chunk in self.remaining.get(shard, ())

    return _instead(Pulling, "wants", wants)


def a_rollback_that_is_not_journaled() -> contextlib.AbstractContextManager[None]:
    """A checkpoint is served before the rollback is on disk."""

    def append(real: Any, self: Journal, record: dict[str, Any], sync: bool = False) -> None:
        if record["type"] != "rollback":
            real(self, record, sync)

    return _instead(Journal, "append", append)


def decide_otherwise_after_a_restart() -> contextlib.AbstractContextManager[None]:
    """The loss scaler starts anew with the coordinator."""

    def go_on(real: Any, self: Serving, version: int, inspections: Any) -> bool:
        done = bool(real(self, version, inspections))
        fresh = decisions.TrainingState.start(self._run.config).scaler
        self._run.state = replace(self._run.state, scaler=fresh)
        return done

    return _instead(Serving, "_go_on", go_on)


def snapshot_while_it_changes() -> contextlib.AbstractContextManager[None]:
    """An update does not wait until a snapshot has copied its chunk."""
    return _instead(Snapshot, "protect", lambda _real, _self, _chunk: None)


def report_before_it_is_written() -> contextlib.AbstractContextManager[None]:
    """A shard says that a step is reduced before that is in its journal: the last one is never there."""
    late: dict[int, tuple[Any, ...]] = {}

    def note(real: Any, self: StepJournal, record: Any, *mean: Any) -> None:
        if id(self) in late:
            real(self, *late[id(self)])
        late[id(self)] = (record, *(array.copy() for array in mean))

    return _instead(StepJournal, "note", note)


def commit_before_the_standbys_acknowledgement() -> contextlib.AbstractContextManager[None]:
    """A shard says that its standby holds a step as soon as it has sent it."""

    def report(real: Any, self: Mirroring, said: Prepared) -> None:
        real(self, said)
        link = self.link
        if link is not None and self._waiting is said:
            self._tell_now(replace(said, standby=link.standby))

    return _instead(Mirroring, "report", report)


def a_standby_dropped_by_its_primary_alone() -> contextlib.AbstractContextManager[None]:
    """A shard that does not reach its standby is believed that it has none."""
    return _instead(Standbys, "covers", lambda real, self, report: report.standby == 0 or real(self, report))


def a_standby_that_lacks_some_chunks() -> contextlib.AbstractContextManager[None]:
    """A standby acknowledges a step although some of it has not come."""

    def take_reduced(real: Any, self: Follower, *arguments: Any) -> bool:
        return bool(real(self, *arguments)) or bool(self._versions)

    return _instead(Follower, "take_reduced", take_reduced)


def tell_of_some_of_what_is_dealt() -> contextlib.AbstractContextManager[None]:
    """A worker that is dealt several contributions is told of the last one."""

    def ask(real: Any, self: Run, action: Action) -> None:
        real(self, replace(action, contributions=action.contributions[-1:]) if isinstance(action, TellDeal) else action)

    return _instead(Run, "ask", ask)


def a_summary_that_lacks_something() -> contextlib.AbstractContextManager[None]:
    """What the journal says of the last epoch's shards is not in its summary."""
    return _instead(History, "packed", lambda real, self: {**real(self), "primaries": {}})


#: Found where a shard that dies comes back: one that is replaced at once hides some of them.
ALONE: tuple[Plant, ...] = (
    count_a_duplicate,
    skip_the_fence_of_frames,
    skip_the_fence_of_decisions,
    skip_the_fence_of_reports,
    skip_the_fence_of_answers,
    decide_from_some_reports,
    decide_before_all_have_applied,
    use_a_term_again,
    use_an_epoch_again,
    two_coordinators,
    tell_the_fence_before_the_decision,
    forget_the_decision_when_a_session_resumes,
    a_skip_keeps_the_version,
    a_torn_publish,
    take_weights_of_any_version,
    a_rollback_that_is_not_journaled,
    decide_otherwise_after_a_restart,
    snapshot_while_it_changes,
    report_before_it_is_written,
    tell_of_some_of_what_is_dealt,
    a_summary_that_lacks_something,
)
#: Those that show when shards die, one soon after the other.
OF_DEATHS: tuple[Plant, ...] = (skip_the_fence_of_answers, report_before_it_is_written)
#: Of shards that have standbys.
OF_STANDBYS: tuple[Plant, ...] = (
    commit_before_the_standbys_acknowledgement,
    a_standby_dropped_by_its_primary_alone,
    a_standby_that_lacks_some_chunks,
)
