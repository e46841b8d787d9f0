"""durability=journal: a shard that comes back holds what it held, bit by bit; a disk that fails stops nothing."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.config import RunConfig
from ps.coordinator.decision import TrainingState
from ps.kernels.digest import hash_payload
from ps.shard import metrics
from ps.shard.engine import ShardEngine
from ps.shard.records import Base, Decided, Reduced, Reopened, pack, unpack
from ps.shard.seat import Seat
from ps.storage.gradient_log import HEADER_BYTES, GradientLog, segment_path
from ps.storage.layout import checkpoint_folder, prepare
from ps.storage.manifest import ScalerState, read_manifest, write_manifest
from ps.storage.shard_file import ShardFile
from ps.types import Fence
from tests.support.checkpoints import make_manifest
from tests.support.shards import RUN, TABLE, TIMEOUT_S, Rig, make_config, rig

EAGER = {"wire": "bf16", "threads": 2}


def journaled(tmp_path: Path, **arguments: Any) -> RunConfig:
    return make_config(tmp_path, durability="journal", **arguments)


def save(shard: Rig) -> None:
    """Have the present version saved, and complete its checkpoint as the coordinator does."""
    version = shard.state.version
    shard.config.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    folder = prepare(shard.config.checkpoint_dir, version)
    shard.engine.snapshot(version, shard.engine.protocol.fence)
    complete(shard, folder, shard.state)


def complete(shard: Rig, folder: Path, state: TrainingState) -> None:
    target, file = shard.told.snapshots.get(timeout=TIMEOUT_S)
    assert isinstance(file, ShardFile), file
    made = make_manifest(shard.engine.plan, [file], target.version, shard.engine.store.moment_names)
    scaler = ScalerState(state.scaler.scale, state.scaler.hysteresis, state.scaler.last_overflow)
    write_manifest(folder, replace(made, applied=state.applied, skipped=state.skipped, scaler=scaler))


def folder_of(shard: Rig, version: int) -> Path:
    return checkpoint_folder(shard.config.checkpoint_dir, version)


@contextmanager
def again(shard: Rig, lineage: int = 0) -> Iterator[Rig]:
    """The shard's next life, under the next epoch, as INSPECT makes it; what it holds is not served yet."""
    shard.close()
    with rig(shard.config, shard.contributions, initialize=False) as other:
        other.state, other.fence = shard.state, Fence(shard.fence.term, shard.fence.epoch + 1)
        other.engine.lineage = lineage
        other.seat.restore(other.fence)
        yield other


def serve(shard: Rig) -> None:
    state = shard.state
    shard.seat.serve(shard.fence, state.version, state.applied, state.scaler.scale)


def bits(shard: Rig) -> list[np.ndarray]:
    store = shard.engine.store
    return [array.copy() for chunk in shard.chunks for array in store.arrays(chunk).values()]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


def contents(config: RunConfig) -> list[Any]:
    log = GradientLog.open(config.journal_dir(0), hash_payload)
    try:
        return [unpack(entry.head) for entry in log.read(log.versions[0])]
    finally:
        log.close()


