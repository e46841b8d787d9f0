"""Eager steps at a shard with real kernels: the decided step's bits, and what may come in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.errors import DecisionRejected, NotServing, StaleFence, StepNotOpen
from ps.shard import engine as engine_module
from ps.shard.engine import ShardEngine
from ps.shard.exchange import Exchange
from ps.shard.service import ShardHost
from ps.shard.snapshot import Snapshot
from ps.shard.snapshots import Snapshots
from ps.storage.layout import checkpoint_folder, prepare
from ps.storage.shard_file import ShardFile, ShardFileReader, ShardFileWriter, chunk_name
from ps.types import Decision, Fence
from ps.wire.messages import Refused, Unchanged
from tests.support.eager import (
    Held,
    await_updated,
    drained,
    eager_config,
    foregone_of,
    pull,
    push_chunk,
    updated,
)
from tests.support.eventually import eventually
from tests.support.plans import table_of_chunks
from tests.support.shards import FENCE, TIMEOUT_S, Rig, drain, encode_frame, in_threads, make_config, rig

CHUNKS = 4
TABLE = table_of_chunks(CHUNKS)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Rig]:
    """Serving, with one decided step behind it, so that moments are not zero."""
    with rig(eager_config(tmp_path), table=TABLE) as made:
        made.run_step()
        yield made


@pytest.fixture
def stream(shard: Rig) -> Exchange:
    return Exchange(shard.engine, 7)


def bits(shard: Rig) -> dict[str, np.ndarray]:
    """Everything that the shard holds."""
    return {
        chunk_name(name, chunk.start): array.copy()
        for chunk in shard.chunks
        for name, array in shard.engine.store.arrays(chunk).items()
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.tobytes() == expected[name].tobytes(), name


def decided(config: Any, contributions: int, steps: int, **arguments: Any) -> tuple[list[int], dict[str, np.ndarray]]:
    """The state hashes after each step, and the last state, where every step is decided."""
    with rig(config, contributions, **arguments) as shard:
        return [shard.run_step().state_hash for _ in range(steps)], bits(shard)


# -- The same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("contributions", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wire", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_updates_before_the_decision_are_those_after_it(
    tmp_path: Path, optimizer: str, wire: str, threads: int, contributions: int
) -> None:
    """Foregone before anything has come, in the middle, and once all is reduced."""
    config = eager_config(tmp_path, wire, optimizer, threads=threads, slots=5)
    hashes, state = decided(config, contributions, 4)
    found = []
    with rig(config, contributions) as shard:
        for when in ("before", "middle", "after", "never"):
            if when == "before":
                shard.engine.foresee(foregone_of(shard))
            first, second = shard.chunks
            push_chunk(shard, second)
            if when == "middle":
                shard.engine.foresee(foregone_of(shard))
            push_chunk(shard, first)
            report = shard.told.next_prepared()
            if when == "after":
                shard.engine.foresee(foregone_of(shard))
            if when != "never":
                await_updated(shard, *shard.chunks)
                assert shard.engine.protocol.step == shard.state.version, "the decision opens the next step"
            applied = shard.tell(shard.decision(report))
            assert applied.step == shard.state.version - 1
            found.append(applied.state_hash)
        assert_same(bits(shard), state)
    assert found == hashes


def test_a_chunk_is_updated_and_sent_while_others_wait_for_gradients(shard: Rig, stream: Exchange) -> None:
    shard.engine.foresee(foregone_of(shard))
    assert pull(shard, stream, 2) == {}
    for chunk in reversed(shard.chunks):
        push_chunk(shard, chunk)
        await_updated(shard, chunk)
        assert list(drained(shard, stream)) == [chunk.index], "it waits for no other chunk"
    assert shard.told.next_prepared().step == 1
    assert shard.told.applied.empty()


def test_what_is_ready_at_once_goes_in_forward_order(shard: Rig, stream: Exchange) -> None:
    shard.engine.foresee(foregone_of(shard))
    for chunk in reversed(shard.chunks[1:]):
        push_chunk(shard, chunk)
    await_updated(shard, *shard.chunks[1:])
    assert list(pull(shard, stream, 2)) == [1, 2, 3]
    push_chunk(shard, shard.chunks[0])
    await_updated(shard, shard.chunks[0])
    assert list(drained(shard, stream)) == [0]
    assert stream._cursor is None


# -- The version before -------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_version_before_is_there_until_the_step_is_closed(tmp_path: Path, shared: bool) -> None:
    """Also chunk by chunk, pulled anew in the middle; in memory as in frames."""
    with rig(eager_config(tmp_path), table=TABLE) as shard:
        stream = Exchange(shard.engine, 7)
        if shared:
            shard.engine.share()
            stream._sharing.ready = True
        for _ in range(4):
            version = shard.state.version
            before = pull(shard, stream, version)
            assert list(before) == list(range(CHUNKS))
            shard.engine.foresee(foregone_of(shard))
            for count, chunk in enumerate(shard.chunks, 1):
                push_chunk(shard, chunk)
                await_updated(shard, chunk)
                again = pull(shard, stream, version)
                assert all(again[index].tobytes() == before[index].tobytes() for index in range(CHUNKS))
                new = pull(shard, stream, version + 1)
                assert list(new) == list(range(count))
            assert all(new[index].tobytes() != before[index].tobytes() for index in range(CHUNKS))
            shard.tell(shard.decision(shard.told.next_prepared()))
            after = pull(shard, stream, version + 1)
            assert all(after[index].tobytes() == new[index].tobytes() for index in range(CHUNKS))
            stream.receive(encode_frame(shard.pull(version)))
            ((answer, _),) = drain(stream)
            assert isinstance(answer, Refused)
            assert answer.code == "VERSION_GONE"
        assert (stream._sharing.ready and shard.engine.store.published[0].place >= 0) == shared


def test_a_worker_without_shared_memory_gets_frames_of_the_version_before(tmp_path: Path) -> None:
    with rig(eager_config(tmp_path), table=TABLE) as shard:
        shard.engine.share()
        for _ in range(2):
            shard.run_step()
        stream = Exchange(shard.engine, 7)
        before = pull(shard, stream, 2)
        shard.engine.foresee(foregone_of(shard))
        push_chunk(shard, shard.chunks[0])
        await_updated(shard, shard.chunks[0])
        again = pull(shard, stream, 2)
        assert all(again[index].tobytes() == before[index].tobytes() for index in range(CHUNKS))
        assert pull(shard, stream, 3)[0].tobytes() != before[0].tobytes()


def test_nothing_piles_up(shard: Rig) -> None:
    store = shard.engine.store
    for _ in range(5):
        shard.engine.foresee(foregone_of(shard))
        shard.run_step()
        assert store._before == {}
        assert store.news == []
    assert shard.engine.waiting == {}


# -- Pushes of the next step --------------------------------------------------------------------


def ahead(shard: Rig) -> Any:
    """Everything is updated and only the decision is missing; returns the report."""
    shard.engine.foresee(foregone_of(shard))
    report = shard.push_step()
    await_updated(shard, *shard.chunks)
    return report


def early_push(shard: Rig) -> Any:
    return shard.push(0, shard.chunks[0], step=shard.state.version + 1)


def push_in_thread(shard: Rig, push: Any) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(shard.engine.push(*push))
        except StepNotOpen as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: shard.engine.opened._waiters, TIMEOUT_S, "the push to wait")  # type: ignore[attr-defined]
    return thread, outcome


def test_a_push_of_the_next_step_waits_for_the_decision(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "OPEN_S", 3600.0)
    report = ahead(shard)
    thread, outcome = push_in_thread(shard, early_push(shard))
    assert outcome == []
    shard.tell(shard.decision(report))
    thread.join(TIMEOUT_S)
    assert [accepted.duplicate for accepted in outcome] == [False]
    assert shard.engine.protocol.held() == [(0, [0])]


def test_a_push_of_the_next_step_does_not_wait_for_ever(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "OPEN_S", 0.01)
    report = ahead(shard)
    with pytest.raises(StepNotOpen):
        shard.engine.push(*early_push(shard))
    shard.tell(shard.decision(report))
    assert not shard.engine.push(*shard.push(0, shard.chunks[0])).duplicate


@pytest.mark.parametrize("what", ["fence", "load"])
def test_a_push_that_waits_hears_of_a_new_fence(shard: Rig, what: str) -> None:
    ahead(shard)
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            shard.engine.push(*early_push(shard))
        except StaleFence as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: shard.engine.opened._waiters, TIMEOUT_S, "the push to wait")  # type: ignore[attr-defined]
    if what == "fence":
        shard.seat.adopt(Fence(1, 2))
    else:
        shard.seat.load(Fence(1, 2), None, "")
    thread.join(TIMEOUT_S)
    assert len(outcome) == 1


def test_only_what_lacks_nothing_but_the_decision_waits(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "OPEN_S", 3600.0)
    shard.engine.foresee(foregone_of(shard))
    for chunk in shard.chunks[:-1]:
        push_chunk(shard, chunk)
    await_updated(shard, *shard.chunks[:-1])
    # A worker that pushes without having all weights is wrong, and hears so at once.
    with pytest.raises(StepNotOpen):
        shard.engine.push(*early_push(shard))
    push_chunk(shard, shard.chunks[-1])
    await_updated(shard, shard.chunks[-1])
    with pytest.raises(StepNotOpen):
        shard.engine.push(*shard.push(0, shard.chunks[0], step=shard.state.version + 2))


# -- The decision -------------------------------------------------------------------------------


def test_a_decision_that_comes_while_chunks_are_updated_closes_the_step(
    shard: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes, state = decided(shard.config, 2, 2, table=TABLE)
    held = Held(monkeypatch, shard.chunks[2])
    shard.engine.foresee(foregone_of(shard))
    for chunk in (*shard.chunks[:2], *shard.chunks[3:], shard.chunks[2]):
        push_chunk(shard, chunk)
    report = shard.told.next_prepared()
    assert held.reached.wait(TIMEOUT_S)
    decision = shard.decision(report)
    shard.engine.decide(decision)
    # Hearing it, or what was foregone, again changes nothing.
    shard.engine.decide(decision)
    shard.engine.foresee(foregone_of(shard))
    assert shard.told.applied.empty()
    assert shard.engine.protocol.step == 1
    held.go()
    assert shard.told.applied.get(timeout=TIMEOUT_S).state_hash == hashes[1]
    assert_same(bits(shard), state)
    assert shard.told.applied.empty()


def test_another_decision_than_was_foregone_is_rejected(shard: Rig) -> None:
    report = ahead(shard)
    for changes in ({"skip": True}, {"gradient_multiplier": 0.5}, {"bias_correction1": 0.3}, {"applied": 7}):
        with pytest.raises(DecisionRejected, match="another one than was foregone"):
            shard.engine.decide(shard.decision(report, **changes))
        with pytest.raises(DecisionRejected, match="another one than was foregone"):
            shard.engine.foresee(replace(foregone_of(shard), **changes))
    # What only describes the step may differ.
    shard.tell(shard.decision(report, loss=3.0, gradient_norm=7.0, snapshot=True, tokens=9))


def test_foregone_twice_updates_once(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, _ = decided(shard.config, 2, 2, table=TABLE)
    held = Held(monkeypatch, shard.chunks[0])
    shard.engine.foresee(foregone_of(shard))
    push_chunk(shard, shard.chunks[0])
    assert held.reached.wait(TIMEOUT_S)
    for chunk in shard.chunks[1:]:
        push_chunk(shard, chunk)
        shard.engine.foresee(foregone_of(shard))
    held.go()
    report = shard.told.next_prepared()
    await_updated(shard, *shard.chunks)
    shard.engine.foresee(foregone_of(shard))
    assert shard.tell(shard.decision(report)).state_hash == hashes[1]


def test_of_a_step_that_is_over_nothing_is_foregone(shard: Rig) -> None:
    old = foregone_of(shard)
    shard.engine.foresee(old)
    shard.run_step()
    before = shard.engine.store.state_hash
    shard.engine.foresee(old)
    assert shard.engine.protocol.foregone is old
    push_chunk(shard, shard.chunks[0])
    eventually(lambda: shard.engine.protocol.chunks_reduced == 1, TIMEOUT_S, "the chunk to be reduced")
    shard.engine.quiesce()
    assert updated(shard) == set()
    assert shard.engine.store.state_hash == before
    new = foregone_of(shard)
    shard.engine.foresee(new)
    shard.engine.foresee(old)
    assert shard.engine.protocol.foregone is new
    await_updated(shard, shard.chunks[0])


def test_the_next_step_may_be_foregone_before_the_last_is_carried_out(
    shard: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator tells both at once; a shard may still update for the first."""
    hashes, state = decided(shard.config, 2, 3, table=TABLE)
    held = Held(monkeypatch, shard.chunks[0])
    report = shard.push_step()
    decision = shard.decision(report)
    shard.engine.decide(decision)
    assert held.reached.wait(TIMEOUT_S)
    state_after = replace(shard.state, version=decision.version, applied=decision.applied)
    shard.state = state_after
    shard.engine.foresee(foregone_of(shard))
    held.go()
    assert shard.told.applied.get(timeout=TIMEOUT_S).state_hash == hashes[1]
    report = shard.push_step()
    await_updated(shard, *shard.chunks)
    assert shard.tell(shard.decision(report)).state_hash == hashes[2]
    assert_same(bits(shard), state)


