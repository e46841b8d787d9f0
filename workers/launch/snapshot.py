"""What is going on in a cluster at one moment: what the view draws and `windlass status --json` prints.

A name here is a name there, described in docs/status.md; what is not known is None, and null there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from workers.launch.metrics import Progress

if TYPE_CHECKING:
    from protos.ps.v1 import coordinator_pb2 as pb


@dataclass(frozen=True)
class Spent:
    """A worker's last contribution."""

    step: int
    contribution: int
    compute_s: float
    push_s: float
    pull_s: float
    #: The part of `pull_s` before the first of the weights came.
    wait_s: float


@dataclass(frozen=True)
class MemberSnapshot:
    """One process of the cluster."""

    role: str
    rank: int
    #: "starting", "live" or "lost".
    state: str
    #: Since when it has been in this state.
    since_s: float | None = None
    last_seen_s: float | None = None
    doing: str = ""
    host: str = ""
    pid: int | None = None
    address: str = ""
    metrics_address: str = ""
    restarts: int = 0
    last_contribution: Spent | None = None
    #: How a worker's payloads travel: "shm", "grpc" or, different from shard to shard, "shm+grpc".
    transport: str = ""
    #: Whether a standby holds the same as its shard, and may take over; None: it is none.
    in_sync: bool | None = None

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"


@dataclass(frozen=True)
class WaitSnapshot:
    """Somebody that the run waits for."""

    role: str
    #: None: any worker will do.
    rank: int | None
    what: str
    since_s: float
    last_seen_s: float | None


@dataclass(frozen=True)
class Snapshot:
    """A run and its members at one moment."""

    run: str
    run_dir: str
    phase: str
    term: int
    epoch: int
    version: int
    applied: int
    skipped: int
    steps: int
    contributions: int
    micro_batches: int
    loss: float | None
    evaluation_loss: float | None
    evaluation_version: int | None
    learning_rate: float | None
    gradient_norm: float | None
    loss_scale: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    step_s: float | None
    compute_s: float | None
    push_s: float | None
    pull_s: float | None
    wait_s: float | None
    checkpoint_version: int | None
    checkpoint_age_s: float | None
    up_s: float | None
    members: tuple[MemberSnapshot, ...] = ()
    waits: tuple[WaitSnapshot, ...] = ()
    waiting_for: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object that `windlass status --json` prints."""
        found: dict[str, Any] = _finite({"running": True, **asdict(self)})
        return found

    def silent(self, seconds: float) -> Snapshot:
        """The same, from a coordinator that has not answered for some time."""
        wait = WaitSnapshot("coordinator", 0, "to answer", seconds, seconds)
        return replace(self, phase="unreachable", waits=(wait,), waiting_for=f"the coordinator for {seconds:.1f} s")


def starting(progress: Progress, run_dir: str) -> Snapshot:
    """Of a run whose coordinator is not there yet, as far as its metrics tell."""
    return Snapshot(
        run="",
        run_dir=run_dir,
        phase="starting",
        term=0,
        epoch=0,
        version=progress.version,
        applied=0,
        skipped=0,
        steps=progress.steps,
        contributions=0,
        micro_batches=0,
        loss=progress.loss,
        evaluation_loss=progress.held_out_loss,
        evaluation_version=None,
        learning_rate=progress.learning_rate,
        gradient_norm=None,
        loss_scale=None,
        tokens_per_s=None,
        seconds_left=None,
        step_s=None,
        compute_s=None,
        push_s=None,
        pull_s=None,
        wait_s=None,
        checkpoint_version=None,
        checkpoint_age_s=None,
        up_s=None,
    )


def from_message(message: pb.StatusResponse) -> Snapshot:
    """Read a coordinator's answer."""
    me = message.coordinator
    coordinator = MemberSnapshot(
        "coordinator", 0, "live", message.up_s, 0.0, "", me.host, me.pid or None, me.address, me.metrics_address
    )
    return Snapshot(
        run=message.run,
        run_dir=message.run_dir,
        phase=message.phase,
        term=message.fence.term,
        epoch=message.fence.epoch,
        version=message.version,
        applied=message.applied,
        skipped=message.skipped,
        steps=message.steps,
        contributions=message.contributions,
        micro_batches=message.slots,
        loss=_known(message.loss),
        evaluation_loss=_known(message.evaluation_loss),
        evaluation_version=_optional(message, "evaluation_version"),
        learning_rate=_known(message.learning_rate),
        gradient_norm=_known(message.gradient_norm),
        loss_scale=message.loss_scale,
        tokens_per_s=_optional(message, "tokens_per_s"),
        seconds_left=_optional(message, "left_s"),
        step_s=_optional(message, "step_s"),
        compute_s=_optional(message, "compute_s"),
        push_s=_optional(message, "push_s"),
        pull_s=_optional(message, "pull_s"),
        wait_s=_optional(message, "wait_s"),
        checkpoint_version=message.checkpoint if message.checkpoint >= 0 else None,
        checkpoint_age_s=_optional(message, "checkpoint_age_s"),
        up_s=message.up_s,
        members=(coordinator, *map(_member, message.members)),
        waits=tuple(map(_wait, message.waits)),
        waiting_for=message.waiting_for,
    )


def _member(message: pb.MemberStatus) -> MemberSnapshot:
    last, who = message.last, message.member
    spent = Spent(last.step, last.contribution, last.compute_s, last.push_s, last.pull_s, last.wait_s)
    return MemberSnapshot(
        who.role,
        who.rank,
        message.state,
        message.since_s,
        message.last_seen_s,
        message.doing,
        who.host,
        who.pid or None,
        who.address,
        who.metrics_address,
        message.restarts,
        spent if message.HasField("last") else None,
        message.transport,
        message.in_sync if who.role == "standby" else None,
    )


def _wait(message: pb.Wait) -> WaitSnapshot:
    rank = message.rank if message.rank >= 0 else None
    return WaitSnapshot(message.role, rank, message.what, message.since_s, _optional(message, "last_seen_s"))


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _known(value: float) -> float | None:
    """NaN stands for "not yet" in the fields that are older than optional ones."""
    return None if math.isnan(value) else value


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
