"""Who is there: ranks, lives, leases."""

from __future__ import annotations

import pytest

from ps.coordinator.members import Members, MemberState
from ps.errors import MismatchError
from ps.types import Role

LEASE_S, GRACE_S = 10.0, 0.3


@pytest.fixture
def members() -> Members:
    return Members(LEASE_S, GRACE_S, num_shards=2)


def worker(rank: int, life: int) -> MemberState:
    return MemberState(Role.WORKER, rank, life)


def join(members: Members, role: Role, rank: int, life: int, now: float = 0.0) -> MemberState:
    member = MemberState(role, rank, life)
    assert members.admit(member, now) is None
    member.connected = member.met = member.live = True
    return member


def test_the_same_life_again_is_the_same_member(members: Members) -> None:
    first = worker(0, 11)
    assert members.admit(first, 1.0) is None
    assert members.admit(worker(0, 11), 5.0) is None
    assert members.find(Role.WORKER, 0, 11) is first
    assert first.last_seen == 5.0


def test_a_new_life_replaces_the_old_one(members: Members) -> None:
    first, second = worker(0, 11), worker(0, 12)
    members.admit(first, 1.0)
    assert members.admit(second, 2.0) is first
    assert members.find(Role.WORKER, 0, 11) is None
    assert members.get(Role.WORKER, 0) is second


def test_roles_do_not_share_ranks(members: Members) -> None:
    shard, other = join(members, Role.SHARD, 0, 5), join(members, Role.WORKER, 0, 5)
    assert members.get(Role.SHARD, 0) is shard
    assert members.get(Role.WORKER, 0) is other
    assert [m.name for m in members.of(Role.SHARD)] == ["shard 0"]


def test_a_shard_has_its_own_index(members: Members) -> None:
    assert members.place(Role.SHARD, 1, 5, 0.0) == 1
    for index in (-1, 2, 7):
        with pytest.raises(MismatchError, match=f"shard {index}"):
            members.place(Role.SHARD, index, 5, 0.0)


def test_a_worker_may_name_its_rank_or_get_the_lowest(members: Members) -> None:
    assert members.place(Role.WORKER, 9, 5, 0.0) == 9
    for rank in (0, 1, 3):
        join(members, Role.WORKER, rank, 20 + rank)
    assert members.place(Role.WORKER, -1, 5, 0.0) == 2
    # Asked twice, a life has one rank.
    assert members.place(Role.WORKER, -1, 23, 0.0) == 3
    dead = members.get(Role.WORKER, 1)
    assert dead is not None
    dead.live = dead.connected = False
    assert members.place(Role.WORKER, -1, 6, 0.0) == 1


def test_a_rank_is_taken_before_its_worker_is_connected(members: Members) -> None:
    members.admit(worker(members.place(Role.WORKER, -1, 5, 0.0), 5), 0.0)
    assert members.place(Role.WORKER, -1, 6, 1.0) == 1
    assert members.place(Role.WORKER, -1, 6, LEASE_S + 1.0) == 0


def test_who_is_live(members: Members) -> None:
    assert members.missing_shards() == [0, 1]
    shard = join(members, Role.SHARD, 1, 5)
    for rank in (2, 0):
        join(members, Role.WORKER, rank, rank)
    assert members.missing_shards() == [0]
    assert members.live_workers() == [0, 2]
    shard.live = False
    assert members.missing_shards() == [0, 1]


def test_leases_and_grace(members: Members) -> None:
    silent, broken = join(members, Role.WORKER, 0, 1), join(members, Role.WORKER, 1, 2)
    broken.connected = False
    assert members.expire(GRACE_S) == []
    assert members.expire(GRACE_S + 0.01) == [broken]
    assert not broken.live
    # Once.
    assert members.expire(GRACE_S + 0.02) == []
    assert members.expire(LEASE_S) == []
    assert members.expire(LEASE_S + 0.01) == [silent]
