"""What goes wrong in a run besides its weather, and when: drawn from the seed before the run begins."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ps.storage import layout
from ps.types import Role
from tests.simulation.cluster import Cluster, Seat, gradient_logs, journal_folder

#: The first messages of a run, until it has a checkpoint: there it has the least to go back to.
START = 120

#: So many of the faults come in the company of another one: a recovery that is interrupted is another recovery.
TOGETHER = 0.3

Strike = Callable[[Cluster, random.Random], str]


@dataclass(frozen=True)
class Fault:
    """One fault; it strikes with the n-th message."""

    message: int
    kind: str
    strike: Strike


def _one(cluster: Cluster, rng: random.Random, *roles: Role) -> Seat | None:
    there = [seat for seat in cluster.of(*roles) if seat.process is not None]
    return rng.choice(there) if there else None


def _kill(*roles: Role) -> Strike:
    def strike(cluster: Cluster, rng: random.Random) -> str:
        seat = _one(cluster, rng, *roles)
        if seat is None:
            return ""
        cluster.kill(seat)
        return f"SIGKILL {seat.name}"

    return strike


def _kill_all(cluster: Cluster, _rng: random.Random) -> str:
    for seat in cluster.seats:
        cluster.kill(seat)
    return "SIGKILL everything"


def _power(cluster: Cluster, rng: random.Random) -> str:
    """The coordinator's host loses power, maybe with everything else."""
    all_of_them = rng.random() < 0.3
    cluster.watch.disk_failed = True
    for seat in cluster.seats if all_of_them else cluster.of(Role.COORDINATOR):
        cluster.kill(seat)
        cluster.end_stale(seat)
    lost = cluster.disk.lose_power(journal_folder(cluster.config))
    if all_of_them:
        logs = [max(folder.glob("from-*.log"), default=None) for folder in gradient_logs(cluster.config)]
        torn = sum(cluster.disk.tear(log) for log in logs if log is not None)
        return f"the power fails everywhere; {lost} bytes of the journal are lost, and {torn} of the shards'"
    return f"the power fails; {lost} bytes of the journal are lost"


def stop(seconds: float, role: Role) -> Strike:
    """SIGSTOP, and SIGCONT after so long."""

    def strike(cluster: Cluster, rng: random.Random) -> str:
        seat = _one(cluster, rng, role)
        return _stopped(cluster, seat, seconds) if seat is not None else ""

    return strike


def _stopped(cluster: Cluster, seat: Seat, seconds: float) -> str:
    assert seat.process is not None, "only who is there is stopped"
    cluster.scheduler.pause(seat.process)
    cluster.scheduler.after(seconds, cluster.scheduler.resume, seat.process)
    return f"SIGSTOP {seat.name} for {seconds:.3f} s"


def _pause(cluster: Cluster, rng: random.Random) -> str:
    seat = _one(cluster, rng, *Role)
    return _stopped(cluster, seat, rng.choice((0.01, 0.2, 1.0, 5.0)) * rng.random()) if seat is not None else ""


def _pause_and_kill(cluster: Cluster, rng: random.Random) -> str:
    """What the coordinator says last waits in the buffers of a member that hears its successor, too."""
    seat = _one(cluster, rng, Role.SHARD, Role.STANDBY, Role.WORKER)
    if seat is None or seat.process is None:
        return ""
    later_s, seconds = rng.random() * 0.03, 0.5 + rng.random()
    cluster.scheduler.pause(seat.process)
    cluster.scheduler.after(seconds, cluster.scheduler.resume, seat.process)
    cluster.scheduler.after(later_s, cluster.kill, cluster.of(Role.COORDINATOR)[0])
    return f"SIGSTOP {seat.name} for {seconds:.3f} s, SIGKILL coordinator-0 {later_s:.3f} s later"


def _replace(cluster: Cluster, rng: random.Random) -> str:
    seat = _one(cluster, rng, *Role)
    if seat is None:
        return ""
    cluster.watch.disk_failed |= seat.role is Role.SHARD
    cluster.replace(seat, rng.choice((0.05, 0.5, 3.0)) * rng.random())
    return f"a second {seat.name}"


def _part(cluster: Cluster, rng: random.Random) -> str:
    there = [seat.process for seat in cluster.seats if seat.process is not None]
    if len(there) < 2:
        return ""
    one, other = rng.sample(there, 2)
    seconds, cut = rng.choice((0.02, 0.4, 3.0)) * rng.random(), rng.random() < 0.5
    cluster.network.part(one, other, seconds, cut)
    return f"{one} and {other} are {'cut off' if cut else 'apart'} for {seconds:.3f} s"


