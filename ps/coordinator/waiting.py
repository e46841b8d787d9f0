"""What a run waits for: who, what, since when, and when it was last seen. Pure; time is handed in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ps.coordinator.dealing import Dealing
from ps.coordinator.run import Phase, Run
from ps.coordinator.steps import Steps
from ps.types import Role

if TYPE_CHECKING:
    from ps.coordinator.serving import Serving

#: Waits that a message names, at most.
NAMED = 4

_CONTROL = {Phase.INSPECTING: "to say what it holds", Phase.OPENING: "to open"}


@dataclass(frozen=True)
class Wait:
    """Somebody that the run waits for."""

    role: Role
    #: None: any of them will do.
    rank: int | None
    what: str
    since_s: float
    #: None: it was never seen, or it is nobody in particular.
    last_seen_s: float | None

    @property
    def who(self) -> str:
        if self.role is Role.COORDINATOR:
            return "the coordinator"
        return f"{self.role} {self.rank}" if self.rank is not None else f"any {self.role}"

    def __str__(self) -> str:
        text = f"{self.who} ({self.what}) since {self.since_s:.1f} s"
        if self.last_seen_s is not None:
            return f"{text}, last seen {self.last_seen_s:.1f} s ago"
        return f"{text}, never seen" if self.rank is not None else text


@dataclass(frozen=True)
class _Missing:
    """What somebody has to do, and by which names its begin is remembered: the oldest one counts."""

    role: Role
    rank: int | None
    what: str
    keys: tuple[Hashable, ...]


def find_waits(run: Run, steps: Steps, serving: Serving, now: float) -> list[Wait]:
    """Find out whom the run waits for, those without whom nothing goes on first."""
    missing = list(_missing(run, steps, serving))
    run.since.look((key for one in missing for key in one.keys), now)
    waits = []
    for one in missing:
        member = run.members.get(one.role, one.rank) if one.rank is not None else None
        seen = max(0.0, now - member.last_seen) if member is not None else None
        if one.role is Role.COORDINATOR:
            seen = 0.0
        since = max(run.since.seconds(key, now) for key in one.keys)
        waits.append(Wait(one.role, one.rank, one.what, since, seen))
    return waits


def describe_wait(run: Run, waits: Sequence[Wait]) -> str:
    """Say it for people: "step 812: waiting for worker 3 (contribution 2) since 6.2 s, ..."; empty: for nothing."""
    if not waits:
        return ""
    where = f"step {run.state.version}" if run.phase is Phase.RUNNING else run.phase.value
    named = "; ".join(map(str, waits[:NAMED]))
    more = f"; and for {len(waits) - NAMED} more" if len(waits) > NAMED else ""
    return f"{where}: waiting for {named}{more}"


def describe_absence(run: Run, role: Role, rank: int, now: float) -> str:
    """Name a member, and when it was last seen."""
    member = run.members.get(role, rank)
    seen = f"last seen {now - member.last_seen:.1f} s ago" if member is not None else "never seen"
    return f"{role} {rank}, {seen}"


def _missing(run: Run, steps: Steps, serving: Serving) -> Iterator[_Missing]:
    if run.phase is Phase.ENDED:
        return
    absent = run.members.missing_shards()
    known = {shard: run.members.get(Role.SHARD, shard) for shard in absent}
    for shard, member in known.items():
        if member is None or member.served:
            yield _Missing(Role.SHARD, shard, "to come back" if member else "to come", (("come", shard),))
    if run.phase is Phase.GATHERING and run.history.table is None:
        yield from _first_model(run)
    for shard, member in known.items():
        if member is not None and not member.served:
            says = f"; it says: {member.doing}" if member.doing else ""
            yield _Missing(Role.SHARD, shard, f"to start{says}", (("start", shard),))
    if run.phase is Phase.GATHERING:
        return
    if run.phase is Phase.INITIALIZING:
        yield from _initial_values(run, serving)
    elif run.phase is not Phase.RUNNING:
        what = _CONTROL.get(run.phase) or f"to load {serving.loading or 'no checkpoint: there is none'}"
        for shard in serving.unanswered():
            if shard not in absent:
                yield _Missing(Role.SHARD, shard, what, ((run.phase, run.fence, shard),))
    elif not absent:
        yield from _step(run, steps)


def _first_model(run: Run) -> Iterator[_Missing]:
    """Without a worker's table there is no plan."""
    coming = [m for m in run.members.of(Role.WORKER) if not m.ready and (m.connected or not m.met)]
    for member in coming:
        what = "to say what its model and data are" if member.connected else "to load its data and model"
        yield _Missing(Role.WORKER, member.rank, what, (("model", member.rank),))
    if not coming:
        yield _Missing(Role.WORKER, None, "to come", (("come", Role.WORKER),))