@pytest.mark.parametrize("arguments", [{}, {"optimizer": "sgd"}, EAGER], ids=["adamw", "sgd", "bf16"])
def test_a_shard_that_died_comes_back_with_every_step(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with rig(journaled(tmp_path, **arguments)) as shard:
        save(shard)
        for _ in range(3):
            shard.run_step()
        shard.push_step()
        shard.skip_step()
        last = shard.run_step()
        expected = bits(shard)
        with again(shard) as other:
            engine = other.engine
            assert (engine.has_state, engine.protocol.step, engine.protocol.applied) == (True, 5, 4)
            assert engine.store.state_hash == last.state_hash
            assert_same(bits(other), expected)
            assert engine.protocol.last_decision is not None
            assert engine.protocol.last_decision.step == 4
            assert {published.version for published in engine.store.published.values()} == {5}
            serve(other)
            assert other.run_step().step == 5


def test_what_was_reduced_of_the_open_step_is_held_again(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        shard.run_step()
        first, second = shard.chunks
        for contribution in range(2):
            shard.engine.push(*shard.push(contribution, first))
        shard.engine.push(*shard.push(0, second))
        shard.engine.quiesce()
        with again(shard) as other:
            protocol = other.engine.protocol
            assert protocol.held() == [(0, [first.index]), (1, [first.index])]
            assert not protocol.all_reduced
            serve(other)
            assert other.engine.push(*other.push(0, first)).duplicate
            for contribution in range(2):
                other.engine.push(*other.push(contribution, second))
            report = other.told.next_prepared()
            assert report.fence == other.fence
            assert [c.loss_sum for c in report.contributions] == [0.5, 1.5]
            applied = other.tell(other.decision(report))
        undisturbed = make_config(tmp_path / "undisturbed")
        with rig(undisturbed) as whole:
            whole.run_step()
            assert whole.run_step().state_hash == applied.state_hash


@pytest.mark.parametrize("heard", [False, True])
def test_a_death_around_the_decision(tmp_path: Path, heard: bool) -> None:
    """Prepared, it is told the decision again; having heard it, it has carried it out, whatever of that was done."""
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        shard.run_step()
        report = shard.push_step()
        decision = shard.decision(report)
        if heard:
            shard.engine.journal.note(Decided(decision, shard.engine.store.version_hash))
        with again(shard) as other:
            protocol = other.engine.protocol
            assert (protocol.step, protocol.all_reduced) == ((2, False) if heard else (1, True))
            if heard:
                return
            serve(other)
            again_report = other.told.next_prepared()
            assert (again_report.square_sums, again_report.contributions) == (
                report.square_sums,
                report.contributions,
            )
            assert other.tell(other.decision(again_report)).step == 1


def test_wherever_it_is_torn_it_leads_to_a_state_that_was(tmp_path: Path) -> None:
    """Killed in the middle of a write: the version that the whole records lead to, and what they hold of the next."""
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        hashes = [shard.engine.store.version_hash, *(shard.run_step().state_hash for _ in range(3))]
        shard.close()
        path = segment_path(shard.config.journal_dir(0), 0)
        content = path.read_bytes()
        log = GradientLog.open(shard.config.journal_dir(0), hash_payload)
        sizes = [HEADER_BYTES + len(entry.head) + len(entry.payload) for entry in log.read(0)]
        log.close()
        found = []
        for end in np.cumsum(sizes)[1:]:
            # Within the record, too.
            cut = int(end) - len(found) % 2
            path.write_bytes(content[:cut])
            with again(shard) as other:
                protocol = other.engine.protocol
                assert other.engine.store.version_hash == other.engine.store.state_hash == hashes[protocol.step]
                found.append((protocol.step, protocol.chunks_reduced))
        # Two chunks and a decision in each step; every second record is torn.
        assert found == [(0, 1), (0, 1), (1, 0), (1, 0), (1, 2), (1, 2), (2, 1), (2, 1), (3, 0)]


def test_it_goes_on_behind_what_was_read_and_can_die_again(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        shard.run_step()
        with again(shard) as second:
            serve(second)
            second.run_step()
            with again(second) as third:
                serve(third)
                hashed = third.run_step().state_hash
    with rig(make_config(tmp_path / "undisturbed")) as whole:
        assert [whole.run_step().state_hash for _ in range(3)][-1] == hashed


def test_with_a_checkpoint_a_new_file_begins_and_the_old_one_goes_when_it_is_complete(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        folder, engine = shard.config.journal_dir(0), shard.engine
        save(shard)
        shard.run_step()
        made = prepare(shard.config.checkpoint_dir, 2)
        shard.run_step(snapshot=True)
        state = shard.state
        engine.journal.trim(shard.config.checkpoint_dir, RUN)
        assert segment_path(folder, 0).exists(), "there is no checkpoint yet"
        shard.run_step()
        complete(shard, made, state)
        engine.journal.trim(shard.config.checkpoint_dir, RUN)
        assert [segment_path(folder, version).exists() for version in (0, 2)] == [False, True]
        expected = bits(shard)
        with again(shard) as other:
            assert other.engine.protocol.step == 3
            assert_same(bits(other), expected)


def test_without_the_newest_checkpoint_the_one_before_leads_on(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        shard.run_step()
        save(shard)
        shard.run_step()
        expected = bits(shard)
        path = next(folder_of(shard, 1).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with again(shard) as other:
            assert other.engine.protocol.step == 2
            assert_same(bits(other), expected)


def test_a_checkpoint_in_mid_step_keeps_the_file_that_holds_a_part_of_it(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        shard.run_step()
        shard.push_step()
        save(shard)
        assert [type(record) for record in contents_after_close(shard)][-2:] == [Reduced, Reduced]
        with again(shard) as other:
            assert (other.engine.protocol.step, other.engine.protocol.all_reduced) == (1, True)


def contents_after_close(shard: Rig) -> list[Any]:
    shard.close()
    return contents(shard.config)


def test_gradients_may_come_before_the_first_checkpoint_is_asked_for(tmp_path: Path) -> None:
    """The journal began with the checkpoint: then it did not begin at all."""
    with rig(journaled(tmp_path)) as shard:
        report = shard.push_step()
        save(shard)
        shard.tell(shard.decision(report))
        with again(shard) as other:
            assert (other.engine.has_state, other.engine.protocol.step) == (True, 1)


def test_it_asks_for_a_checkpoint_when_it_is_long(tmp_path: Path) -> None:
    with rig(journaled(tmp_path, journal={"max_bytes": 700_000})) as shard:
        save(shard)
        reports = [shard.push_step()]
        shard.tell(shard.decision(reports[0]))
        reports.append(shard.push_step())
        shard.tell(shard.decision(reports[1]))
        reports.append(shard.push_step())
        assert [report.journal_full for report in reports] == [False, False, True]
        decision = shard.decision(reports[2])
        assert decision.snapshot
        prepare(shard.config.checkpoint_dir, 3)
        shard.tell(decision)
        assert not shard.push_step().journal_full


def test_while_checkpoints_fail_every_file_stays(tmp_path: Path) -> None:
    """Only all of them lead from the last good checkpoint to the present; the limit is one of each file."""
    with rig(journaled(tmp_path, journal={"max_bytes": 200_000})) as shard:
        save(shard)
        for version in (1, 2, 3):
            report = shard.push_step()
            assert report.journal_full
            prepare(shard.config.checkpoint_dir, version)
            # Its manifest is never written.
            shard.tell(shard.decision(report))
        assert [path.name for path in sorted(shard.config.journal_dir(0).glob("*.log"))] == [
            f"from-{version:08d}.log" for version in range(4)
        ]
        assert metrics.JOURNAL_BYTES._value.get() > 3 * metrics.JOURNAL_LIMIT._value.get() == 600_000


def test_another_loss_scale_begins_the_step_again(tmp_path: Path) -> None:
    with rig(journaled(tmp_path)) as shard:
        save(shard)
        for contribution in range(2):
            shard.engine.push(*shard.push(contribution, shard.chunks[0]))
        shard.engine.quiesce()
        shard.seat.serve(shard.fence, 0, 0, 8.0)
        for contribution in range(2):
            shard.engine.push(*shard.push(contribution, shard.chunks[1], loss_scale=8.0))
        shard.engine.quiesce()
        kinds = [type(record) for record in contents_after_close(shard)]
        assert kinds == [Base, Reduced, Reopened, Reduced]
        with again(shard) as other:
            assert other.engine.protocol.loss_scale == 8.0
            assert other.engine.protocol.held() == [(c, [shard.chunks[1].index]) for c in range(2)]


# -- What is of no use --------------------------------------------------------------------------


def assert_not_used(shard: Rig, caplog: pytest.LogCaptureFixture, why: str, lineage: int = 0) -> None:
    """It holds no state, says why, and goes on from what the coordinator has it load."""
    with caplog.at_level(logging.WARNING), again(shard, lineage) as other:
        engine = other.engine
        assert not engine.has_state
        assert why in caplog.text
        other.seat.load(other.fence, None, "")
        other.seat.serve(other.fence, 0, 0, other.config.precision.loss_scale.initial_power)
        assert engine.protocol.awaiting_initial_values


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Rig]:
    """It has a checkpoint of version 0, and two steps in its journal."""
    with rig(journaled(tmp_path)) as made:
        save(made)
        made.run_step()
        made.run_step()
        yield made


def test_a_journal_of_before_a_rollback(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    assert_not_used(shard, caplog, "of before a rollback: of epoch 0 where the run went on in 5", lineage=5)


def test_a_damaged_journal(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    path = segment_path(shard.config.journal_dir(0), 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_not_used(shard, caplog, "a damaged record")


def test_a_journal_without_its_checkpoint(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    (folder_of(shard, 0) / "manifest.json").unlink()
    assert_not_used(shard, caplog, "there is no checkpoint in")


def test_a_journal_of_another_run(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    shard.close()
    engine = ShardEngine(shard.config, "run-2", TABLE, 0, 2)
    try:
        with caplog.at_level(logging.WARNING):
            Seat(engine).restore(Fence(1, 2))
        assert not engine.has_state
        assert f"it is of shard 0 of run {RUN}" in caplog.text
    finally:
        engine.close()


def test_a_checkpoint_with_other_bits(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A machine that does not repeat its own bits must not go on as if it had."""
    shard.close()
    log = GradientLog.open(shard.config.journal_dir(0), hash_payload)
    entries = [(entry.head, bytes(entry.payload)) for entry in log.read(0)]
    base = unpack(entries[0][0])
    assert isinstance(base, Base)
    log.begin(0, pack(replace(base, state_hash=base.state_hash ^ 1)), anew=True)
    for head, payload in entries[1:]:
        log.append(head, payload)
    log.close()
    assert_not_used(shard, caplog, "does not repeat its own bits")


def test_a_journal_that_is_held_by_another_process(shard: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), rig(shard.config, initialize=False) as other:
        other.seat.restore(Fence(1, 2))
        assert not other.engine.has_state
        assert "is held by another process" in caplog.text


def test_what_was_loaded_begins_a_journal_of_its_own(shard: Rig) -> None:
    """After a rollback: what was written before it must not be found again."""
    checkpoint = folder_of(shard, 0)
    manifest, sha256 = read_manifest(checkpoint)
    fence = shard.fence = Fence(1, 2)
    engine = shard.engine
    shard.seat.load(fence, checkpoint, sha256)
    assert len(list(shard.config.journal_dir(0).glob("from-*"))) == 1
    engine.lineage = 2
    shard.seat.serve(fence, 0, 0, manifest.scaler.scale)
    (base,) = contents_after_close(shard)
    assert (base.lineage, base.version) == (2, 0)


# -- A disk that fails --------------------------------------------------------------------------


def test_training_goes_on_without_a_journal_until_the_next_checkpoint(
    shard: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _parts: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = shard.config.journal_dir(0)
    with caplog.at_level(logging.ERROR):
        monkeypatch.setattr(os, "writev", full)
        shard.run_step()
        assert "no journal until the next checkpoint" in caplog.text
        assert "No space left on device" in caplog.text
        assert list(folder.glob("from-*")) == [], "its room may be what the checkpoint needs"
        shard.run_step()
        monkeypatch.undo()
    assert len([record for record in caplog.records if "no journal" in record.message]) == 1
    shard.run_step()
    save(shard)
    expected = shard.run_step().state_hash
    with again(shard) as other:
        assert other.engine.has_state
        assert (other.engine.protocol.step, other.engine.store.state_hash) == (6, expected)
