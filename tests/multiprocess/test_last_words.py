"""What a worker says last is heard, and a health watch costs no thread."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import windlass
from ps import failpoints
from ps.wire import session
from ps.wire.health import Health
from ps.wire.options import bind, make_server, open_channel
from tests.support import kneading
from tests.support.eventually import eventually
from windlass.testing import LocalCluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


def test_a_client_that_is_closed_has_left_and_was_not_lost(tmp_path: Path) -> None:
    """A clean end must not look like a death to whoever watches the cluster."""
    start = {"w": np.zeros(8, np.float32)}
    with LocalCluster("cluster.shards=1", "training.steps=100000", run_dir=tmp_path / "run") as cluster:
        for _ in range(4):
            with windlass.Client.connect(cluster.address, start) as client:
                assert client.wait(30.0) is not None
        log = tmp_path / "run" / "logs" / "coordinator-0.log"
        eventually(lambda: log.read_text().count("left") >= 4, 10.0, "four workers to leave")
        assert "broke its connection" not in log.read_text()


def test_who_comes_back_late_hears_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that died in the last step has little left to do when it is back."""
    monkeypatch.setenv(failpoints.VARIABLE, f"coordinator/record.after~step:kill@{kneading.STEPS}")
    # The rest of the run takes less.
    monkeypatch.setattr(session, "BACKOFF_S", (1.5,))
    with LocalCluster(*kneading.JOB, shards=2, run_dir=tmp_path / "run") as cluster:
        assert kneading.work(cluster.address) == kneading.ended()
        cluster.wait(60.0)


def test_watching_health_takes_no_thread() -> None:
    """Otherwise whoever may only ask could stop a role from answering anybody."""
    server = make_server(2)
    health = Health(server, "windlass.ps.v1.Coordinator")
    port = bind(server, "127.0.0.1:0")
    server.start()
    try:
        health.serving()
        with open_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="")
            watches = [stub.Watch(request) for _ in range(4)]
            for watch in watches:
                next(watch)
            try:
                assert stub.Check(request, timeout=5.0).status == health_pb2.HealthCheckResponse.SERVING
            finally:
                for watch in watches:
                    watch.cancel()
    except grpc.RpcError as error:
        raise AssertionError("the server has no thread left") from error
    finally:
        server.stop(None).wait(5.0)