def _initial_values(run: Run, serving: Serving) -> Iterator[_Missing]:
    what = f"initial values of {_numbered('shard', serving.empty())}"
    yield _Missing(Role.WORKER, serving.initializer, what, ((run.phase, run.fence, serving.initializer),))


def _step(run: Run, steps: Steps) -> Iterator[_Missing]:
    version = run.state.version
    for shard in steps.not_applied():
        yield _Missing(Role.SHARD, shard, f"to apply decision {version - 1}", (("apply", version, shard),))
    for shard in steps.standbys_not_applied():
        what = f"to apply decision {version - 1}"
        yield _Missing(Role.STANDBY, shard, what, (("apply", version, Role.STANDBY, shard),))
    if steps.evaluation is not None and run.stop_reason is None:
        yield from _units(run, steps.evaluation.dealing, "evaluation part")
    least = run.config.membership.min_workers
    # Where one is enough, what it has to do says as much.
    if least > 1 and steps.lacks_workers() and (steps.evaluation is not None or not steps.is_over()):
        there = len(run.members.live_workers())
        what = f"to come: membership.min_workers={least}, and {there or 'none'} {'is' if there == 1 else 'are'} there"
        yield _Missing(Role.WORKER, None, what, (("come", Role.WORKER),))
    if not steps.is_over():
        yield from _units(run, steps.dealing, "contribution")
    if not steps.is_over() and steps.dealing.complete:
        for shard in steps.not_prepared():
            yield _Missing(Role.SHARD, shard, _report(run, shard), (("prepare", version, shard),))
    for shard in steps.not_covered():
        what = f"to hold step {version}: its shard does not reach it"
        yield _Missing(Role.STANDBY, shard, what, (("cover", version, shard),))
    for saved in run.snapshots.pending():
        shards = run.snapshots.unwritten(saved, run.config.cluster.shards)
        for shard in shards:
            yield _Missing(Role.SHARD, shard, f"to write checkpoint {saved}", (("write", saved, shard),))
        if not shards:
            yield _Missing(Role.COORDINATOR, 0, f"to complete checkpoint {saved}", (("manifest", saved),))


def _units(run: Run, dealing: Dealing, unit: str) -> Iterator[_Missing]:
    by_rank: dict[int | None, list[int]] = {}
    for number in range(dealing.count):
        if number not in dealing.done:
            holders: Sequence[int | None] = dealing.holders(number) or [None]
            for holder in holders:
                by_rank.setdefault(holder, []).append(number)
    for rank in sorted(by_rank, key=lambda rank: -1 if rank is None else rank):
        keys = tuple((unit, run.state.version, rank, number) for number in by_rank[rank])
        yield _Missing(Role.WORKER, rank, _numbered(unit, by_rank[rank]), keys)


def _report(run: Run, shard: int) -> str:
    """What a shard lacks is in its heartbeats, which may still speak of an earlier step."""
    member, prefix = run.members.get(Role.SHARD, shard), f"step {run.state.version}: "
    says = member.doing.removeprefix(prefix) if member is not None and member.doing.startswith(prefix) else ""
    return "to reduce the step" + (f"; it says: {says}" if says else "")


def _numbered(what: str, numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{what}{'s' if len(numbers) != 1 else ''} {named}{more}"
