"""For the tests of those who build on Windlass: a real cluster for a `with` block. See docs/testing.md."""

from __future__ import annotations

from workers.launch.local_cluster import LocalCluster

__all__ = ["LocalCluster"]
