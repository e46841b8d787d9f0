"""A pytest plugin: the fixture `windlass_cluster`. Imports nothing of Windlass before a test asks for a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from workers.launch.local_cluster import LocalCluster

_CLUSTERS: pytest.StashKey[list[LocalCluster]] = pytest.StashKey()


@pytest.fixture
def windlass_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """Start clusters of real processes, gone at the test's end: `windlass_cluster("training.steps=20", shards=2)`.

    The arguments are those of `windlass.testing.LocalCluster`; the run folders lie in `tmp_path`. When the test
    fails, the ends of all logs are a section of its report.
    """
    from workers.launch.local_cluster import LocalCluster

    made = request.node.stash.setdefault(_CLUSTERS, [])
    with ExitStack() as stack:

        def start(*overrides: str, **arguments: Any) -> LocalCluster:
            arguments.setdefault("run_dir", tmp_path / f"windlass-{len(made)}")
            cluster = LocalCluster(*overrides, **arguments)
            made.append(cluster)
            return stack.enter_context(cluster)

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of a failed test's clusters."""
    report = yield
    if report.failed and report.when == "call":
        for cluster in item.stash.get(_CLUSTERS, []):
            report.sections.append((f"windlass cluster in {cluster.run_dir}", cluster.logs()))
    return report
