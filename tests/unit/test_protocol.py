"""The shard's step protocol: fences, keys, versions. No kernels, no threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ps.errors import DecisionRejected, NotServing, PsError, StaleFence, StepNotOpen, WrongLossScale
from ps.kernels.digest import hash_payload
from ps.shard.protocol import Accepted, StepProtocol, StepShape
from ps.shard.reduction import ReduceJob
from ps.sharding import Chunk, make_plan
from ps.types import Applied, Decision, Fence, GroupScalars, WireDtype
from ps.wire.messages import Initialize, Push
from tests.support.plans import table_of, table_of_chunks
from tests.support.shards import TIMEOUT_S, in_threads, make_config, rig

FENCE = Fence(2, 3)
PLAN = make_plan(table_of_chunks(5), 2)
SCALE = 1024.0


def make_protocol(serving: bool = True, shard: int = 0, strict: bool = False) -> StepProtocol:
    """Shard 0 has chunks 0, 2, 4; G = 4, C = 2."""
    protocol = StepProtocol(PLAN, shard, StepShape("run", 4, 2, WireDtype.FP16, strict))
    if serving:
        protocol.adopt(FENCE)
        protocol.restored(7, 5, SCALE)
        protocol.serve(7, 5, SCALE)
    return protocol


def header_of(protocol: StepProtocol, contribution: int, chunk: Chunk, payload: bytes) -> Push:
    fence = protocol.fence
    return Push(
        run="run",
        term=fence.term,
        epoch=fence.epoch,
        rank=0,
        incarnation=1,
        step=protocol.step,
        contribution=contribution,
        chunk=chunk.index,
        slots=2,
        loss_scale=protocol.loss_scale,
        dtype="fp16",
        hash=hash_payload(payload),
        present=b"\x01",
        loss_sum=1.0,
        tokens=1,
    )


def push(protocol: StepProtocol, contribution: int, chunk: Chunk, fill: int = 0) -> Accepted:
    payload = bytes([fill]) * (2 * chunk.size)
    header = header_of(protocol, contribution, chunk, payload)
    return protocol.push(header, memoryview(payload), header.hash)


def reduce_all(protocol: StepProtocol) -> None:
    """Push a whole step and carry out its jobs."""
    for chunk in PLAN.chunks_of(protocol.shard):
        for contribution in range(2):
            job = push(protocol, contribution, chunk).job
        assert isinstance(job, ReduceJob)
        assert protocol.reduction(chunk.index).done(job) is None


def decision_of(protocol: StepProtocol, skip: bool = False) -> Decision:
    return Decision(
        fence=protocol.fence,
        step=protocol.step,
        skip=skip,
        applied=protocol.applied + (not skip),
        skipped=0,
        loss=1.0,
        tokens=1,
        gradient_norm=1.0,
        loss_scale=protocol.loss_scale,
        gradient_multiplier=1.0,
        groups=(GroupScalars(0.1, 0.0),),
        bias_correction1=1.0,
        bias_correction2=1.0,
        next_loss_scale=SCALE / 2 if skip else SCALE,
        next_hysteresis=2,
        next_last_overflow=-1,
        snapshot=False,
    )


def test_fences_only_go_up() -> None:
    protocol = make_protocol()
    for older in (Fence(2, 2), Fence(1, 9), Fence(0, 0)):
        with pytest.raises(StaleFence):
            protocol.adopt(older)
        assert protocol.fence == FENCE
    protocol.adopt(FENCE)
    protocol.adopt(Fence(3, 0))
    assert protocol.fence == Fence(3, 0)


def test_what_is_held_and_missing() -> None:
    protocol = make_protocol()
    first, second, third = PLAN.chunks_of(0)
    assert (protocol.held(), protocol.missing()) == ([], [0, 1])
    push(protocol, 1, first)
    push(protocol, 1, third)
    assert protocol.held() == [(1, [first.index, third.index])]
    push(protocol, 1, second)
    assert protocol.missing() == [0]
    assert protocol.chunks_reduced == 0
    assert not protocol.all_reduced


def test_a_job_that_ends_after_its_step_is_forgotten_counts_for_nothing() -> None:
    protocol = make_protocol()
    first = PLAN.chunks_of(0)[0]
    for contribution in range(2):
        job = push(protocol, contribution, first).job
    assert job is not None
    late = protocol.reduction(first.index)
    protocol.close()
    assert not protocol.is_current(job, late)
    late.done(job)
    assert protocol.chunks_reduced == 0


def test_a_whole_step() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    assert protocol.all_reduced
    report = protocol.prepared((1.0,) * 3)
    assert (report.fence, report.step, report.shard) == (FENCE, 7, 0)
    assert [c.contribution for c in report.contributions] == [0, 1]
    chunks = protocol.decide(decision_of(protocol))
    assert chunks == list(PLAN.chunks_of(0))
    # Until the last chunk is published the step is not over, whatever the order.
    assert [protocol.published(chunk) for chunk in reversed(chunks)] == [False, False, True]
    assert (protocol.step, protocol.applied, protocol.deciding) == (8, 6, None)
    assert protocol.held() == []
    assert protocol.last_decision is not None
    assert protocol.last_decision.step == 7


def test_a_repeated_decision_is_harmless() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    decision = decision_of(protocol)
    chunks = protocol.decide(decision)
    assert protocol.decide(decision) == []
    protocol.published(chunks[0])
    assert protocol.decide(decision) == []
    for chunk in chunks[1:]:
        protocol.published(chunk)
    assert protocol.decide(decision) == []
    assert (protocol.step, protocol.applied) == (8, 6)


def test_a_decision_of_a_step_that_is_not_prepared_is_rejected() -> None:
    protocol = make_protocol()
    with pytest.raises(DecisionRejected, match="0 of 3 chunks"):
        protocol.decide(decision_of(protocol))
    reduce_all(protocol)
    with pytest.raises(DecisionRejected):
        protocol.decide(replace(decision_of(protocol), step=8))
    assert (protocol.step, protocol.deciding) == (7, None)
    assert protocol.decide(decision_of(protocol)) != []


@pytest.mark.parametrize("fence", [Fence(2, 2), Fence(1, 3), Fence(2, 4), Fence(3, 1)])
def test_a_decision_of_another_fence_is_refused(fence: Fence) -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    with pytest.raises(StaleFence):
        protocol.decide(replace(decision_of(protocol), fence=fence))
    assert protocol.deciding is None


def test_a_skip_opens_the_next_step_at_once() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    late = header_of(protocol, 0, PLAN.chunks[0], b"")
    assert protocol.decide(decision_of(protocol, skip=True)) == []
    assert (protocol.step, protocol.applied, protocol.loss_scale) == (8, 5, SCALE / 2)
    with pytest.raises(StepNotOpen):
        protocol.push(late, memoryview(b""), late.hash)
    with pytest.raises(WrongLossScale):
        protocol.push(replace(late, step=8), memoryview(b""), late.hash)


def test_while_a_decision_is_carried_out_pushes_of_the_next_step_are_too_early() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    protocol.decide(decision_of(protocol))
    payload = bytes(2 * PLAN.chunks[0].size)
    early = replace(header_of(protocol, 0, PLAN.chunks[0], payload), step=8)
    with pytest.raises(StepNotOpen):
        protocol.push(early, memoryview(payload), early.hash)


def test_a_change_of_epoch_keeps_what_is_held() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    newer = Fence(2, 4)
    protocol.adopt(newer)
    protocol.serve(7, 5, SCALE)
    assert protocol.all_reduced
    assert protocol.prepared((0.0,) * 3).fence == newer


def test_opening_with_another_loss_scale_forgets_what_is_held() -> None:
    protocol = make_protocol()
    push(protocol, 0, PLAN.chunks[0])
    protocol.serve(7, 5, 2 * SCALE)
    assert protocol.held() == []
    assert protocol.loss_scale == 2 * SCALE


def test_a_shard_that_is_one_decision_behind_stays_as_it_is() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    protocol.serve(8, 6, SCALE)
    assert (protocol.step, protocol.applied) == (7, 5)
    assert protocol.all_reduced


@pytest.mark.parametrize(("step", "applied"), [(7, 6), (6, 5), (9, 7), (0, 0)])
def test_a_shard_does_not_open_a_step_that_it_is_not_at(step: int, applied: int) -> None:
    protocol = make_protocol()
    protocol.serving = False
    with pytest.raises(DecisionRejected, match="version 7"):
        protocol.serve(step, applied, SCALE)
    assert not protocol.serving


def test_closing_forgets_the_open_step() -> None:
    protocol = make_protocol()
    reduce_all(protocol)
    protocol.decide(decision_of(protocol))
    protocol.close()
    assert (protocol.deciding, protocol.last_decision, protocol.serving) == (None, None, False)
    assert protocol.held() == []
    with pytest.raises(NotServing):
        push(protocol, 0, PLAN.chunks[0])
    assert not protocol.published(PLAN.chunks[0])


def test_initial_values() -> None:
    protocol = make_protocol(serving=False)
    protocol.adopt(FENCE)
    protocol.await_initial_values()
    protocol.serve(0, 0, SCALE)
    for position, chunk in enumerate(PLAN.chunks_of(0)):
        with pytest.raises(NotServing, match="initial values"):
            push(protocol, 0, chunk)
        payload = memoryview(bytes(4 * chunk.size))
        digest = hash_payload(payload)
        header = Initialize("run", FENCE.term, FENCE.epoch, 0, 1, chunk.index, digest)
        assert protocol.initialize(header, payload, digest) == (chunk, True)
        assert protocol.initialized(chunk) == (position == 2)
        assert protocol.initialize(header, payload, digest) == (chunk, False)
        assert not protocol.initialized(chunk)
    assert not protocol.awaiting_initial_values
    assert not push(protocol, 0, PLAN.chunks[0]).duplicate


def test_presence_is_the_union_over_contributions() -> None:
    plan = make_plan(table_of([10] * 11), 1)
    protocol = StepProtocol(plan, 0, StepShape("run", 4, 2, WireDtype.FP16))
    protocol.restored(0, 0, SCALE)
    protocol.serve(0, 0, SCALE)
    (chunk,) = plan.chunks
    payload = bytes(2 * chunk.size)
    for contribution, present in enumerate((b"\x05\x00", b"\x04\x04")):
        header = replace(header_of(protocol, contribution, chunk, payload), present=present)
        protocol.push(header, memoryview(payload), header.hash)
    assert np.flatnonzero(protocol.present(chunk)).tolist() == [0, 2, 10]


# -- The engine around it, with real kernels ----------------------------------------------------


def test_a_repeated_decision_repeats_the_acknowledgement(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        decision = shard.decision(shard.push_step())
        applied = shard.tell(decision)
        weights = shard.weights().copy()
        for _ in range(3):
            shard.engine.decide(decision)
            assert shard.told.applied.get(timeout=TIMEOUT_S) == applied
        np.testing.assert_array_equal(shard.weights(), weights)
        assert shard.engine.protocol.step == 1
        # The one before the last is long acknowledged: silence.
        shard.run_step()
        shard.engine.decide(decision)
        assert shard.told.applied.empty()


def test_a_decision_told_many_times_at_once_is_carried_out_once(tmp_path: Path) -> None:
    with rig(make_config(tmp_path / "a", threads=2)) as shard, rig(make_config(tmp_path / "b")) as calm:
        decision = shard.decision(shard.push_step())
        in_threads(*[lambda: shard.engine.decide(decision)] * 8)
        applied = shard.told.applied.get(timeout=TIMEOUT_S)
        assert applied.state_hash == calm.run_step().state_hash


def test_wrong_decisions_leave_the_engine_as_it_is(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        before = shard.engine.store.state_hash
        decision = replace(shard.decision(shard.push_step()), step=0)
        for wrong, error in (
            (replace(decision, fence=Fence(1, 0)), StaleFence),
            (replace(decision, fence=Fence(1, 2)), StaleFence),
            (replace(decision, step=1), DecisionRejected),
        ):
            with pytest.raises(error):
                shard.engine.decide(wrong)
        assert shard.engine.store.state_hash == before
        shard.tell(decision)
        with pytest.raises(DecisionRejected):
            shard.engine.decide(replace(decision, step=1))
        assert shard.run_step().step == 1


def test_an_epoch_change_in_mid_step_loses_nothing(tmp_path: Path) -> None:
    with rig(make_config(tmp_path / "a")) as shard, rig(make_config(tmp_path / "b")) as calm:
        header, payload = shard.push(0, shard.chunks[0])
        shard.engine.push(header, payload)
        shard.fence = Fence(2, 5)
        shard.seat.adopt(shard.fence)
        with pytest.raises(StaleFence):
            shard.engine.push(header, payload)
        shard.seat.serve(shard.fence, 0, 0, shard.state.scaler.scale)
        assert shard.engine.protocol.held() == [(0, [0])]
        applied = shard.run_step()
        assert applied == Applied(Fence(2, 5), 0, 0, calm.run_step().state_hash)


def test_a_prepared_step_is_reported_again_under_a_new_fence(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        report = shard.push_step()
        shard.engine.resend()
        assert shard.told.prepared.get(timeout=TIMEOUT_S) == report
        shard.fence = Fence(2, 2)
        shard.seat.serve(shard.fence, 0, 0, shard.state.scaler.scale)
        again = shard.told.prepared.get(timeout=TIMEOUT_S)
        assert again == replace(report, fence=Fence(2, 2))
        shard.tell(shard.decision(again))


def test_an_acknowledgement_of_an_older_fence_is_not_told_again(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        applied = shard.run_step()
        shard.engine.resend()
        assert shard.told.applied.get(timeout=TIMEOUT_S) == applied
        shard.seat.adopt(Fence(2, 2))
        shard.engine.resend()
        assert shard.told.applied.empty()


def test_loading_a_damaged_checkpoint_leaves_a_shard_that_can_load_another(tmp_path: Path) -> None:
    with rig(make_config(tmp_path)) as shard:
        shard.run_step()
        with pytest.raises(PsError):
            shard.seat.load(Fence(1, 2), tmp_path / "nothing", "")
        assert not shard.engine.has_state
        with pytest.raises(NotServing):
            shard.engine.push(*shard.push(0, shard.chunks[0], term=1, epoch=2))
        fence = Fence(1, 3)
        shard.seat.load(fence, None, "")
        shard.seat.serve(fence, 0, 0, 2.0**16)
        shard.fence, shard.state = fence, type(shard.state).start(shard.config)
        for chunk in shard.chunks:
            shard.engine.initialize(*shard.initial(chunk))
        assert shard.run_step().step == 0
