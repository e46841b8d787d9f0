"""Who starts when the run is over hears of it from a coordinator that stays."""

from __future__ import annotations

import threading

import pytest

from ps.client.grpc_transport import GrpcTransport
from ps.config import RunConfig, from_json
from ps.coordinator.app import CoordinatorApp
from ps.coordinator.run import Phase
from ps.shard.app import ShardApp
from tests.multiprocess.conftest import MakeJob
from tests.support import cluster
from tests.support.eventually import eventually
from workers.engine.app import join
from workers.launch.folder import RunFolder

pytestmark = pytest.mark.multiprocess

LISTEN = "127.0.0.1:0"


def test_a_worker_that_comes_after_the_end_ends_well(make_job: MakeJob) -> None:
    job = make_job("run", "training.steps=2", "cluster.shards=1", "cluster.workers=1")
    cluster.train(job)
    RunFolder(job.run_dir).cluster.unlink()
    text = job.model_dump_json()
    # The run is complete: its shard loads the last checkpoint, and the run ends without any worker.
    coordinator = CoordinatorApp(from_json(RunConfig, text), text, LISTEN, linger_s=60.0)
    codes: list[int] = []
    there = threading.Thread(target=lambda: codes.append(coordinator.run()), daemon=True)
    there.start()
    try:
        address = eventually(RunFolder(job.run_dir).members, 10.0, "the coordinator's address")[0]["address"]
        assert ShardApp(address, 0, LISTEN, None).run(30.0) == 0
        assert coordinator._machine.phase is Phase.ENDED
        assert join(address, None, None, GrpcTransport(), 30.0).run() == "finished: 2 steps"
        assert there.is_alive()
    finally:
        # Whoever asks it to stop need not wait.
        coordinator.stop("asked to stop")
        there.join(15.0)
    assert codes == [0]
