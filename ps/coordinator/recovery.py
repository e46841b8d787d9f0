"""Where a cluster can go on from: what its shards still hold, or a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ps.coordinator.decision import TrainingState
from ps.types import Decision


@dataclass(frozen=True)
class Candidate:
    """A complete checkpoint."""

    name: str
    manifest_sha256: str
    state: TrainingState
    #: When it was completed, Unix time; None: unknown.
    created_at: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What a shard says of itself."""

    has_state: bool
    version: int
    last_decision: Decision | None
    #: Chunks of the open step are updated already.
    ahead: bool = False


def surviving_version(
    inspections: Sequence[Inspection], last: Decision | None, decided_steps: Collection[int] = ()
) -> int | None:
    """The version that the shards can go on from without loading anything, or None.

    Shards may be one decision apart: the last decision, told again, brings the others there.

    Args:
        last: the last decision in the journal, after what shards knew was adopted.
        decided_steps: those that must not be eager; a shard that is ahead in one holds no version.
    """
    if not inspections or not all(inspection.has_state for inspection in inspections):
        return None
    if any(inspection.ahead and inspection.version in decided_steps for inspection in inspections):
        return None
    versions = {inspection.version for inspection in inspections}
    version = last.version if last is not None else 0
    return version if versions <= {version, version - 1} else None


def choose_checkpoint(candidates: Sequence[Candidate]) -> Candidate | None:
    """The newest one; None: start from initial values."""
    return max(candidates, key=lambda candidate: candidate.state.version, default=None)
