"""Carries out what the state machine asks for: journal first, then everything else, in order."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version as distribution_version
from typing import Any

import grpc

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import shard_pb2, shard_pb2_grpc
from ps import failpoints
from ps.coordinator import actions, metrics
from ps.coordinator.decision import TrainingState
from ps.coordinator.loop import Loop
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.recorder import Recorder
from ps.coordinator.recovery import Candidate, Inspection
from ps.coordinator.service import Sessions
from ps.coordinator.status import member_message
from ps.errors import (
    AccessDenied,
    CheckpointWriteFailed,
    ConfigError,
    MismatchError,
    StorageError,
)
from ps.sharding import make_plan
from ps.storage import layout, storage_proof
from ps.storage.files import sweep
from ps.storage.journal import Journal
from ps.storage.manifest import Manifest, ScalerState, write_manifest
from ps.storage.shard_file import ShardFile
from ps.types import Decision, Fence, Role
from ps.wire.options import open_channel
from ps.wire.proto import from_proto, to_proto
from ps.wire.security import PLAIN, Security
from ps.wire.status import error_of

log = logging.getLogger(__name__)

#: A shard answers everything but a load at once; one that does not is asked again.
CONTROL_TIMEOUT_S = 20.0
#: Between two lines of progress in the log.
PROGRESS_S = 30.0
_EVALUATION = ("version", "loss", "bits_per_byte")

_ACTION = {
    actions.Control.INSPECT: shard_pb2.ConfigureRequest.INSPECT,
    actions.Control.LOAD: shard_pb2.ConfigureRequest.LOAD,
    actions.Control.SERVE: shard_pb2.ConfigureRequest.SERVE,
}


class Effects:
    """The coordinator's hands. `carry_out` runs on the loop's thread; slow work does not."""

    def __init__(
        self,
        machine: Machine,
        loop: Loop,
        sessions: Sessions,
        journal: Journal,
        recorder: Recorder,
        myself: MemberState,
        job_json: str,
        on_end: Callable[[bool, str], None],
        security: Security = PLAIN,
    ) -> None:
        self._machine = machine
        self._loop = loop
        self._sessions = sessions
        self._journal = journal
        self._recorder = recorder
        self._self = myself
        self._job_json = job_json
        self._on_end = on_end
        self._security = security
        self._said_at = time.monotonic()
        self._nonce: tuple[str, str] | None = None
        self._plan_digest_made = ""
        self._pool = ThreadPoolExecutor(min(32, machine.config.cluster.shards + 1), thread_name_prefix="effect")
        self._do: dict[type, Callable[..., None]] = {
            actions.Configure: self._configure,
            actions.Journal: self._append,
            actions.Follow: self._follow,
            actions.TellDecision: self._tell_decision,
            actions.TellReplicate: self._tell_replicate,
            actions.Dismiss: self._dismiss,
            actions.TellForegone: self._tell_foregone,
            actions.TellSnapshot: self._tell_snapshot,
            actions.TellCluster: self._tell_cluster,
            actions.TellDeal: self._tell_deal,
            actions.PrepareCheckpoint: self._prepare_checkpoint,
            actions.WriteManifest: self._write_manifest,
            actions.Record: self._record,
            actions.Rewind: self._rewind,
            actions.MembersChanged: self._members_changed,
            actions.End: self._end,
        }

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._recorder.close()
        if self._nonce is not None:
            storage_proof.remove_nonce(self._machine.config.checkpoint_dir, self._nonce[0])

    def carry_out(self, wanted: Iterable[actions.Action]) -> None:
        """Do these, in order."""
        for action in wanted:
            self._do[type(action)](action)

    def _in_background(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do slow work on a thread of the pool; what it did not expect ends the coordinator, not just the thread."""

        def guarded() -> None:
            try:
                work(*arguments)
            except Exception as error:
                log.exception("a thread of the coordinator failed")
                self._on_end(False, f"the coordinator failed: {error}")

        self._pool.submit(guarded)

    def _plan_digest(self) -> str:
        """The digest of the run's plan; the table never changes, and a plan takes long for a large one."""
        if not self._plan_digest_made:
            table = self._machine.history.table
            assert table is not None, "there is a plan once there is a model"
            self._plan_digest_made = make_plan(table, self._machine.config.cluster.shards).digest
        return self._plan_digest_made

    # -- Disk -----------------------------------------------------------------------------------

    def _append(self, action: actions.Journal) -> None:
        # For people: nothing is decided by it.
        self._journal.append({**action.record, "at": time.time()}, sync=action.sync)

    def _record(self, action: actions.Record) -> None:
        self._recorder.record(action.line)
        self._say(action.line)
        _export(action.line)

    def _say(self, line: dict[str, Any]) -> None:
        """Log progress now and then, for a coordinator that was started by hand."""
        now = time.monotonic()
        if line["kind"] == "evaluation":
            log.info("held-out at step %d: loss %s, %s bits per byte", *map(line.get, _EVALUATION))
        elif now - self._said_at > PROGRESS_S:
            self._said_at = now
            log.info("step %d: loss %s", line["step"], line["loss"])

    def _rewind(self, action: actions.Rewind) -> None:
        self._recorder.rewind(action.version)

    def catch_up(self) -> None:
        """Write what a disk that failed has kept from being written."""
        self._recorder.catch_up()
        metrics.METRICS_BEHIND.set(self._recorder.behind)

    def members_changed(self) -> None:
        """Write cluster.json and targets.json."""
        members = self._machine.members
        there = [
            m for role in (Role.SHARD, Role.STANDBY, Role.WORKER) for m in members.of(role) if m.connected or m.live
        ]
        self._recorder.members([self._self, *there])

    def _members_changed(self, _action: actions.MembersChanged) -> None:
        try:
            self.members_changed()
        except StorageError as error:
            # Others may look for a member in vain until the next change; training does without.
            log.error("%s", error.message)

    def _prepare_checkpoint(self, action: actions.PrepareCheckpoint) -> None:
        try:
            layout.prepare(self._machine.config.checkpoint_dir, action.version)
        except CheckpointWriteFailed as error:
            # The shards will fail to write there as well, and that is what is counted.
            log.error("%s", error.message)

    def _write_manifest(self, action: actions.WriteManifest) -> None:
        machine, state = self._machine, action.state
        table = machine.history.table
        assert table is not None, "nothing is saved before there is a model"
        evaluation = machine.history.evaluations.get(state.version)
        manifest = Manifest(
            version=state.version,
            applied=state.applied,
            skipped=state.skipped,
            run_id=machine.history.run,
            contributions=machine.history.contributions,
            scaler=ScalerState(state.scaler.scale, state.scaler.hysteresis, state.scaler.last_overflow),
            table=table,
            num_shards=machine.config.cluster.shards,
            plan_digest=self._plan_digest(),
            moments=machine.config.optimizer.moment_names,
            files=tuple(ShardFile(*file) for file in action.files),
            job=json.loads(self._job_json),
            evaluation=evaluation["loss"] if evaluation else None,
            windlass_version=distribution_version("windlass"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # A slow shard's older one may be overtaken by this.
        self._in_background(self._complete_checkpoint, manifest, action, machine.snapshots.pending())

    def _complete_checkpoint(self, manifest: Manifest, action: actions.WriteManifest, writing: list[int]) -> None:
        directory = self._machine.config.checkpoint_dir
        folder = layout.checkpoint_folder(directory, manifest.version)
        candidate, text = None, ""
        try:
            candidate = Candidate(folder.name, write_manifest(folder, manifest), action.state, time.time())
            metrics.CHECKPOINT_VERSION.set(manifest.version)
            metrics.CHECKPOINT_TIME.set(time.time())
            layout.retain(directory, self._machine.config.checkpoint.keep, manifest.version, writing)
        except (StorageError, ValueError, TypeError) as error:
            text = error.message if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            if candidate is None:
                metrics.CHECKPOINT_FAILURES.inc()
            else:
                log.warning("old checkpoints stay: %s", text)
        self._loop.post(lambda _: self._machine.manifest_written(candidate, manifest.version, text))

    # -- Shards ---------------------------------------------------------------------------------

    def _configure(self, action: actions.Configure) -> None:
        member = self._machine.members.get(Role.SHARD, action.shard)
        assert member is not None, "only shards that have registered are configured"
        try:
            request = self._configure_request(action)
        except StorageError as error:
            failure = CheckpointWriteFailed(error.message)
            self._loop.post(
                lambda _: self._machine.serving.configure_failed(
                    action.shard, action.fence, action.control, failure, True
                )
            )
            return
        self._in_background(self._call_configure, action, member.address, request)

    def _request(
        self, control: shard_pb2.ConfigureRequest.Action, fence: Fence, shard: int
    ) -> shard_pb2.ConfigureRequest:
        machine = self._machine
        table = machine.history.table
        assert table is not None, "the cluster is configured once there is a model"
        return shard_pb2.ConfigureRequest(
            action=control,
            fence=to_proto(fence),
            run=machine.history.run,
            shard=shard,
            num_shards=machine.config.cluster.shards,
            table=table.packed(),
            job=self._job_json,
            contributions=machine.history.contributions,
            shards_on_machine=machine.members.shards_beside(shard),
            lineage=machine.history.lineage,
        )

    def _configure_request(self, action: actions.Configure) -> shard_pb2.ConfigureRequest:
        machine = self._machine
        request = self._request(_ACTION[action.control], action.fence, action.shard)
        request.checkpoint, request.manifest_sha256 = action.checkpoint, action.manifest_sha256
        if action.control is actions.Control.LOAD:
            if self._nonce is None:
                directory = machine.config.checkpoint_dir
                if directory.is_dir():
                    sweep(directory)
                self._nonce = storage_proof.write_nonce(directory)
            request.nonce_file, request.nonce = self._nonce
        if action.state is not None:
            _open_with(request, action.state)
        return request

    def _follow(self, action: actions.Follow) -> None:
        member = self._machine.members.get(Role.STANDBY, action.shard)
        assert member is not None, "only standbys that have registered follow"
        request = self._request(shard_pb2.ConfigureRequest.FOLLOW, action.fence, action.shard)
        _open_with(request, action.state)
        request.keep = action.keep
        self._in_background(self._call_follow, action, member.incarnation, member.address, request)

    def _call_follow(
        self, action: actions.Follow, life: int, address: str, request: shard_pb2.ConfigureRequest
    ) -> None:
        standbys, (shard, fence) = self._machine.standbys, (action.shard, action.fence)
        try:
            with open_channel(address, self._security, Role.SHARD) as channel:
                response = shard_pb2_grpc.ShardStub(channel).Configure(request, timeout=CONTROL_TIMEOUT_S)
        except grpc.RpcError as broken:
            why = error_of(broken, f"configuring standby {shard} at {address}").message
            self._loop.post(lambda _: standbys.follow_failed(shard, life, fence, why))
            return
        version = int(response.version)
        self._loop.post(lambda _: standbys.following(shard, life, fence, version))

    def _call_configure(self, action: actions.Configure, address: str, request: shard_pb2.ConfigureRequest) -> None:
        machine, (shard, fence, control) = self._machine, (action.shard, action.fence, action.control)
        # A shard that is asked for the first time may have a journal to go through.
        replaying = control is actions.Control.INSPECT and machine.config.durability == "journal"
        loading = replaying or control is actions.Control.LOAD
        timeout_s = machine.config.checkpoint.timeout_s if loading else CONTROL_TIMEOUT_S
        try:
            with open_channel(address, self._security, Role.SHARD) as channel:
                response = shard_pb2_grpc.ShardStub(channel).Configure(request, timeout=timeout_s)
        except grpc.RpcError as broken:
            failure = error_of(broken, f"configuring shard {shard} at {address}")
            fatal = isinstance(failure, MismatchError | ConfigError | AccessDenied)
            self._loop.post(lambda _: machine.serving.configure_failed(shard, fence, control, failure, fatal))
            return
        if response.plan_digest != self._plan_digest():
            other = MismatchError(
                f"the plan {response.plan_digest[:12]} of the process at {address} is not the coordinator's "
                f"{self._plan_digest()[:12]}: their versions of windlass differ"
            )
            self._loop.post(lambda _: machine.serving.configure_failed(shard, fence, control, other, True))
            return
        last = from_proto(Decision, response.last_decision) if response.HasField("last_decision") else None
        ahead = from_proto(Decision, response.updated_by) if response.HasField("updated_by") else None
        inspection = Inspection(
            response.has_state, response.version, last, ahead, response.reduced, response.state_hash
        )
        self._loop.post(lambda _: machine.serving.configured(shard, fence, control, inspection))

    def _tell_decision(self, action: actions.TellDecision) -> None:
        role = Role.STANDBY if action.standby else Role.SHARD
        failpoints.hit("decision.before")
        self._tell(role, action.shard, decision=to_proto(action.decision))
        failpoints.hit("decision.after")

    def _tell_replicate(self, action: actions.TellReplicate) -> None:
        wanted = pb.Replicate(fence=to_proto(action.fence), address=action.address, incarnation=action.life)
        self._tell(Role.SHARD, action.shard, replicate=wanted)

    def _dismiss(self, action: actions.Dismiss) -> None:
        self._sessions.tell(action.life, end=pb.End(ok=False, reason=action.reason))

    def _tell(self, role: Role, rank: int, **event: Any) -> None:
        """Tell whoever has this seat by now."""
        member = self._machine.members.get(role, rank)
        if member is not None:
            self._sessions.tell(member.incarnation, **event)

    def _tell_foregone(self, action: actions.TellForegone) -> None:
        self._tell(Role.SHARD, action.shard, foregone=to_proto(action.decision))

    def _tell_snapshot(self, action: actions.TellSnapshot) -> None:
        wanted = pb.WriteSnapshot(fence=to_proto(action.fence), version=action.version)
        self._tell(Role.SHARD, action.shard, write_snapshot=wanted)

    # -- Workers --------------------------------------------------------------------------------

    def _tell_cluster(self, action: actions.TellCluster) -> None:
        machine = self._machine
        cluster = pb.Cluster(
            fence=to_proto(action.fence),
            plan_digest=self._plan_digest(),
            shards=[member_message(member) for member in machine.members.of(Role.SHARD)],
            contributions=machine.history.contributions,
            step=action.state.version,
            applied=action.state.applied,
            loss_scale=action.state.scaler.scale,
        )
        self._tell(Role.WORKER, action.worker, cluster=cluster)

    def _tell_deal(self, action: actions.TellDeal) -> None:
        deal = pb.Deal(
            fence=to_proto(action.fence),
            step=action.state.version,
            applied=action.state.applied,
            loss_scale=action.state.scaler.scale,
            contributions=action.contributions,
            evaluate=action.evaluate,
            initialize=action.initialize,
            done=action.done,
        )
        self._tell(Role.WORKER, action.worker, deal=deal)

    def _end(self, action: actions.End) -> None:
        self._on_end(action.ok, action.reason)


def _open_with(request: shard_pb2.ConfigureRequest, state: TrainingState) -> None:
    request.step, request.applied, request.loss_scale = state.version, state.applied, state.scaler.scale


def _export(line: dict[str, Any]) -> None:
    """Show a line of metrics.jsonl to Prometheus as well."""
    if line["kind"] == "evaluation":
        metrics.EVALUATION_LOSS.set(math.nan if line["loss"] is None else line["loss"])
        return
    metrics.SKIPPED.inc(int(line["skipped"]))
    if not line["skipped"]:
        metrics.COMMIT_TIME.set_to_current_time()
    metrics.TOKENS.inc(line["tokens"])
    metrics.LEARNING_RATE.set(line["learning_rate"])
    for gauge, key in ((metrics.LOSS, "loss"), (metrics.GRADIENT_NORM, "gradient_norm")):
        if line[key] is not None:
            gauge.set(line[key])
        elif not line["skipped"]:
            # A run that has diverged must not look as it did before.
            gauge.set(math.nan)
    if line["step_seconds"] is not None:
        metrics.STEP_SECONDS.observe(line["step_seconds"])
        rest = line["step_seconds"]
        for phase in ("compute", "push", "pull"):
            seconds = line[f"{phase}_seconds"] or 0.0
            metrics.PHASE_SECONDS.labels(phase).inc(seconds)
            rest -= seconds
        metrics.PHASE_SECONDS.labels("rest").inc(max(0.0, rest))