# -- Overflow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_chunk_that_overflows_is_not_updated(shard: Rig, value: float) -> None:
    shard.engine.foresee(foregone_of(shard))
    bad = shard.chunks[1]
    gradient = shard.gradient(1, 0, bad)
    gradient[5] = np.float32(value).view(np.uint32) >> 16
    shard.engine.push(*shard.push(0, bad, gradient))
    shard.engine.push(*shard.push(1, bad))
    for chunk in (shard.chunks[0], *shard.chunks[2:]):
        push_chunk(shard, chunk)
    report = shard.told.next_prepared()
    await_updated(shard, shard.chunks[0], *shard.chunks[2:])
    shard.engine.quiesce()
    assert updated(shard) == {0, 2, 3}
    decision = shard.decision(report)
    assert decision.skip
    with pytest.raises(DecisionRejected):
        shard.engine.decide(decision)
    assert shard.engine.protocol.is_ahead


def test_a_skip_is_carried_out_where_nothing_was_foregone(shard: Rig, stream: Exchange) -> None:
    """As after an overflow: the same job, and steps that are decided."""
    before = bits(shard)
    shard.push_step()
    assert shard.skip_step().step == 1
    assert_same(bits(shard), before)
    stream.receive(encode_frame(shard.pull(2, shard.state.applied)))
    ((answer, _),) = drain(stream)
    assert answer == Unchanged(2, shard.state.applied)
    assert len(pull(shard, stream, 2)) == CHUNKS


