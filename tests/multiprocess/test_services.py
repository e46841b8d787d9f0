"""What a real cluster answers to people and tools: health, reflection, status, state, metrics."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.ps.v1 import coordinator_pb2, coordinator_pb2_grpc, shard_pb2, shard_pb2_grpc
from ps.wire import frame
from ps.wire.options import open_channel
from tests.support.eventually import eventually
from tests.support.launched import LaunchedRun, launched, tiny_job

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedRun]:
    folder = tmp_path_factory.mktemp("services")
    # No step begins before both workers are there.
    job = tiny_job(folder, "run", "training.steps=1000000", "membership.min_workers=2")
    with launched("train", folder / "run", job) as under_way:
        under_way.wait_for_step(3)
        yield under_way
        under_way.process.terminate()
        under_way.finish()


def address(run: LaunchedRun, role: str, key: str = "address") -> str:
    return str(next(member[key] for member in run.members() if member["role"] == role))


@pytest.mark.parametrize("role", ["coordinator", "shard", "worker"])
def test_every_role_says_that_it_serves_and_what(run: LaunchedRun, role: str) -> None:
    with open_channel(address(run, role)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def serves() -> bool:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10.0)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        eventually(serves, 30.0, f"the {role} to be SERVING")
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10.0)
        names = {service.name for service in next(answers).list_services_response.service}
    assert "grpc.health.v1.Health" in names
    if role != "worker":
        assert f"windlass.ps.v1.{role.capitalize()}" in names


def test_the_coordinator_tells_what_is_going_on(run: LaunchedRun) -> None:
    with open_channel(address(run, "coordinator")) as channel:
        status = coordinator_pb2_grpc.CoordinatorStub(channel).Status(coordinator_pb2.StatusRequest(), timeout=10.0)
    assert status.phase == "running"
    assert status.version >= 3
    assert [(m.member.role, m.member.rank, m.live) for m in status.members] == [
        ("shard", 0, True),
        ("shard", 1, True),
        ("worker", 0, True),
        ("worker", 1, True),
    ]
    assert status.checkpoint == 0
    assert MessageToDict(status)["lossScale"] == 65536.0


def test_a_shard_tells_its_state_and_gives_it_out(run: LaunchedRun) -> None:
    with open_channel(address(run, "shard")) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)
        status = stub.Status(shard_pb2.ShardStatusRequest(), timeout=10.0)
        assert status.phase == "serving"
        assert status.chunks >= 1
        assert status.state_hash != 0
        read = channel.unary_stream(
            "/windlass.ps.v1.Shard/Snapshot", request_serializer=shard_pb2.SnapshotRequest.SerializeToString
        )

        def whole() -> dict[str, np.ndarray] | None:
            """A running shard refuses to mix versions; between two steps it does not have to."""
            try:
                frames = [frame.decode(data) for data in read(shard_pb2.SnapshotRequest(), timeout=10.0)]
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return None
            assert len({header["version"] for header, _ in frames}) == 1
            return {header["array"]: np.frombuffer(payload, np.float32) for header, payload in frames}

        arrays = eventually(whole, 60.0, "a snapshot between two steps")
    assert arrays is not None
    assert set(arrays) == {"weights", "exp_avg", "exp_avg_sq"}
    assert np.any(arrays["weights"])
    assert np.all(arrays["exp_avg_sq"] >= 0)


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "coordinator",
            [
                'windlass_workers_live{rank="0",role="coordinator",run="run"} 2.0',
                'windlass_loss_scale{rank="0",role="coordinator",run="run"} 65536.0',
                'windlass_contributions_total{rank="0",role="coordinator",run="run",worker="worker-1"}',
            ],
        ),
        (
            "shard",
            [
                'windlass_received_bytes_total{peer="worker-0",rank="0",role="shard",run="run"}',
                "windlass_apply_seconds_count",
            ],
        ),
        (
            "worker",
            [
                'windlass_sent_bytes_total{peer="shard-1",rank="0",role="worker",run="run"}',
                "windlass_compute_seconds_sum",
            ],
        ),
    ],
)
def test_every_role_has_metrics(run: LaunchedRun, role: str, names: list[str]) -> None:
    with urllib.request.urlopen(f"http://{address(run, role, 'metrics_address')}/metrics", timeout=10.0) as answer:
        text = answer.read().decode()
    for name in names:
        assert name in text


def test_targets_for_prometheus_are_the_members(run: LaunchedRun) -> None:
    targets = json.loads((run.run_dir / "targets.json").read_text())
    found = {(entry["labels"]["role"], entry["labels"]["rank"], entry["targets"][0]) for entry in targets}
    assert found == {(m["role"], str(m["rank"]), m["metrics_address"]) for m in run.members()}


def test_documented_metrics_are_the_ones_there_are(run: LaunchedRun) -> None:
    documented = Path("docs/metrics.md").read_text()
    for role in ("coordinator", "shard", "worker"):
        with urllib.request.urlopen(f"http://{address(run, role, 'metrics_address')}/metrics", timeout=10.0) as answer:
            lines = answer.read().decode().splitlines()
        families = {line.split()[2] for line in lines if line.startswith("# TYPE windlass")}
        families = {name for name in families if not name.endswith("_created")}
        assert families
        for name in families:
            assert f"`{name}" in documented, f"{name} of the {role} is not in docs/metrics.md"
