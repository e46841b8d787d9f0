"""What a worker does next, what it waits for, and when it leaves what it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Fence, Member
from ps.client.duty import Duty, Interrupted
from ps.client.links import Said
from ps.client.pusher import Contribution
from ps.errors import WrongDtype
from ps.sharding import Chunk, make_plan
from ps.types import WireDtype
from ps.wire import frame
from ps.wire.messages import Ack, Refused, Weights, Welcome
from tests.support.eventually import eventually
from tests.support.voice import CONTRIBUTIONS, SLOTS, TABLE, Client

TIMEOUT_S = 10.0


class Bench:
    """A worker's duty, and the voices of its coordinator and its shard."""

    def __init__(self, layerwise: bool = True, eager: bool = False) -> None:
        self.shard = Client()
        #: The version of which each chunk is.
        self.chunks = [-1] * 3
        self.shard.source.decode = self._decode  # type: ignore[method-assign]
        self._version = -1
        self.sent: list[dict[str, Any]] = []
        #: What it has said that it does.
        self.said: list[str] = []

        def doing(text: str, _transport: str) -> None:
            self.said.append(text)

        session: Any = SimpleNamespace(run="run", send=lambda **event: self.sent.append(event), doing=doing)
        client = self.shard.parameters
        #: Seconds that pushing took beyond computing.
        self.push_s: list[float] = []
        self.duty = Duty(
            session,
            self.shard.inbox,
            client,
            SLOTS,
            WireDtype.FP16,
            layerwise=layerwise,
            eager=eager,
            on_pushed=self.push_s.append,
        )
        self.pulled = client.pulled

    def _decode(self, chunk: Chunk, _payload: Any) -> None:
        self.chunks[chunk.index] = self._version

    def say(self, **event: Any) -> None:
        self.shard.inbox.put(Said(pb.SessionResponse(**event)))

    def serve(self, epoch: int = 1, step: int = 5) -> None:
        digest = make_plan(TABLE, 1).digest
        shards = [Member(role="shard", address="shard:1")]
        fence = Fence(term=1, epoch=epoch)
        self.say(cluster=pb.Cluster(fence=fence, plan_digest=digest, shards=shards, contributions=CONTRIBUTIONS))
        self.duty.take(0.0)
        self.hear(Welcome(0, 9, 1, epoch, step, step, []))

    def deal(self, step: int, *contributions: int, epoch: int = 1, done: tuple[int, ...] = ()) -> None:
        fence = Fence(term=1, epoch=epoch)
        work = pb.Deal(fence=fence, step=step, applied=step, loss_scale=4.0, contributions=contributions, done=done)
        self.say(deal=work)

    def hear(self, header: Any) -> None:
        """The shard says something that is no weights."""
        self.shard.stream.say(frame.encode(header.pack()))
        self.duty.take(0.0)

    def bring(self, version: int, *chunks: int) -> None:
        """The stream brings weights; in the caller's thread, which is kept waiting while they may not come."""
        self._version = version
        for chunk in chunks:
            size = self.shard.parameters.plan.chunks[chunk].size
            self.shard.stream.say(frame.encode(Weights(version, chunk, "fp16").pack(), bytes(2 * size)))

    def ready(self) -> bool:
        self.duty.take(0.0)
        return self.duty.ready() is not None

    def await_chunks(self, *chunks: int) -> None:
        self.duty.await_weights([self.shard.parameters.plan.chunks[chunk] for chunk in chunks])

    def contribute(self, contribution: int) -> None:
        """As a worker does, once it is ready; most chunks are pushed while it computes."""
        self.duty.forget_gradient()
        begun = self.begin(contribution)
        self.shard.parameters._pusher.settle()
        self.duty.done()
        self.duty.push(begun, 0.0)
        self.shard.parameters._pusher.settle()

    def begin(self, contribution: int) -> Contribution:
        self.duty.await_weights(None)
        begun = self.duty.begin_push(contribution, lambda: (1.0, 1))
        for chunk in self.shard.parameters.plan.chunks:
            self.duty.push_chunk(begun, chunk)
        return begun


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.shard.parameters.close()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_who_is_dealt_nothing_says_so(bench: Bench) -> None:
    bench.serve()
    bench.deal(5)
    bench.duty.take(0.0)
    assert bench.said[-1] == "step 5: spare: others compute it"
    bench.deal(5, 1)
    assert not bench.ready()
    assert bench.said[-1] == "step 5: waiting for weights"


