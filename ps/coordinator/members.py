"""Who is there: leases, incarnations, and who counts as live. Time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps.errors import MismatchError, PeerUnavailable
from ps.types import Role

#: A shard whose stream has been broken for so long is given up where it has standbys, in seconds.
TAKEOVER_GRACE_S = 0.1


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
    #: Each shard has a seat for a standby.
    has_standbys: bool = False
    #: The life that each shard had when the coordinator ended, and until when that one may come back.
    expected: dict[int, int] = field(default_factory=dict)
    expected_until: float = 0.0
    #: Until then whoever has lost its connection may come back: the coordinator was not there to hold it.
    patient_until: float = 0.0
    _members: dict[tuple[Role, int], MemberState] = field(default_factory=dict)
    #: Lives that another one has taken the place of.
    _replaced: set[tuple[Role, int, int]] = field(default_factory=set)
    #: Those that have registered for a seat that somebody holds, by seat and life: in this order.
    _arriving: dict[tuple[Role, int], dict[int, MemberState]] = field(default_factory=dict)

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

    def seat(self, shard: int, life: int, in_sync: int, now: float) -> Role:
        """Which of a shard's two seats one of its processes takes: the shard's own, or its standby's.

        Args:
            in_sync: the life of the standby that holds the same as the shard; 0: none does.

        Raises:
            MismatchError: both seats are taken, or another process has taken this one's.
            PeerUnavailable: not known yet; ask again.
        """
        if not self.has_standbys:
            return Role.SHARD
        shown = f"shard {shard}"
        if any((role, shard, life) in self._replaced for role in (Role.SHARD, Role.STANDBY)):
            raise MismatchError(f"{shown} was replaced by a newer life of it")
        primary, standby = self.get(Role.SHARD, shard), self.get(Role.STANDBY, shard)
        for role, member in ((Role.SHARD, primary), (Role.STANDBY, standby)):
            if member is not None and member.incarnation == life:
                return role
        if life == in_sync:
            return Role.STANDBY
        if primary is None:
            expected = self.expected.get(shard, 0)
            has_heir = standby is not None and standby.live and standby.incarnation == in_sync
            if life == expected or (not has_heir and (not expected or now >= self.expected_until)):
                return Role.SHARD
        elif not self._holds_rank(primary, now) and (standby is None or standby.incarnation != in_sync):
            return Role.SHARD
        if standby is not None and self._holds_rank(standby, now):
            if primary is not None and primary.connected and standby.connected:
                raise MismatchError(f"{shown} and its standby are there already")
            raise PeerUnavailable(f"{shown} may be about to come back, or its standby to take over: try again")
        return Role.STANDBY

    def promote(self, shard: int) -> MemberState:
        """A shard's standby is the shard from now on; the life that it replaces cannot come back."""
        member = self._members.pop((Role.STANDBY, shard))
        before = self._members.get((Role.SHARD, shard))
        if before is not None:
            self._replaced.add((Role.SHARD, shard, before.incarnation))
        elif self.expected.get(shard):
            self._replaced.add((Role.SHARD, shard, self.expected[shard]))
        member.role = Role.SHARD
        self._members[Role.SHARD, shard] = member
        return member

    def remove(self, member: MemberState) -> None:
        """A member is not wanted any more, and this life of it cannot come back."""
        self._replaced.add((member.role, member.rank, member.incarnation))
        self._members.pop((member.role, member.rank), None)

    def _holds_rank(self, member: MemberState, now: float) -> bool:
        """Whether it is there, or has just registered and is about to connect."""
        return member.live or member.connected or (not member.met and now - member.last_seen <= self.lease_s)

    def queue_up(self, member: MemberState, now: float) -> bool:
        """Have a life that registers connect before it gets its seat, if somebody holds it; returns whether it has to.

        A registration alone may be the last word of a process that is dead, and late: it must not throw out the next
        life of that process, which has registered before it is heard.

        Raises:
            MismatchError: see `admit`.
        """
        key = self._not_replaced(member)
        before = self._members.get(key)
        if before is None or before.incarnation == member.incarnation or not self._holds_rank(before, now):
            return False
        self._arriving.setdefault(key, {}).setdefault(member.incarnation, member).last_seen = now
        return True

    def heirs(self, now: float) -> list[MemberState]:
        """Those that have registered for a seat that nobody holds any more."""
        found = []
        for key, arriving in self._arriving.items():
            before = self._members.get(key)
            recent = (member for member in arriving.values() if now - member.last_seen <= self.lease_s)
            first = next(recent, None)
            if first is not None and (before is None or not self._holds_rank(before, now)):
                found.append(first)
        return found

    def admit(self, member: MemberState, now: float) -> MemberState | None:
        """Take a member in; returns the earlier life that it replaces, if any.

        Raises:
            MismatchError: another life has replaced this one: the two would throw each other out for ever.
        """
        key = self._not_replaced(member)
        arriving = self._arriving.get(key, {})
        while member.incarnation in arriving:
            # Those that registered before it are too late.
            life = next(iter(arriving))
            del arriving[life]
            if life != member.incarnation:
                self._replaced.add((*key, life))
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

    def _not_replaced(self, member: MemberState) -> tuple[Role, int]:
        key = (member.role, member.rank)
        if (*key, member.incarnation) in self._replaced:
            raise MismatchError(f"{member.name} was replaced by a newer life of it")
        return key

    def restarts(self, role: Role, rank: int) -> int:
        """Earlier lives of a member."""
        return sum((role, rank) == key[:2] for key in self._replaced)

    def find(self, role: Role, rank: int, incarnation: int) -> MemberState | None:
        """The member, if it is still in this life, or is about to connect in it."""
        seats = (Role.SHARD, Role.STANDBY) if role is Role.SHARD else (role,)
        for seat in seats:
            member = self._members.get((seat, rank))
            if member is not None and member.incarnation == incarnation:
                return member
        arriving = (self._arriving.get((seat, rank), {}).get(incarnation) for seat in seats)
        return next((member for member in arriving if member is not None), None)

    def get(self, role: Role, rank: int) -> MemberState | None:
        return self._members.get((role, rank))

    def of(self, role: Role) -> list[MemberState]:
        return sorted((m for m in self._members.values() if m.role is role), key=lambda m: m.rank)

    def live_workers(self) -> list[int]:
        return [member.rank for member in self.of(Role.WORKER) if member.live]

    def shards_beside(self, rank: int) -> int:
        """Count the shards and standbys on the machine of a shard, that one included."""
        shards = [*self.of(Role.SHARD), *self.of(Role.STANDBY)]
        machine = next((shard.machine for shard in shards if shard.rank == rank), "")
        return max(1, sum(shard.machine == machine for shard in shards)) if machine else 1

    def missing_shards(self) -> list[int]:
        present = {member.rank for member in self.of(Role.SHARD) if member.live}
        return [index for index in range(self.num_shards) if index not in present]

    def _grace_s(self, member: MemberState) -> float:
        """How long a broken stream may be broken: not as long where somebody stands ready."""
        if member.role is not Role.SHARD or not self.has_standbys:
            return self.grace_s
        return min(self.grace_s, TAKEOVER_GRACE_S)

    def expire(self, now: float) -> list[MemberState]:
        """Find the members whose stream has been broken, or who have been silent, for too long."""
        expired = []
        for member in self._members.values():
            limit = self.lease_s if member.connected else self._grace_s(member)
            may_return = not member.connected and now < self.patient_until
            if member.live and not may_return and now - member.last_seen > limit:
                member.live = False
                member.since = now
                expired.append(member)
        return expired