# -- Fences and rollbacks -----------------------------------------------------------------------


def test_what_is_foregone_under_an_old_fence_is_refused(shard: Rig) -> None:
    old = foregone_of(shard)
    shard.seat.adopt(Fence(1, 2))
    with pytest.raises(StaleFence):
        shard.engine.foresee(old)
    assert shard.engine.protocol.foregone is None


def test_a_new_fence_withdraws_what_is_foregone(shard: Rig) -> None:
    """Whoever inspected the shard relies on it."""
    shard.engine.foresee(foregone_of(shard))
    push_chunk(shard, shard.chunks[0], contributions=1)
    host = ShardHost(0, 7, lambda _: None)
    host.seat = shard.seat
    fence = Fence(1, 2)
    shard.seat.adopt(fence)
    assert not host._report(shard.engine).HasField("updated_by")
    shard.seat.serve(fence, 1, 1, 1.0)
    shard.fence = fence
    shard.engine.push(*shard.push(1, shard.chunks[0]))
    eventually(lambda: shard.engine.protocol.chunks_reduced == 1, TIMEOUT_S, "the chunk to be reduced")
    shard.engine.quiesce()
    assert updated(shard) == set()
    assert not host._report(shard.engine).HasField("updated_by")
    shard.engine.foresee(foregone_of(shard))
    await_updated(shard, shard.chunks[0])
    assert host._report(shard.engine).HasField("updated_by")


