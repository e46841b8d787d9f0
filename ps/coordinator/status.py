"""What is going on, as the Status call tells it."""

from __future__ import annotations

import math

from protos.ps.v1 import common_pb2
from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase
from ps.types import Role
from ps.wire.proto import to_proto


def status(machine: Machine, now: float) -> pb.StatusResponse:
    """Describe the run for people and tools."""
    decision = machine.last_decision
    evaluations = machine.history.evaluations
    candidates = [candidate.state.version for candidate in machine.snapshots.candidates]
    return pb.StatusResponse(
        run=machine.history.run,
        fence=to_proto(machine.fence),
        phase="stopping" if machine.stop_reason and machine.phase is not Phase.ENDED else machine.phase.value,
        version=machine.state.version,
        applied=machine.state.applied,
        steps=machine.config.training.end,
        loss=decision.loss if decision else math.nan,
        evaluation_loss=evaluations[max(evaluations)]["loss"] if evaluations else math.nan,
        loss_scale=machine.state.scaler.scale,
        learning_rate=decision.groups[0].lr if decision else math.nan,
        gradient_norm=decision.gradient_norm if decision else math.nan,
        members=[_member(member, now) for role in (Role.SHARD, Role.WORKER) for member in machine.members.of(role)],
        waiting_for=machine.waiting_for(now),
        checkpoint=max(candidates, default=-1),
    )


def _member(member: MemberState, now: float) -> pb.MemberStatus:
    return pb.MemberStatus(
        member=member_message(member), live=member.live, last_seen_s=now - member.last_seen, doing=member.doing
    )


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
