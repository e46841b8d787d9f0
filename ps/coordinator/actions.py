"""What the coordinator's state machine asks its surroundings to do, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ps.coordinator.decision import TrainingState
from ps.types import Decision, Fence


class Control(Enum):
    """The steps in which shards are made to serve."""

    INSPECT = "inspect"
    LOAD = "load"
    SERVE = "serve"


@dataclass(frozen=True)
class Configure:
    """Call a shard's Configure; the answer comes back as an event."""

    shard: int
    control: Control
    fence: Fence
    #: LOAD: the checkpoint's folder name and its manifest's SHA-256; empty for initial values.
    checkpoint: str = ""
    manifest_sha256: str = ""
    #: SERVE: the state to open with.
    state: TrainingState | None = None


@dataclass(frozen=True)
class Journal:
    """Append a record before anything after it is done."""

    record: dict[str, Any]
    sync: bool = False


@dataclass(frozen=True)
class TellDecision:
    shard: int
    decision: Decision
    #: To the shard's standby instead of the shard.
    standby: bool = False


@dataclass(frozen=True)
class Follow:
    """Have a standby follow its shard from a state on; the answer comes back as an event."""

    shard: int
    fence: Fence
    state: TrainingState
    #: What it holds already counts.
    keep: bool


@dataclass(frozen=True)
class TellReplicate:
    """Tell a shard of its standby, as it is now."""

    shard: int
    fence: Fence
    #: Its server and its life; empty, 0: there is none.
    address: str = ""
    life: int = 0


@dataclass(frozen=True)
class Dismiss:
    """End a life that is not a member any more."""

    life: int
    reason: str


@dataclass(frozen=True)
class TellForegone:
    """Tell a shard what the decision of the open step will do."""

    shard: int
    decision: Decision


@dataclass(frozen=True)
class TellSnapshot:
    """Ask a shard to write the state that it holds now."""

    shard: int
    fence: Fence
    version: int


@dataclass(frozen=True)
class TellCluster:
    """Tell a worker who serves, and where the run is."""

    worker: int
    fence: Fence
    state: TrainingState


@dataclass(frozen=True)
class TellDeal:
    """Give a worker work, or take it off it."""

    worker: int
    fence: Fence
    state: TrainingState
    contributions: tuple[int, ...] = ()
    evaluate: tuple[int, ...] = ()
    initialize: bool = False
    #: Contributions of its that somebody else has finished.
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrepareCheckpoint:
    """Make an empty folder before any shard writes into it."""

    version: int


@dataclass(frozen=True)
class WriteManifest:
    """Complete a checkpoint; the answer comes back as an event."""

    state: TrainingState
    #: (name, sha256, size) by shard.
    files: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Record:
    """A line for metrics.jsonl."""

    line: dict[str, Any]


@dataclass(frozen=True)
class Rewind:
    """Drop the lines of metrics.jsonl from this version on: they will be written again."""

    version: int


@dataclass(frozen=True)
class MembersChanged:
    """Rewrite cluster.json."""


@dataclass(frozen=True)
class End:
    """The run is over, or pauses: tell everybody and leave."""

    ok: bool
    reason: str


Action = (
    Configure
    | Journal
    | TellDecision
    | Follow
    | TellReplicate
    | Dismiss
    | TellForegone
    | TellSnapshot
    | TellCluster
    | TellDeal
    | PrepareCheckpoint
    | WriteManifest
    | Record
    | Rewind
    | MembersChanged
    | End
)