def test_the_first_weights_are_enough_where_layers_wait_for_theirs(bench: Bench) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    assert bench.shard.kinds[-1] == "pull"
    bench.bring(5, 1)
    assert bench.ready()
    bench.await_chunks(1)
    bench.await_chunks()
    stream = in_thread(partial(bench.bring, 5, 0, 2))
    bench.await_chunks(0, 2)
    stream.join(TIMEOUT_S)
    bench.duty.await_weights(None)
    assert bench.chunks == [5] * 3
    assert bench.duty.waited() >= 0
    assert bench.duty.waited() == 0.0


def test_where_they_do_not_all_weights_are_waited_for() -> None:
    bench = Bench(layerwise=False)
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0, 1)
    assert not bench.ready()
    bench.bring(5, 2)
    assert bench.ready()
    bench.shard.parameters.close()


def test_more_work_of_the_same_step_is_heard_while_weights_are_waited_for(bench: Bench) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0)
    assert bench.ready()
    bench.deal(5, 1)
    dealt = bench.duty.dealt
    assert dealt is not None

    def bring_once_it_is_heard() -> None:
        eventually(lambda: dealt.pending == [0, 1], TIMEOUT_S, "the deal to be heard")
        bench.bring(5, 1, 2)

    stream = in_thread(bring_once_it_is_heard)
    bench.await_chunks(2)
    stream.join(TIMEOUT_S)
    assert dealt.pending == [0, 1]


def a_new_fence(bench: Bench) -> None:
    bench.say(
        cluster=pb.Cluster(
            fence=Fence(term=1, epoch=2),
            plan_digest=bench.shard.parameters.plan.digest,
            shards=[Member(role="shard", address="shard:1")],
            contributions=CONTRIBUTIONS,
        )
    )


def the_next_step(bench: Bench) -> None:
    bench.deal(6, 1)


def the_end(bench: Bench) -> None:
    bench.say(end=pb.End(ok=True, reason="finished"))


def the_pull_is_gone(bench: Bench) -> None:
    bench.shard.stream.say(frame.encode(Refused("VERSION_GONE", "version 5 is gone", 5, -1, -1).pack()))


@pytest.mark.parametrize("what", [a_new_fence, the_next_step, the_end, the_pull_is_gone])
def test_a_forward_is_left_when_its_weights_do_not_come_any_more(bench: Bench, what: Callable[[Bench], None]) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0)
    assert bench.ready()
    what(bench)
    with pytest.raises(Interrupted, match="step 5"):
        bench.await_chunks(2)
    bench.duty.done()
    if bench.duty.end is None:
        assert not bench.ready(), "what is torn is not used"


def test_a_refusal_is_heard_while_weights_are_waited_for(bench: Bench) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0)
    assert bench.ready()
    bench.shard.stream.say(frame.encode(Refused("WRONG_DTYPE", "bf16", 5, 0, 0).pack()))
    with pytest.raises(WrongDtype, match="bf16"):
        bench.await_chunks(2)


def test_after_a_rollback_in_mid_forward_the_older_weights_are_computed_with(bench: Bench) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0)
    assert bench.ready()
    a_new_fence(bench)
    bench.deal(3, 0, epoch=2)
    with pytest.raises(Interrupted):
        bench.await_chunks(1)
    bench.duty.done()
    bench.hear(Welcome(0, 9, 1, 2, 3, 3, []))
    # Late, and of the fence before.
    bench.bring(5, 1, 2)
    assert bench.chunks == [5, -1, -1]
    assert not bench.ready()
    bench.bring(3, 0, 1, 2)
    assert bench.ready()
    assert bench.chunks == [3] * 3


def push_step(bench: Bench) -> None:
    """Step 5 is pushed, and step 6 asked for."""
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0, 1, 2)
    assert bench.ready()
    bench.contribute(0)
    assert bench.shard.pushed == [(0, 0), (0, 1), (0, 2)]
    assert bench.pulled.pulling_of(0) == (6, 5)


