"""What a run waits for, in words for people."""

from __future__ import annotations

from ps.coordinator.run import Phase, Run
from ps.coordinator.steps import Steps
from ps.types import Role

#: Members that a message names, at most.
NAMED = 4


def describe_wait(run: Run, steps: Steps, started_at: float, now: float) -> str:
    """Say what is waited for, since when, and when it was last seen; empty: nothing."""
    missing = run.members.missing_shards()
    if missing:
        named = ", ".join(describe_absence(run, Role.SHARD, shard, now) for shard in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more shards" if len(missing) > NAMED else ""
        return f"waiting for {named}{more}"
    if run.history.table is None or not run.members.live_workers():
        return f"waiting for a worker; none is there after {now - started_at:.1f} s"
    if run.phase is not Phase.RUNNING:
        return f"{run.phase.value}: waiting for the shards' answers"
    waits = []
    for rank in run.members.live_workers():
        outstanding = steps.dealing.outstanding(rank)
        if outstanding:
            waits.append(f"{describe_absence(run, Role.WORKER, rank, now)} (contributions {outstanding})")
    if run.snapshots.pending():
        waits.append(f"checkpoint of version {run.snapshots.pending()[0]}")
    return f"step {run.state.version}: waiting for {', '.join(waits)}" if waits else ""


def describe_absence(run: Run, role: Role, rank: int, now: float) -> str:
    """Name a member, and when it was last seen."""
    member = run.members.get(role, rank)
    seen = f"last seen {now - member.last_seen:.1f} s ago" if member is not None else "never seen"
    return f"{role} {rank}, {seen}"
