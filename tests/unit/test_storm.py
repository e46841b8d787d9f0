"""Streams break, frames are late, work is dealt twice and again, fences move, workers leave: the same bits come out.

With real threads, which meet in shared memory where those of a simulation (tests/simulation) take turns.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest

from ps.client import links
from ps.client.shared import Sharing
from ps.shard import metrics
from tests.support.storm import CALM, Storm, Weather

STEPS = 10
ROUGH = Weather(breaks=0.02, late=0.3, late_s=0.003, twice=0.3, again=0.05, fence=0.01, leave=0.005)

KINDS = {
    "shared memory": (Sharing.AUTO, False),
    "shared memory, eager": (Sharing.AUTO, True),
}


@functools.lru_cache
def calm(eager: bool) -> list[tuple[int, ...]]:
    """The states of the shards after each step of one worker to which nothing happens."""
    with tempfile.TemporaryDirectory() as folder, Storm(Path(folder), 0, CALM, workers=1, eager=eager) as storm:
        return storm.run(STEPS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_is_lost_in_a_storm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    sharing, eager = KINDS[kind]
    if sharing is not Sharing.NEVER and not hasattr(os, "memfd_create"):
        pytest.skip("needs Linux")
    monkeypatch.setattr(links, "BACKOFF_S", (0.001, 0.005, 0.01))
    conflicts = metrics.CONFLICTS._value.get()
    with Storm(tmp_path, seed, ROUGH, workers=2 + seed % 2, sharing=sharing, eager=eager) as storm:
        assert storm.run(STEPS) == calm(eager)
    assert storm.broken + storm.left + storm.fence.epoch > 5, "there was no storm"
    assert metrics.CONFLICTS._value.get() == conflicts, "a gradient that came again was another one"
