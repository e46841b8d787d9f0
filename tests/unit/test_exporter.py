"""Whose metrics a port serves: every sample has run, role and rank, and before there is a run there is none."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from ps.coordinator import metrics as coordinator_metrics
from ps.errors import Refusal, StartupError
from ps.shard import metrics as shard_metrics
from ps.telemetry import exporter
from ps.telemetry import metrics as common_metrics
from ps.telemetry.exporter import Identified, identify, serve_metrics
from ps.telemetry.metrics import MAX_PEERS, RECEIVED_BYTES, SENT_BYTES, LinkBytes, peer
from ps.types import Role
from workers.engine import metrics as worker_metrics

DOCUMENTED = Path("docs/metrics.md")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not said who it is; other tests' words come back afterwards."""
    monkeypatch.setattr(exporter, "_identity", {})


def test_every_sample_says_whose_it_is() -> None:
    registry = CollectorRegistry()
    Gauge("plain", "", registry=registry).set(3)
    Counter("labelled", "", ["peer"], registry=registry).labels("shard-1").inc(4)
    Histogram("timed", "", registry=registry, buckets=(1.0,)).observe(0.5)
    identify("a", Role.WORKER, 7)
    samples = [sample for metric in Identified(registry).collect() for sample in metric.samples]
    assert all({"run": "a", "role": "worker", "rank": "7"}.items() <= sample.labels.items() for sample in samples)
    values = {(sample.name, sample.labels.get("peer"), sample.labels.get("le")): sample.value for sample in samples}
    assert values[("plain", None, None)] == 3
    assert values[("labelled_total", "shard-1", None)] == 4
    assert values[("timed_bucket", None, "1.0")] == 1


def test_a_later_word_stands_and_a_metric_keeps_its_own_label() -> None:
    registry = CollectorRegistry()
    Gauge("mine", "", ["rank"], registry=registry).labels("own").set(1)
    identify("a", Role.WORKER, 7)
    identify("b", Role.SHARD, 1)
    ((sample,),) = (metric.samples for metric in Identified(registry).collect())
    assert sample.labels == {"run": "b", "role": "shard", "rank": "own"}


def test_before_there_is_a_run_nothing_is_exported() -> None:
    port = serve_metrics("127.0.0.1:0")

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
            return str(answer.read().decode())

    assert scrape().strip() == ""
    identify("a", Role.SHARD, 0)
    lines = [line for line in scrape().splitlines() if not line.startswith("#")]
    assert any(line.startswith("process_resident_memory_bytes{") for line in lines)
    assert all('run="a"' in line for line in lines)
    assert not any("_created{" in line for line in lines)


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartupError, match=f"cannot serve metrics on {address}"):
            serve_metrics(address)


def test_ranks_from_messages_cannot_make_series_without_end() -> None:
    assert peer(Role.WORKER, 3) == "worker-3"
    assert {peer(Role.WORKER, rank) for rank in (-1, MAX_PEERS, 1 << 60)} == {"worker-other"}
    link = LinkBytes(Role.SHARD, 77)
    link.sent.inc(5)
    link.received.inc(6)
    assert SENT_BYTES.labels("shard-77")._value.get() == 5
    assert RECEIVED_BYTES.labels("shard-77")._value.get() == 6


def test_every_refusal_counts_from_zero() -> None:
    codes = {sample.labels["code"] for metric in shard_metrics.REFUSED_FRAMES.collect() for sample in metric.samples}
    assert {refusal.code for refusal in Refusal.__subclasses__()} <= codes


def test_the_documented_metrics_are_the_ones_that_are_exported() -> None:
    modules = (common_metrics, coordinator_metrics, shard_metrics, worker_metrics)
    collectors = {
        value for module in modules for value in vars(module).values() if isinstance(value, MetricWrapperBase)
    }
    families = [family for collector in collectors for family in collector.describe()]
    suffixes = {"counter": "_total", "info": "_info"}
    exported = {family.name + suffixes.get(family.type, "") for family in families}
    table = [line for line in DOCUMENTED.read_text().splitlines() if line.startswith("| `windlass_")]
    documented = {name for line in table for name in re.findall(r"`(windlass_\w+)", line.split("|")[1])}
    assert documented == exported
    assert len(exported) > 30


def test_an_ipv6_address_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    identify("run", Role.SHARD, 0)
    port = serve_metrics("[::1]:0")
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200
