"""Goes through a run's journal: was every contribution of every step counted once, and by whom was it computed? Pure.

It believes nothing of what the coordinator concluded, only what it wrote down: which contributions each shard has
counted, under which fence, and the hash of its state after each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ps.coordinator.accounts import Accounts
from ps.coordinator.decision import same_content
from ps.types import Decision, Fence
from ps.wire.proto import from_record

Record = dict[str, Any]

#: Records of who came and went, and of what that led to.
_MEMBERSHIP = {"term", "epoch", "rollback", "live", "gone", "standby", "promotion"}


@dataclass
class Step:
    """A decided step."""

    decision: Decision
    #: Who computed what, as `accounts`; None: the journal had lost the decision, and a shard gave it back.
    counted: Accounts | None
    #: By shard; None: not known, because the coordinator started anew in between.
    hashes: list[int | None] = field(default_factory=list)

    def computed_by(self) -> dict[int, list[int]]:
        """The ranks that computed each contribution, seldom more than one."""
        by: dict[int, set[int]] = {}
        for _, said in self.counted or []:
            for contribution, rank, _ in said:
                by.setdefault(contribution, set()).add(rank)
        return {contribution: sorted(ranks) for contribution, ranks in sorted(by.items())}


@dataclass(frozen=True)
class Event:
    """Somebody came or went, or what followed from it."""

    step: int
    #: Unix time; None: the journal does not say.
    at: float | None
    what: str


@dataclass
class Audit:
    """What a journal says."""

    run: str = ""
    #: C.
    contributions: int = 0
    shards: int = 0
    #: By number; what a rollback took back and was made again stands as it was made last.
    steps: dict[int, Step] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    #: What must not be.
    problems: list[str] = field(default_factory=list)
    #: Steps of which the journal does not say who computed them: it lost their decisions.
    unaccounted: list[int] = field(default_factory=list)
    #: Steps that were decided again after a rollback.
    repeated: int = 0

    @property
    def accounted(self) -> int:
        """Steps of which the journal says who computed them."""
        return len(self.steps.keys() - set(self.unaccounted))

    def by_worker(self) -> Counter[int]:
        """Contributions by rank."""
        return Counter(rank for step in self.steps.values() for ranks in step.computed_by().values() for rank in ranks)


def audit(records: Iterable[Record]) -> Audit:
    """Go through a journal's records, of all terms, in order."""
    auditor = _Auditor()
    for record in records:
        auditor.take(record)
    return auditor.found


class _Auditor:
    def __init__(self) -> None:
        self.found = Audit()
        self._fence = Fence(0, 0)
        self._version = 0
        #: A coordinator has started, and has decided nothing yet: what its journal has lost may be missing here.
        self._is_starting = False
        #: What rollbacks have taken back.
        self._before: dict[int, Step] = {}
        self._take: dict[str, Callable[[Record], None]] = {
            "run": self._run,
            "term": self._term,
            "epoch": self._epoch,
            "rollback": self._rollback,
            "decision": self._decision,
            "applied": self._applied,
        }

    def take(self, record: Record) -> None:
        kind = record["type"]
        # A start loads version 0, which takes nothing back.
        if kind in _MEMBERSHIP and record.get("version") != self._version:
            # By its place in the journal: a coordinator that has just begun does not know yet where the run is.
            self.found.events.append(Event(self._version, record.get("at"), _describe(record)))
        if kind in self._take:
            self._take[kind](record)

    def _problem(self, step: int, what: str) -> None:
        self.found.problems.append(f"step {step}: {what}")

    def _run(self, record: Record) -> None:
        self.found.run, self.found.contributions = record["run"], record["contributions"]

    def _term(self, record: Record) -> None:
        if record["term"] <= self._fence.term:
            self._problem(self._version, f"term {record['term']} came after term {self._fence.term}")
        self._fence = Fence(record["term"], self._fence.epoch)
        self._is_starting = True

    def _epoch(self, record: Record) -> None:
        fence = Fence(record["term"], record["epoch"])
        if fence <= self._fence or fence.epoch <= self._fence.epoch:
            self._problem(self._version, f"the fence {fence} came after {self._fence}")
        self._fence = fence
        self.found.shards = len(record["shards"])

    def _rollback(self, record: Record) -> None:
        if record["version"] > self._version:
            # A journal that was begun anew, in the place of a damaged one, begins at a checkpoint as well.
            self._skip_to(record["version"], f"a rollback to version {record['version']}, which is not decided")
        self.found.unaccounted = [step for step in self.found.unaccounted if step < record["version"]]
        for step in [step for step in self.found.steps if step >= record["version"]]:
            self._before[step] = self.found.steps.pop(step)
        self._version = record["version"]

    def _decision(self, record: Record) -> None:
        decision = from_record(Decision, record)
        step = Step(decision, record.get("counted"))
        if step.counted is not None:
            self._is_starting = False
        if decision.step != self._version:
            self._skip_to(decision.step, f"was decided where step {self._version} was open")
        if step.counted is None:
            self.found.unaccounted.append(decision.step)
        else:
            if decision.fence != self._fence:
                self._problem(decision.step, f"was decided under {decision.fence}, where {self._fence} is valid")
            for what in self._miscounted(step.counted):
                self._problem(decision.step, what)
        before = self._before.get(decision.step)
        if before is not None:
            self.found.repeated += 1
            if not same_content(before.decision, decision):
                self._problem(decision.step, "was decided otherwise before a rollback")
        self.found.steps[decision.step] = step
        self._version = decision.version

    def _skip_to(self, step: int, what: str) -> None:
        """Not the next step: wrong, unless a start has found that its host lost power before these were on disk."""
        if self._is_starting and step > self._version:
            self.found.unaccounted += range(self._version, step)
        else:
            self._problem(step, what)

    def _miscounted(self, counted: Accounts) -> Iterator[str]:
        every = list(range(self.found.contributions))
        said_by = sorted(shard for shards, _ in counted for shard in shards)
        if said_by != list(range(self.found.shards)):
            yield f"shards {said_by} reported, where there are {self.found.shards}"
        for shards, said in counted:
            times = Counter(contribution for contribution, _, _ in said)
            wrong = [f"{c} {times[c]} times" for c in sorted({*every, *times}) if times[c] != (c in every)]
            if wrong:
                yield f"shards {shards} counted contribution {', '.join(wrong)}"

    def _applied(self, record: Record) -> None:
        step = self.found.steps.get(record["step"])
        if step is None:
            self._problem(record["step"], "was carried out, and not decided")
            return
        step.hashes = [found or None for found in record["hashes"]]
        before = self._before.get(record["step"])
        same_shards = before is not None and len(before.hashes) == len(step.hashes)
        for shard, found in enumerate(step.hashes if same_shards else []):
            earlier = before.hashes[shard] if before is not None else None
            if None not in (earlier, found) and earlier != found:
                self._problem(record["step"], f"shard {shard} has another state than before a rollback")


def _describe(record: Record) -> str:
    kind = record["type"]
    if kind == "term":
        return f"coordinator started: term {record['term']}"
    if kind == "epoch":
        return f"epoch {record['epoch']}: {len(record['shards'])} shards are made to serve"
    if kind == "rollback":
        return f"rollback to version {record['version']}"
    if kind == "standby":
        holds = "holds the same as its shard, and may take over" if record["life"] else "does not count any more"
        return f"standby {record['shard']} {holds}"
    if kind == "promotion":
        return f"standby {record['shard']} takes over as shard {record['shard']}"
    who = f"{record['role']} {record['rank']}"
    return f"{who} is there (life {record['life']:016x})" if kind == "live" else f"{who} {record['why']}"