def test_work_of_this_step_while_the_next_is_asked_for(bench: Bench) -> None:
    """Another worker died. The weights of the next step wait, and behind them whatever its stream says."""
    push_step(bench)
    bench.deal(5, 1)
    assert bench.ready()
    stream = in_thread(partial(bench.bring, 6, 0))
    behind = in_thread(lambda: (stream.join(), bench.shard.stream.say(frame.encode(Ack(5, 0, -1).pack()))))
    stream.join(0.2)
    assert stream.is_alive()
    assert bench.chunks == [5] * 3
    bench.contribute(1)
    assert bench.shard.pushed[3:] == [(1, 0), (1, 1), (1, 2)]
    for thread in (stream, behind):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    bench.duty.take(0.0)
    assert [event["contributed"].contribution for event in bench.sent] == [0]
    assert bench.chunks == [6, 5, 5]


def test_work_of_a_step_whose_weights_are_not_there_any_more_is_not_done(bench: Bench) -> None:
    """It is decided, or the next weights would not come."""
    push_step(bench)
    bench.bring(6, 0)
    bench.deal(5, 1)
    assert not bench.ready()
    assert bench.pulled.comes(6)
    bench.deal(6, 0)
    assert bench.ready()


def test_where_steps_are_eager_it_is_done_with_weights_that_are_pulled_again() -> None:
    bench = Bench(eager=True)
    push_step(bench)
    bench.bring(6, 0)
    bench.deal(5, 1)
    assert not bench.ready()
    assert bench.pulled.pulling_of(0) == (5, -1)
    # Of the pull of before, and still on its way.
    bench.bring(6, 1)
    assert bench.chunks == [6, 5, 5]
    bench.bring(5, 0, 1, 2)
    assert bench.ready()
    assert bench.shard.source.discarded == 0, "the other contribution is of this step, too"
    assert bench.shard.parameters._pusher.buffered is not None
    bench.contribute(1)
    assert bench.pulled.pulling_of(0) == (6, 5)
    bench.shard.parameters.close()