def test_an_update_that_was_about_to_begin_does_not_after_a_new_fence(
    shard: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel thread has seen what is foregone, and is held up before it begins."""
    reached, go = threading.Event(), threading.Event()
    begin = ShardEngine._begin_update

    def late(engine: Any, decision: Decision, chunk: Any) -> Any:
        reached.set()
        assert go.wait(TIMEOUT_S)
        return begin(engine, decision, chunk)

    monkeypatch.setattr(ShardEngine, "_begin_update", late)
    shard.engine.foresee(foregone_of(shard))
    push_chunk(shard, shard.chunks[0])
    assert reached.wait(TIMEOUT_S)
    shard.seat.adopt(Fence(1, 2))
    assert not shard.engine.protocol.is_ahead
    go.set()
    shard.engine.quiesce()
    assert updated(shard) == set()


def test_the_open_step_goes_on_under_a_new_fence(shard: Rig) -> None:
    """A coordinator that was started anew decides a step that another one let begin."""
    hashes, _ = decided(shard.config, 2, 2, table=TABLE)
    shard.engine.foresee(foregone_of(shard))
    for chunk in shard.chunks[:2]:
        push_chunk(shard, chunk)
    await_updated(shard, *shard.chunks[:2])
    shard.fence = Fence(2, 2)
    shard.seat.adopt(shard.fence)
    assert shard.engine.protocol.is_ahead
    shard.seat.serve(shard.fence, 1, 1, 1.0)
    for chunk in shard.chunks:
        push_chunk(shard, chunk)
    report = shard.told.next_prepared()
    assert updated(shard) == {0, 1}
    assert shard.tell(shard.decision(report)).state_hash == hashes[1]


def test_a_rollback_in_the_middle(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update is under way when the state is taken away from under it."""
    held = Held(monkeypatch, shard.chunks[1])
    shard.engine.foresee(foregone_of(shard))
    for chunk in shard.chunks[:2]:
        push_chunk(shard, chunk)
    assert held.reached.wait(TIMEOUT_S)
    fence = Fence(1, 2)
    in_threads(lambda: shard.seat.load(fence, None, ""), held.go)
    assert not shard.engine.protocol.is_ahead
    assert shard.engine.store.published == {}
    assert shard.engine.protocol._unpublished == set(range(CHUNKS)), "of the steps to come none is updated"
    shard.seat.serve(fence, 0, 0, 1.0)
    shard.fence, shard.state = fence, type(shard.state).start(shard.config)
    for chunk in shard.chunks:
        shard.engine.initialize(*shard.initial(chunk))
    hashes, state = decided(shard.config, 2, 3, table=TABLE)
    found = []
    for _ in range(3):
        shard.engine.foresee(foregone_of(shard))
        found.append(shard.run_step().state_hash)
    assert found == hashes
    assert_same(bits(shard), state)


def test_a_shard_whose_job_is_not_eager_does_not_get_ahead(tmp_path: Path) -> None:
    """Its coordinator may have been started anew with another job; here the version before would be gone."""
    with rig(eager_config(tmp_path, training={"eager": False}), table=TABLE) as shard:
        eager = eager_config(tmp_path)
        shard.config, config = eager, shard.config
        foregone = foregone_of(shard)
        shard.config = config
        shard.engine.foresee(foregone)
        shard.push_step()
        shard.engine.quiesce()
        assert updated(shard) == set()


@pytest.mark.parametrize(
    ("wire", "sections"),
    [
        ("fp16", {}),
        ("bf16", {"training": {"eager": False}}),
        ("bf16", {"clip_norm": 1.0}),
        ("fp32", {"precision": {"wire": "fp32", "compute": "fp16", "loss_scale": {"static": 128.0}}}),
    ],
    ids=["fp16 on the wire", "not wanted", "clipped", "fp16 in forward and backward"],
)
def test_where_something_is_to_be_decided_steps_are_not_eager(
    tmp_path: Path, wire: str, sections: dict[str, Any]
) -> None:
    assert eager_config(tmp_path).is_eager
    assert not eager_config(tmp_path, wire, **sections).is_eager
    assert not make_config(tmp_path).is_eager


# -- Snapshots ----------------------------------------------------------------------------------


class Gate:
    """A disk that writes once it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write, opened = ShardFileWriter.write, self.opened

        def slow(writer: ShardFileWriter, name: str, values: Any) -> None:
            assert opened.wait(TIMEOUT_S)
            write(writer, name, values)

        monkeypatch.setattr(ShardFileWriter, "write", slow)

    def open(self) -> None:
        self.opened.set()


def make_folder(shard: Rig, version: int) -> None:
    shard.config.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    prepare(shard.config.checkpoint_dir, version)


def assert_file_holds(shard: Rig, version: int, expected: dict[str, np.ndarray]) -> None:
    target, file = shard.told.snapshots.get(timeout=TIMEOUT_S)
    assert isinstance(file, ShardFile), file
    assert target.version == version
    reader = ShardFileReader(checkpoint_folder(shard.config.checkpoint_dir, version) / file.name)
    try:
        for name, array in expected.items():
            found = np.empty_like(array)
            reader.read(name, 0, found)
            assert found.tobytes() == array.tobytes(), name
    finally:
        reader.close()


def test_between_two_versions_nothing_is_saved_or_shown(shard: Rig) -> None:
    host = ShardHost(0, 7, lambda _: None)
    host.seat = shard.seat
    assert len(list(host.snapshot([0]))) == 3
    shard.engine.foresee(foregone_of(shard))
    push_chunk(shard, shard.chunks[0])
    await_updated(shard, shard.chunks[0])
    with pytest.raises(NotServing):
        shard.engine.snapshot(1, FENCE)
    with pytest.raises(NotServing):
        list(host.snapshot([]))


def test_a_snapshot_holds_its_version_while_the_next_step_is_ahead(shard: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    make_folder(shard, 2)
    shard.run_step(snapshot=True)
    expected = bits(shard)
    ahead(shard)
    gate.open()
    assert_file_holds(shard, 2, expected)


def test_a_snapshot_that_is_asked_for_as_a_chunk_is_about_to_be_updated(
    shard: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel thread has seen that there is none to protect the chunk from, and has not begun yet."""
    gate = Gate(monkeypatch)
    make_folder(shard, 1)
    expected = bits(shard)
    reads: list[int] = []

    def pending(snapshots: Snapshots) -> list[Snapshot]:
        seen: list[Snapshot] = snapshots.__dict__["pending"]
        if threading.current_thread().name.startswith("kernel"):
            reads.append(len(seen))
            if len(reads) == 2:
                # The first look was for too many, this one for those to protect the chunk from.
                shard.engine.snapshot(1, FENCE)
        return seen

    monkeypatch.setattr(
        Snapshots, "pending", property(pending, lambda s, v: s.__dict__.update(pending=v)), raising=False
    )
    shard.engine.foresee(foregone_of(shard))
    push_chunk(shard, shard.chunks[0])
    await_updated(shard, shard.chunks[0])
    assert reads[:2] == [0, 0]
    gate.open()
    assert_file_holds(shard, 1, expected)


def test_a_snapshot_is_not_written_again_of_a_state_that_is_between(
    shard: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new coordinator emptied its folder and asked anew, and by the time it has ended the next step is ahead."""
    gate = Gate(monkeypatch)
    make_folder(shard, 2)
    shard.run_step(snapshot=True)
    make_folder(shard, 2)
    shard.engine.snapshot(2, FENCE)
    ahead(shard)
    gate.open()
    _, result = shard.told.snapshots.get(timeout=TIMEOUT_S)
    eventually(lambda: all(s.join(0) for s in shard.engine.snapshots.pending), TIMEOUT_S, "the writer's end")
    assert shard.told.snapshots.empty()
    if isinstance(result, ShardFile):
        # What it says it has written is not there: the coordinator asks for it in vain, and no manifest is made.
        assert not (checkpoint_folder(shard.config.checkpoint_dir, 2) / result.name).exists()