def _cut_off(cluster: Cluster, rng: random.Random) -> str:
    """A host hears of nobody, for about as long as a broken connection may be broken."""
    seat = _one(cluster, rng, *Role)
    if seat is None or seat.process is None:
        return ""
    seconds = rng.choice((0.25, 0.25, 3.0)) * rng.random()
    for other in cluster.seats:
        if other is not seat and other.process is not None:
            cluster.network.part(seat.process, other.process, seconds, True)
    return f"{seat.name} is cut off from all for {seconds:.3f} s"


def _break(cluster: Cluster, rng: random.Random) -> str:
    seat = _one(cluster, rng, *Role)
    if seat is None or seat.process is None:
        return ""
    cluster.network.break_some(seat.process)
    return f"a connection of {seat.name} breaks"


def _slow_disk(cluster: Cluster, rng: random.Random) -> str:
    cluster.disk.slow_until = cluster.scheduler.now + rng.random() * 2.0
    cluster.disk.slow_s = rng.choice((0.02, 0.2, 1.0))
    return "the disk is slow"


def _full_disk(cluster: Cluster, rng: random.Random) -> str:
    cluster.watch.disk_failed = True
    cluster.disk.full_until = cluster.scheduler.now + rng.random() * 0.5
    return "the disk is full"


def _damage(cluster: Cluster, rng: random.Random) -> str:
    """A bit of the newest checkpoint flips, where there is an older one that is whole."""
    found = [folder for folder in layout.checkpoints(cluster.config.checkpoint_dir) if folder in cluster.watch.complete]
    if len(found) < 2:
        return ""
    file = rng.choice(sorted(found[-1].glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[-1 - rng.randrange(1000)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    cluster.watch.damaged(found[-1])
    return f"{found[-1].name}/{file.name} is damaged"


def _resume_otherwise(cluster: Cluster, rng: random.Random) -> str:
    """Everything dies, and is started again with another durability, with or without standbys, eager or not."""
    cluster.watch.disk_failed = True
    for seat in cluster.seats:
        cluster.kill(seat)
        cluster.end_stale(seat)
    standbys = rng.choice((0, 1)) if cluster.of(Role.STANDBY) else 0
    durability, eager = rng.choice(("checkpoint", "journal")), rng.random() < 0.5
    cluster.change_job(standbys, durability, eager)
    return f"SIGKILL everything; it goes on with {standbys=}, {durability=}, {eager=}"


def _leave(cluster: Cluster, rng: random.Random) -> str:
    seat = _one(cluster, rng, Role.WORKER)
    if seat is None or seat.process is None or seat.worker is None:
        return ""
    cluster.scheduler.spawn(seat.process, "signal", seat.worker.leave)
    return f"SIGTERM {seat.name}"


def _join(cluster: Cluster, _rng: random.Random) -> str:
    if len(cluster.of(Role.WORKER)) >= cluster.config.cluster.workers + 2:
        return ""
    cluster.add_worker()
    return "one more worker"


_KINDS: tuple[tuple[str, float, Strike], ...] = (
    ("kill a worker", 3.0, _kill(Role.WORKER)),
    ("kill a shard", 2.5, _kill(Role.SHARD, Role.STANDBY)),
    ("kill the coordinator", 3.0, _kill(Role.COORDINATOR)),
    ("kill all", 0.5, _kill_all),
    ("power", 0.7, _power),
    ("pause", 4.0, _pause),
    ("pause and kill", 3.0, _pause_and_kill),
    ("replace", 1.5, _replace),
    ("part", 4.0, _part),
    ("cut off", 1.5, _cut_off),
    ("break", 4.0, _break),
    ("slow disk", 1.0, _slow_disk),
    ("full disk", 0.7, _full_disk),
    ("damage", 0.7, _damage),
    ("resume otherwise", 0.7, _resume_otherwise),
    ("leave", 1.0, _leave),
    ("join", 1.0, _join),
)


def deaths(rng: random.Random, messages: int, count: int, *roles: Role) -> list[Fault]:
    """So many processes of these roles die, one soon after the other."""
    return [Fault(place, "kill", _kill(*roles)) for place in sorted(rng.sample(range(1, messages), count))]


def draw(rng: random.Random, messages: int, least: int = 5, most: int = 10) -> list[Fault]:
    """Draw the faults of a run, in order.

    Args:
        messages: that a run without faults takes.
        least, most: so many.
    """
    count = rng.randint(least, most)
    kinds = rng.choices(_KINDS, [weight for _, weight, _ in _KINDS], k=count)
    places: list[int] = []
    for _ in range(count):
        if places and rng.random() < TOGETHER:
            places.append(rng.choice(places) + rng.randrange(1, 12))
        else:
            places.append(rng.randrange(1, START if rng.random() < 0.2 else messages))
    places.sort()
    return [Fault(place, kind, strike) for place, (kind, _, strike) in zip(places, kinds, strict=True)]