def test_a_shard_that_takes_nothing_does_not_keep_the_worker_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs while the gradient has to be sent, before the next contribution overwrites it."""
    push_step(bench)
    bench.deal(5, 1)
    assert bench.ready()
    goes_on = threading.Event()
    monkeypatch.setattr(bench.shard.stream, "send", lambda *_: goes_on.is_set())
    bench.begin(1)
    settling = in_thread(bench.duty.forget_gradient)
    settling.join(0.2)
    assert settling.is_alive()
    # Somebody else serves in its place.
    a_new_fence(bench)
    settling.join(TIMEOUT_S)
    assert not settling.is_alive()
    goes_on.set()
    bench.duty.take(0.0)
    assert bench.duty.fences == 2


def test_a_shard_that_lost_a_gradient_that_is_gone_has_it_computed_again(bench: Bench) -> None:
    push_step(bench)
    bench.deal(5, 1)
    assert bench.ready()
    bench.contribute(1)
    bench.hear(Welcome(0, 9, 1, 1, 5, 5, [[0, b"\x01"]]))
    bench.shard.parameters._pusher.settle()
    assert bench.shard.pushed[6:] == [(1, 0), (1, 1), (1, 2)], "that one is still there"
    assert bench.ready()
    assert bench.duty.dealt is not None
    assert bench.duty.dealt.pending == [0]
    bench.contribute(0)
    assert bench.shard.pushed[9:] == [(0, 1), (0, 2)]


def test_what_was_sent_while_it_was_computed_took_no_time(bench: Bench) -> None:
    push_step(bench)
    bench.hear(Ack(5, 0, -1))
    (contributed,) = [event["contributed"] for event in bench.sent]
    assert (contributed.contribution, contributed.push_s) == (0, 0.0)
    assert bench.push_s == [0.0]


def test_what_was_not_took_until_it_was_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    push_step(bench)
    bench.deal(5, 1)
    assert bench.ready()
    goes_on = threading.Event()
    send = bench.shard.stream.send
    monkeypatch.setattr(bench.shard.stream, "send", lambda *frame: goes_on.wait(TIMEOUT_S) and send(*frame))
    begun = bench.begin(1)
    bench.duty.done()
    bench.duty.push(begun, 0.0)
    goes_on.set()
    bench.shard.parameters._pusher.settle()
    for contribution in (0, 1):
        bench.hear(Ack(5, contribution, -1))
    found = {event["contributed"].contribution: event["contributed"].push_s for event in bench.sent}
    assert found[0] == 0.0
    assert found[1] > 0.0
    assert bench.push_s == list(found.values())


def test_what_a_forward_waited_that_was_left_is_not_the_next_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve()
    bench.deal(5, 0)
    assert not bench.ready()
    bench.bring(5, 0)
    assert bench.ready()
    with monkeypatch.context() as patched:
        patched.setattr(bench.duty, "take", lambda _timeout_s: bench.bring(5, 1))
        bench.await_chunks(1)
    the_pull_is_gone(bench)
    with pytest.raises(Interrupted):
        bench.await_chunks(2)
    bench.duty.done()
    assert not bench.ready()
    bench.bring(5, 0, 1, 2)
    assert bench.ready()
    assert bench.duty.waited() == 0.0


def at_work(bench: Bench, *contributions: int) -> None:
    """The weights of step 5 are there, and the first of these is computed."""
    bench.serve()
    bench.deal(5, *contributions)
    assert not bench.ready()
    bench.bring(5, 0, 1, 2)
    assert bench.ready()


def test_what_somebody_else_has_finished_is_left_in_the_middle_of_a_forward(bench: Bench) -> None:
    at_work(bench, 0, 1)
    bench.await_chunks(0)
    bench.deal(5, done=(0,))
    with pytest.raises(Interrupted, match="somebody else has finished contribution 0"):
        bench.await_chunks(1)
    bench.duty.done()
    assert bench.ready()
    assert bench.duty.dealt is not None
    assert bench.duty.dealt.pending == [1]
    bench.contribute(1)
    assert bench.shard.pushed == [(1, 0), (1, 1), (1, 2)]
    assert bench.pulled.pulling_of(0) == (6, 5)


def test_what_somebody_else_has_finished_is_not_begun(bench: Bench) -> None:
    at_work(bench, 0, 1)
    bench.deal(5, done=(1,))
    bench.contribute(0)
    assert bench.shard.pushed == [(0, 0), (0, 1), (0, 2)]
    assert not bench.ready()
    assert bench.pulled.pulling_of(0) == (6, 5)


def test_that_another_contribution_is_finished_does_not_matter(bench: Bench) -> None:
    at_work(bench, 0)
    bench.deal(5, done=(1,))
    bench.await_chunks(1)
    bench.contribute(0)
    assert bench.shard.pushed == [(0, 0), (0, 1), (0, 2)]


def test_the_next_step_ends_a_forward_whose_weights_are_all_there(bench: Bench) -> None:
    at_work(bench, 0)
    bench.await_chunks(0)
    bench.deal(6)
    with pytest.raises(Interrupted, match="step 5"):
        bench.await_chunks(1)


def test_what_somebody_else_has_finished_is_not_sent_again(bench: Bench) -> None:
    push_step(bench)
    bench.deal(5, done=(0,))
    bench.duty.take(0.0)
    bench.hear(Welcome(0, 9, 1, 1, 5, 5, [[0, b"\x01"]]))
    assert not bench.ready()
    assert bench.shard.pushed == [(0, 0), (0, 1), (0, 2)]


def test_what_was_finished_and_is_dealt_again_is_computed(bench: Bench) -> None:
    """A shard has lost what it held, or somebody was wrong."""
    at_work(bench, 0, 1)
    bench.deal(5, done=(0,))
    bench.deal(5, 0)
    assert bench.ready()
    assert bench.duty.dealt is not None
    assert bench.duty.dealt.pending == [1, 0]
    bench.contribute(1)
    assert bench.ready()
    bench.await_chunks(1)
    bench.contribute(0)
    assert bench.shard.pushed[3:] == [(0, 0), (0, 1), (0, 2)]
