"""What is going on, as the Status call tells it."""

from __future__ import annotations

import math

from protos.ps.v1 import common_pb2
from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase
from ps.coordinator.waiting import Wait, describe_wait
from ps.types import Role
from ps.wire.proto import to_proto


def status(machine: Machine, myself: common_pb2.Member, now: float, wall_now: float) -> pb.StatusResponse:
    """Describe the run for people and tools.

    Args:
        machine: the run.
        myself: the coordinator.
        now: the clock of the machine's events.
        wall_now: Unix time, in which checkpoints are dated.
    """
    decision, evaluations, speed = machine.last_decision, machine.history.evaluations, machine.steps.speed
    newest = max(machine.snapshots.candidates, key=lambda candidate: candidate.state.version, default=None)
    waits = machine.waits(now)
    answer = pb.StatusResponse(
        run=machine.history.run,
        fence=to_proto(machine.fence),
        phase="stopping" if machine.stop_reason and machine.phase is not Phase.ENDED else machine.phase.value,
        version=machine.state.version,
        applied=machine.state.applied,
        skipped=machine.state.skipped,
        steps=machine.config.training.end,
        loss=decision.loss if decision else math.nan,
        evaluation_loss=evaluations[max(evaluations)]["loss"] if evaluations else math.nan,
        evaluation_version=max(evaluations, default=None),
        loss_scale=machine.state.scaler.scale,
        learning_rate=decision.groups[0].lr if decision else math.nan,
        gradient_norm=decision.gradient_norm if decision else math.nan,
        members=[
            _member(machine, member, now)
            for role in (Role.SHARD, Role.STANDBY, Role.WORKER)
            for member in machine.members.of(role)
        ],
        waiting_for=describe_wait(machine, waits),
        waits=[_wait(wait) for wait in waits],
        checkpoint=newest.state.version if newest is not None else -1,
        tokens_per_s=speed.tokens_per_s,
        step_s=speed.seconds.get("step_seconds"),
        compute_s=speed.seconds.get("compute_seconds"),
        push_s=speed.seconds.get("push_seconds"),
        pull_s=speed.seconds.get("pull_seconds"),
        wait_s=speed.seconds.get("wait_seconds"),
        left_s=speed.left_s(machine.config.training.end - machine.state.version),
        contributions=machine.history.contributions,
        slots=machine.config.batch.micro_batches_per_step,
        up_s=now + machine.away_s - machine.started_at,
        coordinator=myself,
        run_dir=str(machine.config.run_dir),
    )
    if newest is not None and newest.created_at is not None:
        answer.checkpoint_age_s = max(0.0, wall_now - newest.created_at)
    return answer


def _member(machine: Machine, member: MemberState, now: float) -> pb.MemberStatus:
    spent = machine.steps.spent.get(member.rank) if member.role is Role.WORKER else None
    return pb.MemberStatus(
        member=member_message(member),
        live=member.live,
        last_seen_s=max(0.0, now - member.last_seen),
        doing=member.doing,
        transport=member.transport,
        since_s=max(0.0, now - member.since),
        state=_state(member),
        in_sync=member.role is Role.STANDBY and machine.standbys.in_sync(member.rank) == member.incarnation,
        restarts=machine.members.restarts(member.role, member.rank),
        last=pb.Contributed(
            step=spent.step,
            contribution=spent.contribution,
            compute_s=spent.compute_s,
            push_s=spent.push_s,
            pull_s=spent.pull_s,
            wait_s=spent.wait_s,
        )
        if spent is not None
        else None,
    )


def _state(member: MemberState) -> str:
    if member.live:
        return "live"
    return "lost" if member.met and (member.ready or not member.connected) else "starting"


def _wait(wait: Wait) -> pb.Wait:
    rank = wait.rank if wait.rank is not None else -1
    return pb.Wait(role=str(wait.role), rank=rank, what=wait.what, since_s=wait.since_s, last_seen_s=wait.last_seen_s)


def member_message(member: MemberState) -> common_pb2.Member:
    return common_pb2.Member(
        role=str(member.role),
        rank=member.rank,
        incarnation=member.incarnation,
        pid=member.pid,
        host=member.host,
        address=member.address,
        metrics_address=member.metrics_address,
    )
