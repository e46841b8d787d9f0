"""SIGKILL at each failpoint, in every role that has it: the digest is that of a run that nothing happened to.

Many kills in one job: what is started again is killed somewhere else.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ps import failpoints
from ps.storage.journal_files import read
from tests.support import endless, kneading
from windlass.testing import LocalCluster
from workers.launch.metrics import Tail

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

#: Chunks are updated and published before their step is decided.
EAGER = ("precision.wire=fp32", "optimizer.clip_norm=0")
#: What is said is queued; whoever dies a moment later has said it.
SAID = "kill=0.05"

#: One after the other, in lives of the same process.
COORDINATOR = (
    "rename.before~journal/term-*:kill@1",
    "rename.after~journal/term-*:kill@1",
    "journal.append.before~run:kill",
    "journal.append.before~epoch:kill",
    "journal.append.after~epoch:kill",
    "journal.append.before~decision:kill@3",
    "journal.append.after~decision:kill@3",
    # The first of two shards: it alone has heard of the step.
    "decision.before:kill@5",
    f"decision.after:{SAID}@5",
    "record.before~step:kill@3",
    "record.after~step:kill@3",
    "journal.append.before~applied:kill@3",
    "manifest.before:kill@1",
    "manifest.after:kill@1",
    "rename.before~*/manifest.json:kill@1",
    "rename.after~*/manifest.json:kill@1",
    "journal.append.before~checkpoint:kill@1",
    "remove.before:kill@1",
    "remove.after:kill@1",
)
#: Taken in turns by two shards, so that both die now and then.
SHARD = (
    "load.before:kill@1",
    "load.after:kill@1",
    "acknowledge.before:kill@9",
    f"acknowledge.after:{SAID}@9",
    "prepare.before:kill@5",
    f"prepare.after:{SAID}@5",
    "decision.before:kill@5",
    "decision.after:kill@5",
    "apply.before:kill@5",
    "apply.after:kill@5",
    "publish.before:kill@5",
    "publish.after:kill@5",
    "applied.before:kill@5",
    f"applied.after:{SAID}@5",
    "write.before:kill@5",
    "write.after:kill@5",
    "fsync.before:kill@2",
    "fsync.after:kill@2",
    "rename.before:kill@2",
    "rename.after:kill@2",
)
EAGER_SHARD = ("apply.before:kill@5", "apply.after:kill@5", "publish.before:kill@5", "publish.after:kill@5")
#: With durability=journal. What a life leaves behind is read by the next one.
JOURNALED_SHARD = (
    "log.begin.before:kill@1",
    "log.begin.after:kill@2",
    "log.append.before~base:kill@1",
    "log.append.after~base:kill@1",
    "log.append.before~reduced:kill@4",
    "log.append.after~reduced:kill@4",
    "log.read.before:kill@1",
    "log.append.before~decided:kill@4",
    "log.read.after:kill@1",
    "log.append.after~decided:kill@4",
    "log.remove.before:kill@1",
    "log.remove.after:kill@1",
)
#: With cluster.standbys=1. It is always the one that stands by who dies.
STANDBY = (
    "follow.before:kill@1",
    "follow.after:kill@1",
    "state.before:kill@1",
    "state.after:kill@2",
    "reduced.before:kill@3",
    "reduced.after:kill@3",
    "cover.before:kill@3",
    f"cover.after:{SAID}@3",
    "decision.before:kill@9",
    "apply.after:kill@5",
    "applied.before:kill@5",
)
#: The shard dies, then the one that took over from it, then the one that took over from that one.
SUCCESSION = (
    "mirror.before:kill@4",
    f"mirror.after:{SAID}@4",
    "prepare.before~covered:kill@3",
    f"prepare.after~covered:{SAID}@3",
)
#: Whoever takes over dies of it.
HEIRS = ("promote.before:kill", "promote.after:kill")
WORKER = ("push.before:kill@7", "push.after:kill@7", "contributed.before:kill@3", f"contributed.after:{SAID}@3")


def chain(who: str, points: Iterable[str], life: int = 1) -> list[str]:
    """A kill in each life of a process, from this one on."""
    return [f"{who}/{point}#{number}" for number, point in enumerate(points, life)]


ALONE = chain("coordinator", COORDINATOR)
IN_TURNS = chain("shard-0", SHARD[0::2]) + chain("shard-1", SHARD[1::2])
#: All at once: the coordinator and both shards, then twice both shards.
TOGETHER = [
    "coordinator/journal.append.after~decision:kill@4",
    *chain("shard", ["prepare.after:kill=0.2@4", "prepare.after:kill@4", "publish.before:kill@4"]),
]
JOURNALED = chain("shard-1", JOURNALED_SHARD)
STANDING_BY = chain("standby-0", STANDBY)
TAKING_OVER = chain("shard-1", SUCCESSION)
EXTINCTION = chain("shard-1", ["mirror.after:kill@4"] * len(HEIRS)) + chain("standby-1", HEIRS)


def kill_at(points: Sequence[str], run_dir: Path, *overrides: str, deaths: int = 0) -> dict[str, Counter[str]]:
    """Run the job with these failpoints, until all have died who shall; nothing of that is to be seen in its result.

    Args:
        deaths: so many follow from the failpoints; 0: one from each.

    Returns:
        By process: how often something happened at each failpoint.
    """
    hits = Hits(run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, ",".join(points))
        endless.run(run_dir, *overrides, until=lambda _: hits.total() >= (deaths or len(points)))
    hits.total()
    return hits.by_process()


class Hits:
    """What has happened at the failpoints, by the processes' logs, which are read on."""

    def __init__(self, run_dir: Path) -> None:
        self._logs = run_dir / "logs"
        self._tails: dict[str, Tail] = {}
        self._hits: dict[str, Counter[str]] = {}

    def total(self) -> int:
        for log in self._logs.glob("*-*.log"):
            tail = self._tails.setdefault(log.stem, Tail(log))
            said = [str(record.get("message", "")) for record in tail.poll()[1]]
            hits = self._hits.setdefault(log.stem, Counter())
            hits.update(text.split()[1] for text in said if text.startswith("failpoint "))
        return sum(hits.total() for hits in self._hits.values())

    def by_process(self) -> dict[str, Counter[str]]:
        return {process: hits for process, hits in self._hits.items() if hits}


