"""`windlass train ... trace.steps=2:4`: real processes, one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import windlass
from tests.support.launched import launched, tiny_job, train
from tests.support.timeline import Trace
from windlass.testing import LocalCluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

JOB = ("training.steps=6", "batch.contributions_per_step=1")
ROLES = {"coordinator", "shard 0", "shard 1", "worker 0", "worker 1"}


def test_a_job_is_traced_and_has_the_same_digest(tmp_path: Path) -> None:
    # Who comes late finds these few steps done.
    common = ("training.steps=8", "membership.min_workers=2", "membership.duplicate_late=false")
    traced = train(tmp_path, "traced", *common, "trace.steps=2:4")
    plain = train(tmp_path, "plain", *common)
    assert traced.digest() == plain.digest()
    file = traced.run_dir / "trace.json"
    assert f"trace       {file}\n" in traced.output()
    assert "trace       " not in plain.output()
    trace = Trace.read(file)
    assert trace.processes == ROLES
    assert {event.step for event in trace.events} == {2, 3}
    assert trace.tangled() == []
    labels = [e["args"]["labels"] for e in json.loads(file.read_text())["traceEvents"] if e["name"] == "process_labels"]
    assert len({label.split()[1] for label in labels}) == len(ROLES)
    # One host has one clock: nothing is estimated.
    assert not [label for label in labels if "clock within" in label]
    for step in (2, 3):
        (decide,) = trace.of("coordinator", "decide", step)
        (whole,) = trace.of("coordinator", f"step {step}")
        applies = trace.of("shard", "apply", step)
        assert max(event.end for event in trace.of("shard", "reduce", step)) <= decide.start
        assert decide.start <= applies[0].start
        assert max(event.end for event in applies) <= whole.end
    applied = max(event.end for event in trace.of("shard", "apply", 2))
    assert applied < min(event.end for event in trace.of("worker", "compute", 3))


def test_whoever_is_killed_takes_its_part_along_and_nobody_elses(tmp_path: Path) -> None:
    arguments = tiny_job(tmp_path, "killed", "training.steps=200", "trace.steps=20:120")
    with launched("train", tmp_path / "killed", arguments) as run:
        run.wait_for_step(60)
        run.kill("worker", 1)
        assert run.finish() == 0, run.output()
    trace = Trace.read(run.run_dir / "trace.json")
    assert trace.processes >= ROLES - {"worker 1"}
    assert {event.step for event in trace.of("shard", "apply")} == set(range(20, 120))
    assert {event.step for event in trace.of("worker 0", "decode")} == set(range(20, 120))
    assert trace.tangled() == []


def test_a_worker_without_torch_is_traced_too(tmp_path: Path) -> None:
    with LocalCluster(*JOB, "trace.steps=1:3", run_dir=tmp_path / "run") as cluster:
        with windlass.Client.connect(cluster.address, {"w": np.zeros(100, np.float32)}) as client:
            for work in client:
                client.push(work, {"w": np.ones(100, np.float32)}, 1.0)
        cluster.wait(60.0)
    trace = Trace.read(tmp_path / "run" / "trace.json")
    assert trace.processes == {"coordinator", "shard 0", "worker 0"}
    assert [event.step for event in trace.of("worker", "compute")] == [1, 2]
    assert [event.step for event in trace.of("worker", "decode")] == [1, 2]
    assert trace.tangled() == []
