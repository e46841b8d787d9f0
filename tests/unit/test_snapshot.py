"""A snapshot holds exactly the state of its version, whatever is applied while it is written."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.errors import CheckpointWriteFailed, NotServing, PsError, StaleFence
from ps.shard import snapshot as module
from ps.storage.files import AtomicFile
from ps.storage.layout import checkpoint_folder, prepare
from ps.storage.shard_file import ShardFile, ShardFileReader, ShardFileWriter, chunk_name
from ps.types import Fence
from tests.support.plans import table_of_chunks
from tests.support.shards import FENCE, TIMEOUT_S, Rig, in_threads, make_config, rig

State = dict[str, np.ndarray]


def state_of(shard: Rig) -> State:
    """A copy of everything that a checkpoint holds, as it is now."""
    return {
        chunk_name(name, chunk.start): array.copy()
        for chunk in shard.chunks
        for name, array in shard.engine.store.arrays(chunk).items()
    }


def folder_of(shard: Rig, version: int) -> Path:
    return checkpoint_folder(shard.config.checkpoint_dir, version)


def make_folder(shard: Rig, version: int) -> None:
    """What the coordinator does before it tells the decision."""
    shard.config.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    prepare(shard.config.checkpoint_dir, version)


def written(shard: Rig) -> tuple[int, ShardFile]:
    """Wait for the next snapshot that ends, and succeeds."""
    target, result = shard.told.snapshots.get(timeout=TIMEOUT_S)
    assert isinstance(result, ShardFile), result
    return target.version, result


def failed(shard: Rig) -> CheckpointWriteFailed:
    _, result = shard.told.snapshots.get(timeout=TIMEOUT_S)
    assert isinstance(result, CheckpointWriteFailed), result
    return result


def assert_holds(path: Path, expected: State) -> None:
    reader = ShardFileReader(path)
    try:
        for name, array in expected.items():
            found = np.empty_like(array)
            reader.read(name, 0, found)
            np.testing.assert_array_equal(found, array, err_msg=name)
    finally:
        reader.close()


class Gate:
    """A disk that writes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.permits = threading.Semaphore(0)
        self.reached = threading.Event()
        gate = self

        class SlowWriter(ShardFileWriter):
            def write(self, name: str, values: Any) -> None:
                gate.reached.set()
                assert gate.permits.acquire(timeout=TIMEOUT_S)
                super().write(name, values)

        monkeypatch.setattr(module, "ShardFileWriter", SlowWriter)

    def open(self) -> None:
        self.permits.release(10_000)


def test_a_snapshot_is_of_its_version_while_others_are_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        expected = state_of(shard)
        assert gate.reached.wait(TIMEOUT_S)
        for _ in range(3):
            shard.run_step()
        assert shard.told.snapshots.empty()
        gate.open()
        version, file = written(shard)
        assert version == 1
        assert_holds(folder_of(shard, 1) / file.name, expected)
        now = state_of(shard)
        assert any((now[name] != expected[name]).any() for name in now)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("copy_bytes", [1, 256 << 20])
def test_snapshots_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, copy_bytes: int
) -> None:
    """One snapshot per step, on a disk that writes while the next ones are applied; copies are bounded or not."""
    monkeypatch.setattr(module, "MAX_COPY_BYTES", copy_bytes)
    gate = Gate(monkeypatch)
    config = make_config(tmp_path, threads=threads, batch={"micro_batches_per_step": 1})
    steps, chunks, arrays = 8, 4, 3
    with rig(config, 1, table=table_of_chunks(chunks)) as shard:
        states: dict[int, State] = {}

        def train() -> None:
            for _ in range(steps):
                make_folder(shard, shard.state.version + 1)
                shard.run_step(snapshot=True)
                states[shard.state.version] = state_of(shard)

        def disk() -> None:
            for _ in range(steps * chunks * arrays):
                gate.permits.release()
                gate.reached.wait(0.001)

        in_threads(train, disk)
        for _ in range(steps):
            version, file = written(shard)
            assert_holds(folder_of(shard, version) / file.name, states.pop(version))
        assert states == {}


def test_with_no_room_for_copies_an_update_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COPY_BYTES", 1)
    gate = Gate(monkeypatch)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        expected = state_of(shard)
        assert gate.reached.wait(TIMEOUT_S)
        report = shard.push_step()
        shard.engine.decide(shard.decision(report))
        # The writer holds one copy, so the second chunk may not be updated: nothing is acknowledged.
        assert shard.told.applied.empty()
        assert shard.engine.protocol.step == 1
        gate.open()
        assert shard.told.applied.get(timeout=TIMEOUT_S).step == 1
        _, file = written(shard)
        assert_holds(folder_of(shard, 1) / file.name, expected)


def test_a_full_disk_does_not_stop_applying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: AtomicFile, _data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        with monkeypatch.context() as patch:
            patch.setattr(AtomicFile, "write", full)
            shard.run_step(snapshot=True)
            assert "No space left on device" in failed(shard).message
        assert list(folder_of(shard, 1).iterdir()) == []
        shard.run_step()
        # The next one is written.
        make_folder(shard, 3)
        shard.run_step(snapshot=True)
        expected = state_of(shard)
        version, file = written(shard)
        assert version == 3
        assert_holds(folder_of(shard, 3) / file.name, expected)


