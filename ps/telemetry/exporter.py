"""The Prometheus port of a role: every sample says whose it is.

A target's address alone says little, and in a container it is all that DNS discovery knows. So the role
itself puts `run`, `role` and `rank` on everything that it exports, and Prometheus keeps them
(`honor_labels`). Before a role knows its run it exports nothing: a series without a run would be another one.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, disable_created_metrics, start_http_server
from prometheus_client.registry import REGISTRY, Collector

from ps.errors import StartupError

_identity: dict[str, str] = {}


def identify(run: str, role: str, rank: int) -> None:
    """Say whose metrics this process exports, from now on.

    Args:
        run: the run's name (`RunConfig.run_name`).
        role: what the process is.
        rank: its number.

    Concurrency: thread-safe; the last one stands.
    """
    global _identity
    _identity = {"run": run, "role": role, "rank": str(rank)}


class Identified(Collector):
    """A registry's metrics with the process's identity as labels on each sample."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        identity = _identity
        if not identity:
            return
        for metric in self._registry.collect():
            labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            # A label that a metric has itself stands.
            labelled.samples = [sample._replace(labels={**identity, **sample.labels}) for sample in metric.samples]
            yield labelled


def serve_metrics(listen: str) -> int:
    """Serve metrics on host:port (port 0: any) and return the port.

    Raises:
        StartupError: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    # A gauge with the time of creation, next to each counter and histogram: nobody asks for it.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Identified(REGISTRY))
    try:
        server, _thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {listen}: {error.strerror}") from None
    return int(server.server_port)
