"""A shard and its standby, with real kernels and a stream that can be cut: the same state after every step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.errors import StaleFence
from ps.shard import follower as follower_module
from ps.shard import replicator as replicator_module
from ps.shard.engine import ShardEngine
from ps.shard.follower_stream import FollowerStream
from ps.shard.records import Reduced
from ps.shard.replicator import Link
from ps.shard.seat import Seat
from ps.sharding import Chunk
from ps.types import Applied, Fence, Prepared
from ps.wire import frame
from ps.wire.messages import Mirror, parse_from_standby, parse_to_standby
from tests.support.eventually import eventually
from tests.support.shards import FENCE, RUN, TABLE, TIMEOUT_S, Rig, Told, make_config, rig

LIFE = 4242


class Pipe:
    """A stream to a standby in this process: a thread each way, as gRPC has them."""

    def __init__(self, standby: Seat, on_frame: Callable[[bytes], None], on_close: Callable[[str], None]) -> None:
        self._talk = FollowerStream(standby, LIFE)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._on_frame, self._on_close = on_frame, on_close
        self._is_cut = False
        #: Frames that may arrive before `opened`; then all.
        self.passing = -1
        self.opened = threading.Event()
        #: Frames are taken at all.
        self.has_room = threading.Event()
        self.has_room.set()
        #: The kind of the last one that has.
        self.received = ""
        for work in (self._take, self._answer):
            threading.Thread(target=work, daemon=True).start()

    def send(self, encoded: bytes, timeout_s: float) -> bool:
        if not self.has_room.wait(timeout_s):
            return False
        self._frames.put(encoded)
        return True

    def _take(self) -> None:
        while (data := self._frames.get()) is not None and not self._is_cut:
            if self.passing == 0:
                assert self.opened.wait(TIMEOUT_S)
            self.passing -= 1
            self._talk.receive(data)
            self.received = parse_to_standby(frame.decode(data)[0]).kind

    def _answer(self) -> None:
        for answer in self._talk.replies():
            if not self._is_cut:
                self._on_frame(answer)
        self._on_close("cut")

    def close(self) -> None:
        self._is_cut = True
        self._frames.put(None)
        self._talk.close()


class Pair:
    """A shard at work, and an engine that follows it."""

    def __init__(self, shard: Rig) -> None:
        self.shard = shard
        self.told = Told()
        self.standby = ShardEngine(shard.config, RUN, TABLE, 0, shard.contributions)
        self.standby.outbox = self.told.outbox()
        self.seat = Seat(self.standby)
        self.pipes: list[Pipe] = []

    def attach(self, keep: bool = False) -> None:
        """What the coordinator does: the standby follows, and the shard hears of it."""
        state, fence = self.shard.state, self.shard.fence
        self.seat.follow(fence, state.version, state.applied, state.scaler.scale, keep)
        plan = self.standby.plan.digest
        self.shard.seat.replicate(Mirror(RUN, plan, fence.term, fence.epoch, 0, 1, LIFE), "somewhere", self._open)

    def detach(self) -> None:
        fence = self.shard.fence
        greeting = Mirror(RUN, self.standby.plan.digest, fence.term, fence.epoch, 0, 1, 0)
        self.shard.seat.replicate(greeting, "", self._open)

    def _open(self, _address: str, on_frame: Any, on_close: Any) -> Any:
        self.pipes.append(Pipe(self.seat, on_frame, on_close))
        return self.pipes[-1]

    @property
    def is_joined(self) -> bool:
        link = self.shard.engine.mirroring.link
        return link is not None and link.is_joined

    def await_joined(self) -> None:
        eventually(lambda: self.is_joined, TIMEOUT_S, "the standby to be joined")

    def step(self, **changes: Any) -> tuple[Prepared, Applied, Applied]:
        """A whole step: the report that the decision is made from, and both acknowledgements."""
        report = self.push_step()
        return (report, *self.decide(report, **changes))

    def push_step(self) -> Prepared:
        """All of a step; the first report of it."""
        for header, payload in self.shard.pushes():
            self.shard.engine.push(header, payload)
        while (report := self.shard.told.next_prepared()).step < self.shard.state.version:
            # That of the step before was told again, when its standby had caught up.
            pass
        return report

    def decide(self, report: Prepared, **changes: Any) -> tuple[Applied, Applied]:
        decision = self.shard.decision(report, **changes)
        self.seat.decide(decision)
        return self.shard.tell(decision), self.followed(decision.step)

    def followed(self, step: int) -> Applied:
        """What the standby says of a step, once it has gone on to the next one."""
        while (applied := self.told.applied.get(timeout=TIMEOUT_S)).step < step:
            pass
        return applied

    def fill(self) -> None:
        """Steps until the standby could take over."""
        self.await_joined()
        for _ in range(20):
            report, mine, its = self.step()
            if report.standby:
                assert its.state_hash == mine.state_hash
                return
        raise AssertionError("the standby is never whole")

    def assert_same(self) -> None:
        mine, its = self.shard.engine.store, self.standby.store
        assert its.state_hash == mine.state_hash
        for chunk in self.shard.chunks:
            for name, array in mine.arrays(chunk).items():
                assert (its.arrays(chunk)[name] == array).all(), name
            published = [store.frame(chunk, store.published[chunk.index]) for store in (mine, its)]
            assert published[0] == published[1]

    def close(self) -> None:
        self.standby.close()
        for pipe in self.pipes:
            pipe.close()
        assert self.told.failures == []


@pytest.fixture(params=["fp16", "bf16"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with rig(make_config(tmp_path, wire=request.param, threads=2)) as shard:
        made = Pair(shard)
        try:
            yield made
        finally:
            made.close()


def test_a_standby_is_filled_while_the_run_goes_on_and_stays_the_same(pair: Pair) -> None:
    for _ in range(2):
        pair.shard.run_step()
    pair.attach()
    pair.fill()
    pair.assert_same()
    assert pair.standby.has_state
    for _ in range(3):
        report, mine, its = pair.step()
        assert report.standby == LIFE
        assert (its.step, its.state_hash) == (mine.step, mine.state_hash)
        pair.assert_same()


def test_a_skipped_step_leaves_both_as_they_are(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    scale = pair.shard.state.scaler.scale
    pair.step(skip=True, applied=pair.shard.state.applied, gradient_multiplier=0.0, next_loss_scale=scale / 2)
    pair.assert_same()
    assert pair.standby.protocol.loss_scale == pair.shard.engine.protocol.loss_scale == scale / 2
    # What it holds is held.
    assert pair.step()[0].standby == LIFE
    pair.assert_same()


def test_a_decision_comes_between_two_arrays_of_a_chunk(pair: Pair) -> None:
    pair.attach()
    pair.await_joined()
    pipe = pair.pipes[-1]
    decision = pair.shard.decision(pair.push_step())
    # That of this step, and one array of a chunk.
    pipe.passing = 2
    pair.shard.tell(decision)
    assert pair.followed(decision.step).step == decision.step
    eventually(lambda: pipe.received == "state", TIMEOUT_S, "an array to come")
    pair.shard.run_step()
    pipe.opened.set()
    assert pair.followed(decision.step + 1).step == decision.step + 1
    pair.fill()
    pair.assert_same()


def test_a_standby_goes_on_by_what_its_shard_was_told(pair: Pair) -> None:
    """Filled or not, it need not hear the coordinator itself to hold what comes next."""
    pair.attach()
    pair.await_joined()
    for _ in range(3):
        decision = pair.shard.decision(pair.push_step())
        pair.shard.tell(decision)
        assert pair.followed(decision.step).step == decision.step
    pair.fill()
    pair.shard.tell(decision := pair.shard.decision(pair.push_step()))
    pair.told.applied.get(timeout=TIMEOUT_S)
    # Heard from the coordinator as well, it is only acknowledged again.
    pair.seat.decide(decision)
    assert pair.followed(decision.step).step == decision.step
    pair.assert_same()


def test_a_decision_that_comes_too_early_is_left_to_the_shard(pair: Pair) -> None:
    pair.attach()
    pair.await_joined()
    pair.step()
    # It has been sent the state of every chunk, and has not said so.
    pair.pipes[-1].passing = 0
    decision = pair.shard.decision(pair.push_step())
    # What is reduced of its step is still on its way: it must not make the standby begin anew.
    pair.seat.decide(decision)
    held = pair.standby.follower.doing if pair.standby.follower else ""
    pair.pipes[-1].opened.set()
    pair.shard.tell(decision)
    assert pair.followed(decision.step).step == decision.step
    assert (f"step {decision.step}:" in held, len(pair.pipes)) == (True, 1)
    pair.fill()
    pair.assert_same()


def test_an_empty_standby_costs_no_pause(pair: Pair) -> None:
    pair.attach()
    pair.await_joined()
    pair.pipes[-1].passing = 0
    # It has none of this, though all of it is sent: the state of every chunk, and what is reduced.
    for _ in range(3):
        report = pair.push_step()
        assert report.standby == 0
        pair.shard.tell(pair.shard.decision(report))
    assert (pair.pipes[-1].received, len(pair.pipes)) == ("mirror", 1)
    pair.pipes[-1].opened.set()
    pair.fill()
    pair.assert_same()


def test_a_standby_that_is_too_far_behind_slows_the_shard_down(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator_module, "MAX_BEHIND", 0)
    monkeypatch.setattr(replicator_module, "MAX_DECISIONS_BEHIND", 0)
    monkeypatch.setattr(replicator_module.Link, "wants_state", _only_the_first)
    pair.attach()
    pair.await_joined()
    pipe = pair.pipes[-1]
    pipe.has_room.clear()
    pair.shard.run_step()
    for header, payload in pair.shard.pushes():
        pair.shard.engine.push(header, payload)
    with pytest.raises(queue.Empty):
        pair.shard.told.prepared.get(timeout=0.3)
    pipe.has_room.set()
    assert pair.shard.told.next_prepared().standby == 0
    assert len(pair.pipes) == 1


def test_the_shard_does_not_wait_for_a_standby_that_has_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator_module, "STALL_S", 0.3)
    pair.attach()
    pair.fill()
    pair.pipes[-1].passing = 0
    report = pair.push_step()
    assert report.standby == 0
    pair.pipes[0].opened.set()


def test_a_stream_that_breaks_in_mid_step_is_made_good(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    first, *rest = pair.shard.pushes()
    pair.shard.engine.push(*first)
    pair.pipes[-1].close()
    for header, payload in rest:
        pair.shard.engine.push(header, payload)
    report = pair.shard.told.next_prepared()
    while not report.standby:
        # It was told that nothing is known of the standby; then, once that is back, that it holds everything.
        report = pair.shard.told.next_prepared()
    mine, its = pair.decide(report)
    assert mine.state_hash == its.state_hash
    assert len(pair.pipes) >= 2
    pair.assert_same()


def test_a_standby_that_missed_a_step_begins_anew(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    pair.detach()
    for _ in range(2):
        assert pair.shard.run_step().step
    pair.attach(keep=True)
    eventually(lambda: not pair.standby.has_state, TIMEOUT_S, "the standby to hear of it")
    pair.fill()
    pair.assert_same()


def test_the_shard_waits_for_its_standby_until_there_is_none_any_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.attach()
    pair.fill()
    monkeypatch.setattr(follower_module.Follower, "take_reduced", lambda *_: False)
    for header, payload in pair.shard.pushes():
        pair.shard.engine.push(header, payload)
    with pytest.raises(queue.Empty):
        pair.shard.told.prepared.get(timeout=0.3)
    pair.detach()
    assert pair.shard.told.next_prepared().standby == 0


def test_a_standby_serves_on_with_what_it_holds_of_the_open_step(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    report = pair.push_step()
    assert report.standby == LIFE
    state, fence = pair.shard.state, Fence(FENCE.term, FENCE.epoch + 1)
    pair.seat.adopt(fence)
    assert (pair.standby.has_state, pair.standby.protocol.step) == (True, state.version)
    pair.seat.serve(fence, state.version, state.applied, state.scaler.scale)
    again = pair.told.next_prepared()
    assert (again.fence, again.standby) == (fence, 0)
    assert (again.square_sums, again.contributions) == (report.square_sums, report.contributions)
    # Whoever pushes it again is told that it is held already, and with other bits that it differs.
    pair.shard.fence = fence
    header, payload = pair.shard.push(0, pair.shard.chunks[0])
    accepted = pair.standby.push(header, payload)
    assert (accepted.duplicate, accepted.conflicting, accepted.whole) == (True, False, True)
    chunk = pair.shard.chunks[0]
    header, payload = pair.shard.push(0, chunk, np.zeros(chunk.size, pair.shard.dtype.numpy))
    assert pair.standby.push(header, payload).conflicting
    # Of the one whose place it has taken it hears nothing any more.
    assert pair.standby.follower is None
    decision = pair.shard.decision(again)
    pair.standby.decide(decision)
    assert pair.followed(decision.step).step == decision.step


def test_a_standby_that_takes_over_asks_for_a_checkpoint_to_begin_its_journal_with(tmp_path: Path) -> None:
    with rig(make_config(tmp_path, threads=2, durability="journal")) as shard:
        pair = Pair(shard)
        try:
            pair.attach()
            pair.fill()
            pair.push_step()
            state, fence = shard.state, Fence(FENCE.term, FENCE.epoch + 1)
            shard.seat.adopt(fence)
            pair.seat.serve(fence, state.version, state.applied, state.scaler.scale)
            assert pair.told.next_prepared().journal_full
            journal = pair.standby.journal
            journal.begin(pair.standby.base())
            assert not journal.is_full
        finally:
            pair.close()


def test_a_standby_that_holds_some_chunks_says_that_it_holds_no_state(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One chunk at a time.
    monkeypatch.setattr(replicator_module, "MAX_STATE", 1)
    monkeypatch.setattr(replicator_module.Link, "wants_state", _only_the_first)
    pair.attach()
    pair.await_joined()
    for _ in range(3):
        report, _, its = pair.step()
        assert (report.standby, its.state_hash) == (0, 0)
    assert not pair.standby.has_state
    chunk = pair.shard.chunks[0]
    assert (pair.standby.store.weights(chunk) == pair.shard.engine.store.weights(chunk)).all()


def _only_the_first(link: Any, chunk: Any) -> bool:
    return bool(link.is_joined and not link.holds(chunk) and chunk.index == 0)


def test_what_an_older_fence_says_is_refused(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    newer = Fence(FENCE.term, FENCE.epoch + 1)
    pair.seat.follow(newer, 0, 0, 1.0, True)
    decision = pair.shard.decision(pair.push_step())
    with pytest.raises(StaleFence):
        pair.seat.decide(decision)
    pipes = len(pair.pipes)
    pair.pipes[-1].close()
    eventually(lambda: len(pair.pipes) > pipes + 1, TIMEOUT_S, "the shard to try again")
    assert not pair.is_joined
    with pytest.raises(StaleFence, match="a standby under"):
        pair.shard.seat.replicate(Mirror(RUN, "", newer.term, newer.epoch, 0, 1, LIFE), "x", pair._open)


def test_what_the_shard_sends_under_an_older_fence_is_not_taken(pair: Pair) -> None:
    pair.attach()
    pair.fill()
    state, newer = pair.shard.state, Fence(FENCE.term, FENCE.epoch + 1)
    # The shard is cut off: it has not heard of the epoch under which the standby keeps what it holds.
    pair.seat.follow(newer, state.version, state.applied, state.scaler.scale, True)
    report = pair.push_step()
    assert (report.fence, report.standby) == (FENCE, 0)
    assert not any(pair.standby.protocol.reduction(chunk.index).reduced for chunk in pair.shard.chunks)
    assert not pair.standby.protocol.all_reduced


def test_a_refusal_is_the_last_answer_on_a_stream(pair: Pair) -> None:
    pair.attach()
    talk = FollowerStream(pair.seat, LIFE)
    talk.receive(b"\x0a\x00")
    answers = [parse_from_standby(frame.decode(answer)[0]) for answer in talk.replies()]
    assert [answer.kind for answer in answers] == ["refused"]
    # What comes after it is not looked at.
    talk.receive(b"\x0a\x00")
    assert talk._answers.empty()


def test_state_that_waits_is_counted_apart_from_the_rest() -> None:
    """What is reduced goes first here; the state behind it still waits, and no more of it is wanted."""
    link = Link(LIFE)
    link.joined({0}, set(), 3)
    first, second, third = (Chunk(index, 0, 0, 1, ()) for index in range(3))
    assert link.wants_reduced(first)
    link.send_reduced(Reduced(5, 0, 1.0, b"", (), (), ()), np.zeros(replicator_module.MAX_STATE // 4, np.float32))
    link.send_state(second, [bytes(replicator_module.MAX_STATE)])
    assert not link.wants_state(third)

    class OneFrame:
        sent = 0

        def send(self, _frame: bytes, _timeout_s: float) -> bool:
            self.sent += 1
            if self.sent > 1:
                link._broken.set()
            return self.sent == 1

        def close(self) -> None:
            pass

    link.drain(OneFrame(), lambda: None)
    link._broken.clear()
    assert not link.wants_state(third)


def test_what_a_standby_holds_of_a_step_ends_with_its_loss_scale(pair: Pair) -> None:
    """A coordinator that starts anew may have the open step computed again, with another loss scale."""
    pair.attach()
    pair.fill()
    assert pair.push_step().standby == LIFE
    assert pair.standby.protocol.all_reduced
    state, newer = pair.shard.state, Fence(FENCE.term, FENCE.epoch + 1)
    pair.seat.follow(newer, state.version, state.applied, 8.0, True)
    assert (pair.standby.protocol.loss_scale, pair.standby.protocol.chunks_reduced) == (8.0, 0)
    assert pair.standby.has_state