def test_an_error_that_nobody_foresaw_ends_the_snapshot_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: ShardFileWriter, _name: str, _values: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ShardFileWriter, "write", broken)
    monkeypatch.setattr(module, "MAX_COPY_BYTES", 1)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        assert "a bug" in failed(shard).message
        assert shard.run_step().step == 1


def test_a_disk_that_hangs_loses_the_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COPY_BYTES", 1)
    monkeypatch.setattr(module, "STALL_S", 0.05)
    gate = Gate(monkeypatch)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        assert gate.reached.wait(TIMEOUT_S)
        assert shard.run_step().step == 1
        gate.open()
        assert "written nothing" in failed(shard).message


def test_asked_again_a_snapshot_is_told_again(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        _, file = written(shard)
        before = (folder_of(shard, 1) / file.name).stat()
        shard.engine.snapshot(1, FENCE)
        assert written(shard) == (1, file)
        assert (folder_of(shard, 1) / file.name).stat() == before
        shard.engine.resend_all()
        assert written(shard) == (1, file)
        for version in (0, 2):
            with pytest.raises(NotServing):
                shard.engine.snapshot(version, FENCE)


def test_what_an_older_fence_asks_for_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step()
        with pytest.raises(StaleFence, match="a checkpoint under"):
            shard.engine.snapshot(1, Fence(FENCE.term, FENCE.epoch - 1))
        assert list(folder_of(shard, 1).iterdir()) == []
        shard.engine.snapshot(1, FENCE)
        assert written(shard)[0] == 1


def test_a_snapshot_whose_file_is_gone_is_written_again(tmp_path: Path) -> None:
    """A coordinator that lost its memory empties the folder and asks anew."""
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        _, file = written(shard)
        make_folder(shard, 1)
        shard.engine.snapshot(1, FENCE)
        assert written(shard) == (1, file)
        assert_holds(folder_of(shard, 1) / file.name, state_of(shard))


def test_a_snapshot_on_its_way_whose_folder_is_emptied_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator died while it was written; the new one empties the folder and asks anew."""
    gate = Gate(monkeypatch)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        assert gate.reached.wait(TIMEOUT_S)
        make_folder(shard, 1)
        shard.engine.snapshot(1, FENCE)
        gate.open()
        _, file = written(shard)
        assert_holds(folder_of(shard, 1) / file.name, state_of(shard))
        assert shard.told.snapshots.empty()


def test_a_snapshot_of_before_a_rollback_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended while the rollback waited for it: made again, the version is written again."""
    gate = Gate(monkeypatch)
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        assert gate.reached.wait(TIMEOUT_S)
        in_threads(lambda: shard.seat.load(Fence(1, 2), None, ""), gate.open)
        written(shard)
        shard.engine.resend_all()
        assert shard.told.snapshots.empty()


def test_a_snapshot_that_a_rollback_meets_does_not_hold_the_old_folder(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        _, file = written(shard)
        expected = state_of(shard)
        fence = Fence(1, 2)
        shard.seat.load(fence, None, "")
        shard.seat.serve(fence, 0, 0, 2.0**16)
        shard.fence, shard.state = fence, type(shard.state).start(shard.config)
        for chunk in shard.chunks:
            shard.engine.initialize(*shard.initial(chunk))
        make_folder(shard, 1)
        shard.run_step(snapshot=True)
        assert written(shard) == (1, file)
        assert_holds(folder_of(shard, 1) / file.name, expected)


def test_a_failed_snapshot_is_told_again_and_tried_again(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        # There is no checkpoint folder at all.
        shard.run_step(snapshot=True)
        error: PsError = failed(shard)
        shard.engine.resend_all()
        assert failed(shard) is error
        make_folder(shard, 1)
        shard.engine.snapshot(1, FENCE)
        assert written(shard)[0] == 1


def test_a_new_fence_while_a_decision_with_a_snapshot_is_carried_out_ends_no_shard(tmp_path: Path) -> None:
    """Another process has died: the cluster is made to serve anew between two chunks of an update."""
    with rig(make_config(tmp_path, threads=1)) as shard:
        make_folder(shard, 1)
        store, apply = shard.engine.store, shard.engine.store.apply
        applying, go_on = threading.Event(), threading.Event()

        def slowly(*arguments: Any) -> Any:
            applying.set()
            assert go_on.wait(TIMEOUT_S)
            return apply(*arguments)

        store.apply = slowly  # type: ignore[method-assign]
        shard.engine.decide(shard.decision(shard.push_step(), snapshot=True))
        assert applying.wait(TIMEOUT_S)
        shard.seat.adopt(Fence(FENCE.term, FENCE.epoch + 1))
        go_on.set()
        target, result = shard.told.snapshots.get(timeout=TIMEOUT_S)
        assert isinstance(result, ShardFile), result
        # Whoever emptied the folder since then is not told that this file is there.
        assert target.fence == FENCE
        assert shard.told.failures == []
