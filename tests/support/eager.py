"""A shard whose steps are eager, and what the coordinator tells it before it has heard a report."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.config import RunConfig
from ps.coordinator.decision import foregone
from ps.shard.exchange import Exchange
from ps.shard.store import Store
from ps.sharding import Chunk
from ps.types import Decision
from ps.wire.messages import Placed, Weights
from tests.support.eventually import eventually
from tests.support.shards import TIMEOUT_S, Rig, drain, encode_frame, make_config


def eager_config(
    run_dir: Path, wire: str = "bf16", optimizer: str = "adamw", clip_norm: float = 0.0, **sections: Any
) -> RunConfig:
    """A job of one shard that clips nothing."""
    config = make_config(run_dir, wire=wire, optimizer=optimizer, **sections)
    chosen: dict[str, Any] = {"clip_norm": clip_norm, "weight_decay": 0.1}
    if optimizer == "sgd":
        chosen |= {"momentum": 0.9, "nesterov": True}
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=chosen)})


def foregone_of(shard: Rig) -> Decision:
    """What the decision of the open step will do."""
    found = foregone(shard.config, shard.state, shard.fence)
    assert found is not None
    return found


def push_chunk(shard: Rig, chunk: Chunk, contributions: int | None = None, **changes: Any) -> None:
    """Push all contributions of a chunk, or so many."""
    for contribution in range(shard.contributions if contributions is None else contributions):
        shard.engine.push(*shard.push(contribution, chunk, **changes))


def await_updated(shard: Rig, *chunks: Chunk) -> None:
    """Wait until these chunks are published in the version that the open step makes."""
    version = shard.state.version + 1

    def are_updated() -> bool:
        with shard.engine.lock:
            return all(shard.engine.store.published[chunk.index].version == version for chunk in chunks)

    eventually(are_updated, TIMEOUT_S, f"chunks {[chunk.index for chunk in chunks]} to be updated")


def updated(shard: Rig) -> set[int]:
    """The chunks that are published in the version that the open step makes."""
    with shard.engine.lock:
        store = shard.engine.store
        return {index for index, found in store.published.items() if found.version == shard.state.version + 1}


def pull(shard: Rig, stream: Exchange, version: int, applied: int = -1) -> dict[int, np.ndarray]:
    """Ask for a version; returns what can go of it now, by chunk, as copies of the wire's elements."""
    stream.receive(encode_frame(shard.pull(version, applied)))
    return drained(shard, stream)


def drained(shard: Rig, stream: Exchange) -> dict[int, np.ndarray]:
    """The weights that can go now, by chunk."""
    found = {}
    for header, payload in drain(stream):
        if isinstance(header, Weights):
            found[header.chunk] = np.frombuffer(payload, shard.dtype.numpy).copy()
        elif isinstance(header, Placed):
            found.update({index: read_place(shard, index, *where) for index, *where in header.chunks})
    return found


def read_place(shard: Rig, index: int, place: int, slot: int, sequence: int) -> np.ndarray:
    """The weights at a place of the shard's segment, as a worker of this host reads them."""
    segment = shard.engine.share()
    chunk = shard.engine.plan.chunks[index]
    weights = segment.array(shard.dtype.numpy, place, chunk.size).copy()
    assert segment.array(np.dtype(np.int64), 0, slot + 1)[slot] == sequence, "torn"
    return weights


class Held:
    """Keeps the update of one chunk from ending, or from beginning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chunk: Chunk) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        apply = Store.apply

        def held(store: Store, held_chunk: Chunk, *arguments: Any) -> Any:
            if held_chunk.index == chunk.index and not self._go.is_set():
                self.reached.set()
                assert self._go.wait(TIMEOUT_S)
            return apply(store, held_chunk, *arguments)

        monkeypatch.setattr(Store, "apply", held)

    def go(self) -> None:
        self._go.set()