def names(points: Iterable[str]) -> Counter[str]:
    """The failpoints in a list of what shall happen."""
    return Counter(re.match(r"(?:[a-z]+(?:-\d+)?/)?([a-z.]+)[~:]", point)[1] for point in points)


def rollbacks(run_dir: Path) -> list[int]:
    """The versions to which a run went back; the first is its beginning."""
    return [record["version"] for record in read(run_dir / "journal") if record["type"] == "rollback"]


def test_every_point_is_in_one_of_the_lists() -> None:
    everywhere = (ALONE, IN_TURNS, TOGETHER, JOURNALED, STANDING_BY, TAKING_OVER, EXTINCTION, WORKER)
    assert set().union(*map(names, everywhere)) == failpoints.NAMES


def test_a_coordinator_that_is_killed_at_each_point_changes_nothing(tmp_path: Path) -> None:
    assert kill_at(ALONE, tmp_path / "run") == {"coordinator-0": names(COORDINATOR)}
    assert rollbacks(tmp_path / "run") == [0]


def test_nor_do_shards(tmp_path: Path) -> None:
    hits = kill_at(IN_TURNS, tmp_path / "run")
    assert hits == {"shard-0": names(SHARD[0::2]), "shard-1": names(SHARD[1::2])}


def test_nor_several_at_once(tmp_path: Path) -> None:
    both = names(TOGETHER[1:])
    hits = kill_at(TOGETHER, tmp_path / "run", deaths=1 + 2 * len(TOGETHER[1:]))
    assert hits == {"coordinator-0": names(TOGETHER[:1]), "shard-0": both, "shard-1": both}


def test_nor_where_steps_are_eager(tmp_path: Path) -> None:
    hits = kill_at(chain("shard-1", EAGER_SHARD), tmp_path / "run", *EAGER)
    assert hits == {"shard-1": names(EAGER_SHARD)}


def test_a_shard_with_a_journal_loses_no_step(tmp_path: Path) -> None:
    assert kill_at(JOURNALED, tmp_path / "run", "durability=journal") == {"shard-1": names(JOURNALED_SHARD)}
    # The first one dies before its initial values are in a journal.
    assert rollbacks(tmp_path / "run") == [0, 0]


def test_a_standby_that_is_killed_at_each_point_changes_nothing(tmp_path: Path) -> None:
    # Which of the two processes of a shard serves is decided when they start.
    (hits,) = kill_at(STANDING_BY, tmp_path / "run", "cluster.standbys=1").values()
    assert hits == names(STANDBY)
    assert rollbacks(tmp_path / "run") == [0]


def test_nor_does_a_shard_that_somebody_takes_over_from(tmp_path: Path) -> None:
    # Each of the two processes of this shard, in each of its lives.
    both = kill_at(TAKING_OVER, tmp_path / "run", "cluster.standbys=1", deaths=2 * len(SUCCESSION))
    assert both == {"shard-1": names(SUCCESSION), "standby-1": names(SUCCESSION)}
    assert rollbacks(tmp_path / "run") == [0]


def test_nor_does_one_that_dies_while_it_takes_over(tmp_path: Path) -> None:
    hits = kill_at(EXTINCTION, tmp_path / "run", "cluster.standbys=1")
    assert sum(hits.values(), Counter()) == names(EXTINCTION)


def test_a_worker_killed_at_each_point_changes_nothing(tmp_path: Path) -> None:
    with LocalCluster(*endless.JOB, shards=2, run_dir=tmp_path / "run") as cluster:
        for point in WORKER:
            killed = subprocess.run(
                [sys.executable, "-m", "tests.support.kneading", cluster.address],
                env={**os.environ, failpoints.VARIABLE: f"worker/{point}"},
                check=False,
                timeout=60,
            )
            assert killed.returncode == -signal.SIGKILL
        kneading.work(cluster.address, lambda _: endless.stop(cluster))
        cluster.wait(endless.BACK_S)
    endless.assert_unchanged(cluster)
