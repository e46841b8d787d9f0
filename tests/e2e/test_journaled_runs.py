"""durability=journal in real processes: whichever shards are killed, the run never goes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ps.storage import newest, version_of
from ps.storage.journal_files import read
from tests.support import kneading
from tests.support.cluster import Finished
from tests.support.eventually import eventually
from windlass.testing import LocalCluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

STEPS = 40
#: Checkpoints are written when the journal asks for one: every 8 steps or so.
JOB = (
    *kneading.JOB,
    f"training.steps={STEPS}",
    "checkpoint.every_steps=0",
    "durability=journal",
    "journal.max_bytes=2_000_000",
    "membership.lease_s=60",
)
DECIDED = ("precision.wire=fp16",)
#: Updated chunk by chunk, before the decision.
EAGER = ("precision.wire=fp32", "optimizer.clip_norm=0")

ONE = (("shard", 0),)
BOTH = (*ONE, ("shard", 1))
#: The worker is the test.
EVERYBODY = (*BOTH, ("coordinator", 0))
#: Who is killed at which step, all before any is started again; once more behind a checkpoint of the journal's.
DEATHS = {4: ONE, 7: BOTH, 10: EVERYBODY, 26: ONE, 29: BOTH, 32: EVERYBODY}


@pytest.mark.parametrize("kind", [DECIDED, EAGER], ids=["decided", "eager"])
def test_killed_shards_lose_no_step(tmp_path: Path, kind: Sequence[str]) -> None:
    deaths = dict(DEATHS)
    with LocalCluster(*JOB, *kind, shards=2, run_dir=tmp_path / "run") as cluster:

        def kill(step: int) -> None:
            roles = deaths.pop(step, ())
            if step > 20 and roles:
                found = eventually(lambda: newest(cluster.job.checkpoint_dir), 60.0, "a checkpoint")
                assert version_of(found), "the journal has asked for one behind the first"
            for role in roles:
                cluster.kill(*role, restart=False)
            for role in roles:
                cluster.start(*role)

        assert kneading.work(cluster.address, kill) == kneading.ended(STEPS)
        cluster.wait(60.0)
    assert not deaths
    assert Finished(cluster.job).digest() == kneading.digest(cluster.job, STEPS)
    rollbacks = [record["version"] for record in read(tmp_path / "run" / "journal") if record["type"] == "rollback"]
    assert rollbacks == [0], "the beginning, and none behind it"
