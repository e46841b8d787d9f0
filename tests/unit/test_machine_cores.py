"""The cores that a process may use, and how many of them a shard's kernels take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protos.ps.v1 import shard_pb2
from ps import machine
from ps.coordinator.members import Members, MemberState
from ps.shard import engine
from ps.shard.seat import Seat
from ps.shard.service import ShardHost
from ps.shard.threads import MAX_THREADS, kernel_threads
from ps.types import Role
from ps.wire.proto import to_proto
from tests.support.shards import FENCE, TABLE, make_config


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000", 2), ("5000 100000", 1)],
)
def test_a_quota_counts_as_whole_cores(text: str, cores: int | None) -> None:
    assert machine.cores_of_quota(text) == cores


def test_a_process_has_the_cores_of_its_affinity_and_its_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_MAX", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))
    assert machine.available_cores() == 6
    quota.write_text("max 100000\n")
    assert machine.available_cores() == 6
    quota.write_text("400000 100000\n")
    assert machine.available_cores() == 4
    quota.write_text("3200000 100000\n")
    assert machine.available_cores() == 6


def test_a_machine_has_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.machine_name() == machine.machine_name() != ""
    monkeypatch.setattr(machine, "BOOT_ID", tmp_path / "none")
    assert machine.machine_name() != ""


@pytest.mark.parametrize(
    ("cores", "shards", "chunks", "threads"),
    [
        (1, 1, 100, 1),
        (2, 1, 100, 2),
        (2, 2, 100, 1),
        # More shards than cores.
        (2, 5, 100, 1),
        (16, 3, 100, 5),
        # A chunk is one thread's work.
        (16, 3, 2, 2),
        (96, 1, 100, MAX_THREADS),
    ],
)
def test_shards_of_one_machine_share_its_cores(cores: int, shards: int, chunks: int, threads: int) -> None:
    assert kernel_threads(None, cores, shards, chunks) == threads


def test_threads_that_are_asked_for_are_given() -> None:
    assert kernel_threads(5, cores=1, shards_on_machine=4, chunks=1) == 5


def test_shards_are_counted_by_machine() -> None:
    members = Members(lease_s=10, grace_s=0.3, num_shards=4)
    for rank, name in enumerate(("a", "b", "a", "")):
        members.admit(MemberState(Role.SHARD, rank, 1, machine=name), 0.0)
    members.admit(MemberState(Role.WORKER, 0, 1, machine="a"), 0.0)
    assert [members.shards_beside(rank) for rank in range(4)] == [2, 1, 2, 1]


@pytest.mark.parametrize(("shards_here", "threads"), [(0, 2), (1, 2), (4, 1)])
def test_the_coordinator_tells_a_shard_who_shares_its_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards_here: int, threads: int
) -> None:
    monkeypatch.setattr(engine, "available_cores", lambda: 4)
    seats: list[Seat] = []
    config = make_config(tmp_path, cluster={"shards": 1, "threads_per_shard": "auto"})
    ShardHost(0, 7, seats.append).configure(
        shard_pb2.ConfigureRequest(
            action=shard_pb2.ConfigureRequest.INSPECT,
            fence=to_proto(FENCE),
            run="run",
            shard=0,
            num_shards=1,
            table=TABLE.packed(),
            job=config.model_dump_json(),
            contributions=2,
            shards_on_machine=shards_here,
        )
    )
    (made,) = seats
    made.engine.close()
    assert len(made.engine.chunks) == 2
    assert made.engine.kernels.threads == threads
