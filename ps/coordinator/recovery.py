"""Where a cluster can go on from: what its shards still hold, or a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Sequence
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
    #: By what chunks of the open step are updated already; None: none is.
    ahead: Decision | None = None
    #: Every chunk of its open step is reduced.
    reduced: bool = True
    #: Of its state at that version; 0: not known.
    state_hash: int = 0


def surviving_version(inspections: Sequence[Inspection], last: Decision | None) -> int | None:
    """The version that the shards can go on from without loading anything, or None.

    Shards may be one decision apart: the last decision, told again, brings the others there. They have reduced its
    step, or it could not have been made; but for one whose host lost power, and with it the end of its journal.

    Args:
        last: the last decision in the journal, after what shards knew was adopted.
    """
    if not inspections or not all(inspection.has_state for inspection in inspections):
        return None
    versions = {inspection.version for inspection in inspections}
    version = last.version if last is not None else 0
    follows = all(inspection.reduced for inspection in inspections if inspection.version < version)
    return version if versions <= {version, version - 1} and follows else None


def can_complete(inspections: Sequence[Inspection], last: Decision | None, foregone: Decision | None) -> bool:
    """Whether the steps in which chunks are updated already can end as they have begun.

    Args:
        last: the last decision.
        foregone: what the decision of the open step will do; None: nobody knows.
    """
    for inspection in inspections:
        if inspection.ahead is not None:
            is_decided = last is not None and inspection.version == last.step
            decision = last if is_decided else foregone
            if decision is None or not decision.updates_as(inspection.ahead):
                return False
    return True


def choose_checkpoint(candidates: Sequence[Candidate]) -> Candidate | None:
    """The newest one; None: start from initial values."""
    return max(candidates, key=lambda candidate: candidate.state.version, default=None)


def describe_newest(candidates: Sequence[Candidate]) -> str:
    """Say what is left of a run whose present version could not be saved."""
    newest = choose_checkpoint(candidates)
    return f"the last checkpoint is {newest.name}" if newest is not None else "there is no checkpoint"
