"""`trace.steps`: one file with what all roles did, in one order of time, and a run that is the same for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ps.sharding import make_plan
from ps.telemetry import courier
from tests.multiprocess.conftest import MakeJob
from tests.support import cluster
from tests.support.cluster import Finished, train
from tests.support.timeline import Trace

JOB = (
    "training.steps=7",
    "cluster.shards=2",
    "cluster.workers=2",
    "batch.contributions_per_step=2",
    "trace.steps=2:4",
)


@pytest.fixture(scope="module")
def digest(text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same job without a trace."""
    run = tmp_path_factory.mktemp("untraced") / "run"
    finished = train(cluster.make_job(run, text, [*JOB, "trace.steps="]))
    assert not (run / "trace.json").exists()
    return finished.digest()


def read(run: Finished) -> Trace:
    trace = Trace.read(run.job.run_dir / "trace.json")
    assert trace.processes == {"coordinator", "shard 0", "shard 1", "worker 0", "worker 1"}
    assert {event.step for event in trace.events} == {2, 3}
    assert trace.tangled() == []
    return trace


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_all_roles_are_in_one_file_and_in_order(make_job: MakeJob, digest: str, transport: str) -> None:
    run = train(make_job("run", *JOB, f"launch.transport={transport}"))
    assert run.digest() == digest
    trace = read(run)
    chunks = len(make_plan(run.manifest().table, 2).chunks)
    for step in (2, 3):
        (whole,) = trace.of("coordinator", f"step {step}")
        (decide,) = trace.of("coordinator", "decide", step)
        assert whole.start <= decide.start < decide.end <= whole.end
        computes = trace.of("worker", "compute", step)
        assert {event.args["contribution"] for event in computes} == {0, 1}
        # Every chunk of every contribution, once; and every chunk at every worker.
        assert len(trace.of("worker", "encode", step)) == 2 * chunks
        assert len(trace.of("worker", "decode", step)) == 2 * chunks
        reduces, applies = trace.of("shard", "reduce", step), trace.of("shard", "apply", step)
        assert {event.args["chunk"] for event in reduces} == set(range(chunks))
        assert {event.args["chunk"] for event in applies} == set(range(chunks))
        # What is decided was reduced, what is reduced was pushed, and what is applied was decided.
        assert min(event.start for event in computes) < reduces[0].start
        assert max(event.end for event in reduces) <= decide.start
        assert decide.start <= min(event.start for event in applies)
        assert max(event.end for event in applies) <= whole.end
        for index in range(2):
            (waits,) = trace.of(f"shard {index}", "wait for the decision", step)
            assert decide.start <= waits.end <= whole.end
        for chunk in range(chunks):
            (applied,) = [event for event in applies if event.args["chunk"] == chunk]
            decoded = [event for event in trace.of("worker", "decode", step) if event.args["chunk"] == chunk]
            assert len(decoded) == 2
            assert applied.end <= min(event.start for event in decoded)
    # An update comes before what is computed with it ends.
    following = trace.of("worker", "compute", 3)
    assert max(event.end for event in trace.of("shard", "apply", 2)) < min(event.end for event in following)


def test_what_each_role_does_has_its_track_and_its_category(make_job: MakeJob) -> None:
    trace = read(train(make_job("run", *JOB)))
    assert {(event.process.split()[0], event.track, event.category) for event in trace.events} == {
        ("coordinator", "steps", "step"),
        ("coordinator", "steps", "wait"),
        ("coordinator", "steps", "decide"),
        ("shard", "kernel 0", "reduce"),
        ("shard", "kernel 0", "apply"),
        ("shard", "decision", "wait"),
        *(("shard", f"stream from worker {rank}", "push") for rank in range(2)),
        *(("shard", f"stream to worker {rank}", "pull") for rank in range(2)),
        ("worker", "compute", "compute"),
        ("worker", "compute", "wait"),
        ("worker", "pusher", "push"),
        *(("worker", f"stream to shard {index}", "pull") for index in range(2)),
    }
    compute = trace.of("worker 0", "compute", 2)[0]
    for part in (*trace.of("worker 0", "forward", 2), *trace.of("worker 0", "backward", 2)):
        assert compute.start <= part.start < part.end <= compute.end


def test_another_hosts_clock_is_estimated(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the members believe to be elsewhere; what is estimated is then known to be nothing."""
    monkeypatch.setattr(courier, "clock_name", lambda: "elsewhere")
    run = train(make_job("run", *JOB))
    trace = read(run)
    assert "clock within" in (run.job.run_dir / "trace.json").read_text()
    assert trace.of("shard", "apply", 3)


def test_a_run_that_ends_in_the_traced_steps_has_a_timeline(make_job: MakeJob) -> None:
    run = train(make_job("run", *JOB, "training.steps=4", "trace.steps=3:9"))
    trace = Trace.read(run.job.run_dir / "trace.json")
    assert trace.processes == {"coordinator", "shard 0", "shard 1", "worker 0", "worker 1"}
    assert {event.step for event in trace.events} == {3}
    assert trace.of("shard", "apply", 3)
    assert trace.tangled() == []


def test_the_next_part_of_a_run_may_be_traced(make_job: MakeJob) -> None:
    """Its earlier steps are over, and what was traced of them stays where nothing new is."""
    first = train(make_job("run", *JOB, "training.stop_at=5"))
    before = (first.job.run_dir / "trace.json").read_text()
    train(make_job("run", *JOB))
    assert (first.job.run_dir / "trace.json").read_text() == before
