"""Who is there: leases, incarnations, and who counts as live. Time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps.errors import MismatchError
from ps.types import Role


@dataclass
class MemberState:
    """One process, in one life of it."""

    role: Role
    rank: int
    incarnation: int
    pid: int = 0
    host: str = ""
    address: str = ""
    metrics_address: str = ""
    #: The same for all members on one machine; empty: not known.
    machine: str = ""
    connected: bool = False
    #: Has been connected in this life.
    met: bool = False
    #: May take part: a shard once its kernels are compiled, a worker once its model and data are known to be the run's.
    ready: bool = False
    #: Counted as live: work is dealt to it, and its state is relied on.
    live: bool = False
    #: This life of it, or an earlier one, has been live.
    served: bool = False
    last_seen: float = 0.0
    doing: str = ""
    #: How a worker's payloads travel: "shm", "grpc", "shm+grpc"; empty: not known.
    transport: str = ""
    #: When it became live or, when it is not, was lost or registered.
    since: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.role} {self.rank}"


@dataclass
class Members:
    """The shards and workers of a run."""

    lease_s: float
    grace_s: float
    num_shards: int
    _members: dict[tuple[Role, int], MemberState] = field(default_factory=dict)
    #: Lives that another one has taken the place of.
    _replaced: set[tuple[Role, int, int]] = field(default_factory=set)

    def place(self, role: Role, rank: int, incarnation: int, now: float) -> int:
        """Confirm a rank, or give the lowest free one for -1.

        Raises:
            MismatchError: a shard's index is not one of the run's.
        """
        if role is Role.SHARD and not 0 <= rank < self.num_shards:
            raise MismatchError(f"shard {rank}: this run has shards 0..{self.num_shards - 1} (cluster.shards)")
        if rank >= 0:
            return rank
        for member in self.of(role):
            if member.incarnation == incarnation:
                return member.rank
        taken = {member.rank for member in self.of(role) if self._holds_rank(member, now)}
        return next(candidate for candidate in range(len(taken) + 1) if candidate not in taken)

    def _holds_rank(self, member: MemberState, now: float) -> bool:
        """Whether it is there, or has just registered and is about to connect."""
        return member.live or member.connected or (not member.met and now - member.last_seen <= self.lease_s)

    def admit(self, member: MemberState, now: float) -> MemberState | None:
        """Take a member in; returns the earlier life that it replaces, if any.

        Raises:
            MismatchError: another life has replaced this one: the two would throw each other out for ever.
        """
        key = (member.role, member.rank)
        if (*key, member.incarnation) in self._replaced:
            raise MismatchError(f"{member.name} was replaced by a newer life of it")
        before = self._members.get(key)
        if before is not None and before.incarnation == member.incarnation:
            before.last_seen = now
            return None
        if before is not None:
            self._replaced.add((*key, before.incarnation))
            member.served = before.served
        member.last_seen = member.since = now
        self._members[key] = member
        return before

    def restarts(self, role: Role, rank: int) -> int:
        """Earlier lives of a member."""
        return sum((role, rank) == key[:2] for key in self._replaced)

    def find(self, role: Role, rank: int, incarnation: int) -> MemberState | None:
        """The member, if it is still in this life."""
        member = self._members.get((role, rank))
        return member if member is not None and member.incarnation == incarnation else None

    def get(self, role: Role, rank: int) -> MemberState | None:
        return self._members.get((role, rank))

    def of(self, role: Role) -> list[MemberState]:
        return sorted((m for m in self._members.values() if m.role is role), key=lambda m: m.rank)

    def live_workers(self) -> list[int]:
        return [member.rank for member in self.of(Role.WORKER) if member.live]

    def shards_beside(self, rank: int) -> int:
        """Count the shards on the machine of a shard, that one included."""
        shards = self.of(Role.SHARD)
        machine = next((shard.machine for shard in shards if shard.rank == rank), "")
        return max(1, sum(shard.machine == machine for shard in shards)) if machine else 1

    def missing_shards(self) -> list[int]:
        present = {member.rank for member in self.of(Role.SHARD) if member.live}
        return [index for index in range(self.num_shards) if index not in present]

    def expire(self, now: float) -> list[MemberState]:
        """Find the members whose stream has been broken, or who have been silent, for too long."""
        expired = []
        for member in self._members.values():
            limit = self.lease_s if member.connected else self.grace_s
            if member.live and now - member.last_seen > limit:
                member.live = False
                member.since = now
                expired.append(member)
        return expired
