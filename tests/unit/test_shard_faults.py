"""A shard, and a worker's way to it, where something goes wrong at a bad moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps.client.links import Inbox, Lost, Received, ShardLinks
from ps.errors import DecisionRejected
from ps.shard.service import ShardHost
from ps.storage.layout import prepare, retain, version_of
from ps.storage.manifest import write_manifest
from ps.storage.shard_file import ShardFile
from ps.types import Fence
from ps.wire import frame
from ps.wire.messages import Ack
from tests.support.checkpoints import make_arrays, make_manifest, make_table, write_checkpoint
from tests.support.eventually import eventually
from tests.support.shards import TIMEOUT_S, make_config, rig


def test_what_is_loaded_counts_once_it_is_served(tmp_path: Path) -> None:
    """Until then the coordinator may die, and take the shard for one that only missed the last decision."""
    with rig(make_config(tmp_path)) as shard:
        engine = shard.engine
        host = ShardHost(0, 1, lambda _: None)
        shard.config.checkpoint_dir.mkdir(parents=True)
        folder = prepare(shard.config.checkpoint_dir, 1)
        shard.run_step(snapshot=True)
        _, file = shard.told.snapshots.get(timeout=TIMEOUT_S)
        assert isinstance(file, ShardFile)
        manifest = make_manifest(engine.plan, [file], 1, ("exp_avg", "exp_avg_sq"))
        sha256 = write_manifest(folder, manifest)
        decision = shard.decision(shard.push_step())
        fence = Fence(1, 2)
        shard.seat.load(fence, folder, sha256)
        found = host._report(engine)
        assert (found.has_state, found.version) == (False, 1)
        with pytest.raises(DecisionRejected, match="0 of 2 chunks reduced"):
            engine.decide(replace(decision, fence=fence))
        shard.seat.serve(fence, 1, 1, manifest.scaler.scale)
        found = host._report(engine)
        assert (found.has_state, found.version) == (True, 1)
        shard.fence = fence
        assert shard.run_step().step == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_rollback_has_passed_does_not_push_out_what_is_written_now(tmp_path: Path, keep: int) -> None:
    """Damaged checkpoints have manifests and files of the right size; they are the newest, and cannot be loaded."""
    table = make_table([100])
    for version in (10, 20, 30, 40):
        write_checkpoint(tmp_path, table, 1, make_arrays(table, []), version)
    # 30 and 40 could not be loaded; the run went back to 20, and has just written 25.
    write_checkpoint(tmp_path, table, 1, make_arrays(table, []), 25)
    being_written = prepare(tmp_path, 26)
    retain(tmp_path, keep, 25)
    left = sorted(version_of(folder) or 0 for folder in tmp_path.iterdir())
    assert left == [*(20, 25)[-keep:], 26, 30, 40]
    assert being_written.is_dir()


class _Moving:
    """A transport whose connections can be told to say something late."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, Any, Any]] = []
        self.closed: list[str] = []

    def connect(self, address: str, on_frame: Any, on_close: Any) -> Any:
        self.opened.append((address, on_frame, on_close))
        moving = self

        class Connection:
            def send(self, _frame: bytes, _timeout_s: float) -> bool:
                return True

            def close(self) -> None:
                moving.closed.append(address)
                on_close("closed on this side")

        return Connection()


def test_the_last_words_of_a_stream_to_an_old_address_do_not_end_the_new_one() -> None:
    """Each shard that moved cost a stream that nobody closed, and with it two threads of the shard."""
    transport, inbox = _Moving(), Inbox()
    links = ShardLinks(transport, inbox, 0, 7)
    links.open("run", "plan", Fence(1, 1), ["old:1"])
    _, say, _ = transport.opened[0]
    links.open("run", "plan", Fence(1, 2), ["new:1"])
    assert transport.closed == ["old:1"]
    say(frame.encode(Ack(0, 0, -1).pack()))
    assert inbox.get(0.0) is None
    links.lost(Lost(0, "too late", 1))
    assert transport.closed == ["old:1"]
    assert links.tick() > 0.5, "nothing is to be opened again"
    # The new stream's words are heard.
    transport.opened[1][1](frame.encode(Ack(0, 0, -1).pack()))
    event = inbox.get(0.0)
    assert isinstance(event, Received)
    assert [address for address, _, _ in transport.opened] == ["old:1", "new:1"]
    links.close()
    assert transport.closed == ["old:1", "new:1"]


def test_a_frame_that_is_none_ends_its_stream_and_a_new_one_is_opened() -> None:
    """It was dropped and nothing else: whatever it had acknowledged or carried never came again."""
    transport, inbox = _Moving(), Inbox()
    links = ShardLinks(transport, inbox, 0, 7)
    links.open("run", "plan", Fence(1, 1), ["a:1"])
    transport.opened[0][1](b"no frame")
    assert transport.closed == ["a:1"]
    event = inbox.get(0.0)
    assert isinstance(event, Lost)
    links.lost(event)
    eventually(lambda: links.tick() > 0 and len(transport.opened) == 2, TIMEOUT_S, "a new stream")
    links.close()
