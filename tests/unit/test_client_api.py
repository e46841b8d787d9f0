"""The client's loop, driven by what the coordinator and one shard would say."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Fence, Member
from ps.client.api import Client, Work
from ps.client.arrays import NamedArrays, copy_of, table_of
from ps.client.client import ParameterClient
from ps.client.links import Inbox, Lost, Received, Said
from ps.config import RunConfig
from ps.errors import GradientError, MismatchError, PeerUnavailable, PsError, VersionGone, WaitTimeout
from ps.sharding import make_plan
from ps.types import WireDtype
from ps.wire import frame
from ps.wire.messages import Ack, Weights, Welcome

CONFIG = RunConfig.model_validate(
    {
        "cluster": {"shards": 1},
        "batch": {"micro_batches_per_step": 5, "contributions_per_step": 2},
        "precision": {"wire": "fp32"},
        "training": {"steps": 10},
    }
)
GRADIENTS = {"w": np.ones(4, np.float32)}


class _Connection:
    """A transport and its connection, which keep what is sent."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.say: Any = None
        #: Called in a thread of its own, as a stream has, when a pull is sent.
        self.on_pull: Callable[[], None] = lambda: None

    def connect(self, _address: str, on_frame: Any, _on_close: Any) -> _Connection:
        self.say = on_frame
        return self

    def send(self, data: bytes, _timeout_s: float) -> bool:
        self.frames.append(data)
        if frame.decode(data)[0]["kind"] == "pull":
            threading.Thread(target=self.on_pull, daemon=True).start()
        return True

    @property
    def has_room(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def kinds(self) -> list[str]:
        return [frame.decode(data)[0]["kind"] for data in self.frames]


class _Session:
    """Stands for the session: what was sent to the coordinator."""

    def __init__(self) -> None:
        self.member = SimpleNamespace(rank=3)
        self.address, self.run = "somewhere:1", "run"
        self.failure: PsError | None = None
        self.sent: list[dict[str, Any]] = []
        self.closed = False

    def send(self, **event: Any) -> None:
        self.sent.append(event)

    def doing(self, text: str, transport: str = "") -> None:
        pass

    def close(self) -> None:
        self.closed = True


class _Bench:
    """A client, and the voices of its coordinator and its shard."""

    def __init__(self) -> None:
        values = copy_of({"w": np.zeros(4, np.float32)})
        table = table_of(values, None)
        self.plan = make_plan(table, 1)
        self.connection, self.session, self.inbox = _Connection(), _Session(), Inbox()
        arrays = NamedArrays(values, self.plan, WireDtype.FP32)
        parameters = ParameterClient(self.connection, self.inbox, 3, 7, table, arrays)
        session: Any = self.session
        self.parameters = parameters
        self.client = Client(session, self.inbox, parameters, arrays, CONFIG)

    def kinds(self) -> list[str]:
        """What has been sent, by kind, once all that was pushed is."""
        self.parameters._pusher.settle()
        return self.connection.kinds()

    def say(self, **event: Any) -> None:
        self.inbox.put(Said(pb.SessionResponse(**event)))

    def serve(self, epoch: int = 1, step: int = 5) -> None:
        shards = [Member(role="shard", address="shard:1")]
        fence = Fence(term=1, epoch=epoch)
        self.say(cluster=pb.Cluster(fence=fence, plan_digest=self.plan.digest, shards=shards, contributions=2))
        self.inbox.put(Received(0, Welcome(0, 9, 1, epoch, step, step, [])))

    def deal(self, step: int, *contributions: int, epoch: int = 1) -> None:
        fence = Fence(term=1, epoch=epoch)
        self.say(deal=pb.Deal(fence=fence, step=step, applied=step, loss_scale=4.0, contributions=contributions))

    def publish(self, version: int) -> None:
        """The shard sends weights that are all `version`; it was asked for them."""
        payload = np.full(self.plan.size, version, np.float32).tobytes()
        self.connection.say(frame.encode(Weights(applied=version, chunk=0, dtype="fp32").pack(), payload))

    def work(self, step: int, *contributions: int) -> Work:
        """Deal, publish once it was asked for, and take the first."""
        self.deal(step, *contributions)
        with pytest.raises(WaitTimeout):
            self.client.wait(0.0)
        self.publish(step)
        work = self.client.wait(1.0)
        assert work is not None
        return work


@pytest.fixture
def bench() -> _Bench:
    return _Bench()


def test_what_is_waited_for_is_said(bench: _Bench) -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0 s for the cluster of somewhere:1 .* 1 shards"):
        bench.client.wait(0.0)
    bench.serve()
    with pytest.raises(WaitTimeout, match=r"work under \(term 1, epoch 1\)"):
        bench.client.wait(0.0)
    bench.deal(5, 0)
    with pytest.raises(WaitTimeout, match=r"step 5: weights from the shards, to compute contributions \[0\]"):
        bench.client.wait(0.0)
    with pytest.raises(WaitTimeout, match="weights of version 9"):
        bench.client.pull(9, 0.0)


def test_work_has_its_slots_and_its_weights(bench: _Bench) -> None:
    bench.serve()
    work = bench.work(5, 0, 1)
    assert (work.step, work.contribution, work.slots, work.loss_scale) == (5, 0, range(2), 4.0)
    assert work.weights["w"].tolist() == [5.0] * 4
    # Not pushed: it is still to be done.
    assert bench.client.wait(0.0) == work
    assert bench.client.push(work, GRADIENTS, 1.5, tokens=2)
    following = bench.client.wait(0.0)
    assert following is not None
    assert following.slots == range(2, 5)
    # The next version is asked for with the last push.
    assert bench.kinds() == ["hello", "pull", "push"]
    bench.client.push(following, GRADIENTS, 1.5)
    assert Counter(bench.kinds()) == Counter(hello=1, pull=2, push=2)
    with pytest.raises(WaitTimeout, match="step 5 to be decided"):
        bench.client.wait(0.0)


def test_a_complete_contribution_is_reported(bench: _Bench) -> None:
    bench.serve()
    work = bench.work(5, 1)
    bench.client.push(work, GRADIENTS, 1.5)
    bench.inbox.put(Received(0, Ack(5, 1, -1)))
    with pytest.raises(WaitTimeout):
        bench.client.wait(0.0)
    assert [(event["contributed"].step, event["contributed"].contribution) for event in bench.session.sent] == [(5, 1)]


def test_work_of_the_past_is_not_pushed(bench: _Bench) -> None:
    bench.serve()
    old_step = bench.work(5, 0)
    bench.client.push(old_step, GRADIENTS, 1.0)
    old_fence = bench.work(6, 0)
    sent = len(bench.connection.frames)
    assert not bench.client.push(old_step, GRADIENTS, 1.0)
    bench.serve(epoch=2, step=6)
    bench.deal(6, 0, epoch=2)
    with pytest.raises(WaitTimeout):
        bench.client.wait(0.0)
    assert not bench.client.push(old_fence, GRADIENTS, 1.0)
    assert "push" not in bench.kinds()[sent:]
    # It is dealt again under the new fence.
    bench.publish(6)
    again = bench.client.wait(1.0)
    assert again is not None
    assert again.contribution == old_fence.contribution
    assert bench.client.push(again, GRADIENTS, 1.0)


def test_a_contribution_that_a_shard_lost_is_work_again(bench: _Bench) -> None:
    bench.serve()
    first = bench.work(5, 0, 1)
    bench.client.push(first, GRADIENTS, 1.0)
    second = bench.client.wait(0.0)
    assert second is not None
    bench.client.push(second, GRADIENTS, 1.0)
    # The shard says that it holds nothing; the gradient of the second is still in the buffer.
    bench.inbox.put(Received(0, Welcome(0, 9, 1, 1, 5, 5, [])))
    assert bench.client.wait(0.0) == first


def test_nothing_of_a_wrong_gradient_is_sent(bench: _Bench) -> None:
    bench.serve()
    work = bench.work(5, 0)
    with pytest.raises(GradientError, match="shape"):
        bench.client.push(work, {"w": np.ones(5, np.float32)}, 1.0)
    with pytest.raises(GradientError, match="tokens=-1"):
        bench.client.push(work, GRADIENTS, 1.0, tokens=-1)
    assert "push" not in bench.kinds()
    assert bench.client.push(work, GRADIENTS, 1.0)


def test_the_end_ends_the_loop_and_keeps_the_last_weights(bench: _Bench) -> None:
    bench.serve(step=10)
    bench.deal(10)
    with pytest.raises(WaitTimeout):
        bench.client.wait(0.0)
    bench.publish(10)
    bench.say(end=pb.End(ok=True, reason="finished: 10 steps"))
    assert list(bench.client) == []
    assert bench.client.reason == "finished: 10 steps"
    assert bench.client.pull()["w"].tolist() == [10.0] * 4
    bench.client.close()
    assert bench.client.pull(10)["w"].tolist() == [10.0] * 4
    with pytest.raises(PeerUnavailable, match="version 9 is not held"):
        bench.client.pull(9)
    assert bench.session.sent == []


def test_the_last_weights_may_come_after_the_end(bench: _Bench) -> None:
    bench.serve(step=10)
    bench.deal(10)
    bench.say(end=pb.End(ok=True, reason="stopped"))
    bench.connection.on_pull = lambda: bench.publish(10)
    assert bench.client.wait(1.0) is None
    assert bench.client.pull()["w"].tolist() == [10.0] * 4


def test_a_shard_that_is_gone_after_the_end_is_not_waited_for(bench: _Bench) -> None:
    bench.serve(step=10)
    bench.deal(10)
    bench.say(end=pb.End(ok=True, reason="stopped"))
    bench.inbox.put(Lost(0, "gone", 1))
    assert bench.client.wait(1.0) is None
    with pytest.raises(PeerUnavailable, match=r"the last version is not held .*\(stopped\); read it from"):
        bench.client.pull()


def test_an_end_with_an_error_is_raised(bench: _Bench) -> None:
    bench.say(end=pb.End(ok=False, reason="the disk is full"))
    for _ in range(2):
        with pytest.raises(PsError, match="the disk is full"):
            bench.client.wait(0.0)
    bench.session.failure = MismatchError("other parameters")
    with pytest.raises(MismatchError):
        bench.client.pull()


def test_only_the_newest_version_can_be_pulled(bench: _Bench) -> None:
    bench.serve()
    bench.deal(5)
    with pytest.raises(WaitTimeout):
        bench.client.pull(5, 0.0)
    bench.publish(5)
    assert bench.client.pull(timeout_s=1.0)["w"].tolist() == [5.0] * 4
    with pytest.raises(VersionGone, match="version 4 is no longer published; the newest is 5"):
        bench.client.pull(4)


def test_a_closed_client_has_left(bench: _Bench) -> None:
    bench.serve()
    work = bench.work(5, 0)
    for _ in range(2):
        bench.client.close()
    assert [list(event) for event in bench.session.sent] == [["leave"]]
    assert bench.session.closed
    assert bench.client.wait(0.0) is None
    assert not bench.client.push(work, GRADIENTS, 1.0)
    assert bench.client.rank == 3
