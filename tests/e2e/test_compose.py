"""`docker compose up`: TLS between roles, more workers on the way, deaths from outside, the end, and nothing left."""

from __future__ import annotations

import json
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.composed import Project, project
from tests.support.eventually import eventually

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("WINDLASS_DOCKER") != "1", reason="needs an engine; see make e2e-compose"),
]

STEPS = 1000
RUN = "default"
#: A model of 315,584 parameters; a step takes some 100 ms on two cores.
JOB = (
    f"training.steps={STEPS}",
    "model.num_layers=1",
    "model.hidden_size=64",
    "data.vocab_size=1024",
    "data.sequence_length=64",
    "checkpoint.every_steps=40",
    "evaluation.every_steps=0",
    "evaluation.max_sequences=16",
)
ROLES = ("coordinator", "shard-0", "shard-1", "worker")
BUILD_S, START_S = 1200.0, 180.0


@pytest.fixture
def overrides() -> tuple[str, ...]:
    return ()


@pytest.fixture
def cluster(overrides: tuple[str, ...]) -> Iterator[Project]:
    # Port 0: any that is free.
    environment = {"WINDLASS_OVERRIDES": " ".join((*JOB, *overrides)), "PROMETHEUS_PORT": "0"}
    with project(["compose.yaml", "test.yaml"], environment) as made:
        made("build", "--quiet", timeout_s=BUILD_S)
        yield made


def prometheus(cluster: Project, query: str) -> list[dict[str, Any]]:
    address = cluster("port", "prometheus", "9090").strip()
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def restarted(cluster: Project, service: str, index: int = 1) -> bool:
    container = cluster.container(service, index)
    return container["RestartCount"] == 1 and container["State"]["Running"]


def test_a_cluster_in_containers_trains_through_deaths_and_leaves_nothing(cluster: Project) -> None:
    cluster("up", "--detach", timeout_s=START_S)
    cluster.wait_for_step(RUN, 45, START_S)

    # More workers join the run that is under way.
    cluster("up", "--detach", "--no-recreate", "--scale", "worker=3", timeout_s=START_S)
    eventually(lambda: cluster.said("coordinator", "worker 2 is there"), START_S, "the third worker")
    up = 'count(up{job="windlass"} == 1) == 6'
    eventually(lambda: prometheus(cluster, up), START_S, "Prometheus to see all six roles")

    cluster.kill("worker", 2)
    eventually(lambda: restarted(cluster, "worker", 2), START_S, "the worker's container to be started again")
    cluster.kill("shard-1")
    eventually(lambda: restarted(cluster, "shard-1"), START_S, "the shard's container to be started again")
    recovered = "made to serve again: shard 1 started anew"
    eventually(lambda: cluster.said("coordinator", recovered), START_S, "the recovery")

    # Who has no certificate is not let in.
    plain = ("run", "--rm", "--no-deps", "--env", "WINDLASS_CERTIFICATES=", "tools", "health")
    with pytest.raises(AssertionError, match="windlass: error: asking coordinator:7000 for its health"):
        cluster("--profile", "tools", *plain, "coordinator:7000")
    assert "serves" in cluster("--profile", "tools", "run", "--rm", "--no-deps", "tools", "health", "shard-0:7000")

    members = [(role, 1) for role in ROLES] + [("worker", 2), ("worker", 3)]

    def ended() -> bool:
        return not any(cluster.container(*member)["State"]["Running"] for member in members)

    eventually(ended, 600.0, "the end of the training")
    codes = {member: cluster.container(*member)["State"]["ExitCode"] for member in members}
    assert set(codes.values()) == {0}, codes
    assert cluster.container("prometheus")["State"]["Running"]

    steps = [record for record in cluster.records(RUN) if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(STEPS))
    assert steps[-1]["loss"] < 0.85 * steps[0]["loss"]
    sample = cluster(
        "--profile", "tools", "run", "--rm", "--no-deps", "tools", "sample", f"/runs/{RUN}", "--tokens", "20"
    )
    assert sample.strip()

    cluster("--profile", "*", "down", "--volumes", timeout_s=START_S)
    assert cluster.left() == ""


@pytest.mark.parametrize("overrides", [("cluster.standbys=1",)])
def test_a_standby_in_a_container_takes_over_and_no_step_is_lost(cluster: Project) -> None:
    cluster("--profile", "standbys", "up", "--detach", timeout_s=START_S)
    cluster.wait_for_step(RUN, 20, START_S)
    # Which of the two containers of a shard serves is decided when they start.
    pair = ("shard-1", "standby-1")
    eventually(lambda: cluster.said("coordinator", "standby 1 holds the same as shard 1"), START_S, "the standby")
    (serving,) = [service for service in pair if not cluster.said(service, "standby 1 holds version")]
    cluster.kill(serving)
    eventually(lambda: cluster.said("coordinator", "standby 1 takes over as shard 1"), START_S, "the takeover")
    eventually(lambda: restarted(cluster, serving), START_S, "the shard's container to be started again")
    eventually(lambda: cluster.said(serving, "standby 1 holds version"), START_S, "it to stand by")
    assert not cluster.said("coordinator", "going back to a checkpoint")
    cluster("--profile", "*", "down", "--volumes", timeout_s=START_S)
    assert cluster.left() == ""
