"""Workers come and go while a run is under way, and it ends with the bits of a run in which nobody did."""

from __future__ import annotations

import logging

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator import metrics
from ps.coordinator.audit import audit
from ps.storage.journal_files import read
from tests.multiprocess.conftest import MakeJob
from tests.support.cluster import Workers, train
from tests.support.eventually import eventually

STEPS = 60
JOB = (f"training.steps={STEPS}", "batch.contributions_per_step=4", "cluster.shards=2")
TIMEOUT_S = 60.0


def is_live_worker(member: pb.MemberStatus) -> bool:
    return bool(member.member.role == "worker" and member.state == "live")


def test_one_worker_then_four_then_two_is_four_throughout(make_job: MakeJob) -> None:
    def come_and_go(workers: Workers) -> None:
        workers.hold_from(5)
        eventually(lambda: workers.status().version >= 5, TIMEOUT_S, "steps by one worker")
        workers.join(1, 2, 3)
        everybody = [0, 1, 2, 3]
        eventually(
            lambda: sorted(m.member.rank for m in workers.status().members if is_live_worker(m)) == everybody,
            TIMEOUT_S,
            "all four",
        )
        workers.hold_from(STEPS // 2)
        # Contributions are reported by those who computed them.
        eventually(
            lambda: sorted(m.member.rank for m in workers.status().members if m.HasField("last")) == everybody,
            TIMEOUT_S,
            "contributions of all four",
        )
        workers.leave(0)
        workers.leave(2)

    elastic = train(make_job("elastic", *JOB, "cluster.workers=1"), meanwhile=come_and_go)
    four = train(make_job("four", *JOB, "cluster.workers=4"))
    assert elastic.digest() == four.digest()
    found = audit(read(elastic.job.run_dir / "journal"))
    assert found.problems == []
    assert len(found.steps) == STEPS
    assert set(found.by_worker()) == {0, 1, 2, 3}
    by_step = [{rank for ranks in step.computed_by().values() for rank in ranks} for step in found.steps.values()]
    assert by_step[0] == {0}
    assert by_step[-1] <= {1, 3}
    assert any(len(ranks) == 4 for ranks in by_step)
    gone = [event.what for event in found.events if event.what.endswith(" left")]
    assert sorted(gone[:2]) == ["worker 0 left", "worker 2 left"]


def test_a_worker_that_is_slow_is_helped_and_leaves_what_somebody_else_has_finished(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    job = ("training.steps=8", *JOB[1:])
    before = metrics.DUPLICATED._value.get()
    with caplog.at_level(logging.INFO, "workers.engine.worker"):
        helped = train(make_job("helped", *job, "cluster.workers=2"), meanwhile=lambda workers: workers.hinder(1, 0.4))
    assert metrics.DUPLICATED._value.get() > before
    assert "left a contribution" in caplog.text
    assert helped.digest() == train(make_job("alone", *job, "cluster.workers=1")).digest()
    assert audit(read(helped.job.run_dir / "journal")).problems == []
