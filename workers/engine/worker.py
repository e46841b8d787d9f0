"""The worker's loop: one thread that takes events, and does the work that it was dealt.

What is dealt is only a plan: the loop never waits for anything in particular, it takes whatever
comes next (weights, acknowledgements, a new deal, a new fence) and then does what it can.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.ps.v1 import coordinator_pb2 as pb
from ps.client.client import Contribution, ParameterClient
from ps.client.links import Inbox, Said
from ps.errors import PsError
from ps.pages import trim_heap
from ps.telemetry import logs, metrics
from ps.types import Fence, WireDtype
from ps.wire.proto import from_proto, to_proto
from ps.wire.session import Session
from workers.engine import metrics as worker_metrics
from workers.engine.compute import Contributor

log = logging.getLogger(__name__)


@dataclass
class Work:
    """What is left to do of the open step."""

    step: int
    applied: int
    loss_scale: float
    contributions: deque[int] = field(default_factory=deque)
    evaluate: deque[int] = field(default_factory=deque)
    #: Contributions that were dealt, done or not; the same one may be dealt again after a reconnect.
    dealt: set[int] = field(default_factory=set)
    evaluated: set[int] = field(default_factory=set)


@dataclass
class Spent:
    """Seconds of one contribution."""

    compute_s: float = 0.0
    push_s: float = 0.0
    pull_s: float = 0.0
    #: The part of `pull_s` before the first of the weights came.
    wait_s: float = 0.0


class Worker:
    """Computes contributions until the coordinator ends the run."""

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        client: ParameterClient,
        contributor: Contributor,
        slots: int,
        wire: WireDtype,
        on_work: Callable[[], None] = lambda: None,
    ) -> None:
        """Tie the parts together.

        Args:
            on_work: called before the first contribution: by then the coordinator has found model and data
                to be the run's.
        """
        self._session = session
        self._inbox = inbox
        self._client = client
        self._contributor = contributor
        self._slots = slots
        self._wire = wire
        self._on_work = on_work
        self._has_worked = False
        self._fence = Fence(0, 0)
        self._work: Work | None = None
        self._spent: dict[int, Spent] = {}
        self._pull_started: float | None = None
        self._pull_s = 0.0
        self._arrived_at: float | None = None
        self._wait_s = 0.0
        #: Nothing was computed under the present fence yet.
        self._is_fresh = True
        self._end: pb.End | None = None
        self._leaving = False

    def run(self) -> str:
        """Work until the end; returns why it ended.

        Raises:
            PsError: the coordinator ended the run with an error, or a shard refused what it was sent.
        """
        while self._end is None:
            self._take(self._client.links.tick() if self._is_idle() else 0.0)
            if self._end is None and not self._leaving:
                self._advance()
        if not self._end.ok:
            raise PsError(self._end.reason)
        return self._end.reason

    def leave(self) -> None:
        """Go by own will: what is pushed stays, the rest is dealt again."""
        self._leaving = True
        self._session.send(leave=pb.Leave(reason="asked to stop"))
        self._inbox.put(Said(pb.SessionResponse(end=pb.End(ok=True, reason="asked to stop"))))

    # -- Events ---------------------------------------------------------------------------------

    def _take(self, timeout_s: float) -> None:
        """Take every event that is there, waiting for the first one at most `timeout_s`."""
        event = self._inbox.get(timeout_s)
        while event is not None:
            if isinstance(event, Said):
                self._said(event.message)
            else:
                self._client.handle(event)
                self._note_arrival()
            event = self._inbox.get(0.0)
        self._client.links.tick()
        self._report_completed()

    def _said(self, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("event")
        if kind == "cluster":
            self._cluster(message.cluster)
        elif kind == "deal":
            self._deal(message.deal)
        elif kind == "end":
            self._end = message.end

    def _cluster(self, cluster: pb.Cluster) -> None:
        """A fence: what belongs to another one is dropped and, where it is still wanted, dealt again."""
        self._fence = from_proto(Fence, cluster.fence)
        self._work = None
        self._spent.clear()
        self._pull_started = self._arrived_at = None
        self._is_fresh = True
        addresses = [member.address for member in cluster.shards]
        self._client.open(
            self._session.run,
            self._fence,
            cluster.plan_digest,
            addresses,
            self._slots,
            cluster.contributions,
            self._wire,
        )
        log.info("serving under %s: step %d, %d shards", self._fence, cluster.step, len(addresses))

    def _deal(self, deal: pb.Deal) -> None:
        if from_proto(Fence, deal.fence) != self._fence:
            return
        work = self._work
        if work is None or work.step != deal.step:
            work = self._work = Work(deal.step, deal.applied, deal.loss_scale)
            self._spent.clear()
            self._client.begin_step(deal.step)
            metrics.STEP.set(deal.step)
            logs.bind(step=deal.step)
        for contribution in deal.contributions:
            if contribution not in work.dealt:
                work.dealt.add(contribution)
                work.contributions.append(contribution)
        for part in deal.evaluate:
            if part not in work.evaluated:
                work.evaluated.add(part)
                work.evaluate.append(part)
        if deal.initialize:
            self._session.doing("sending initial values")
            self._client.initialize()

    def _report_completed(self) -> None:
        work = self._work
        while self._client.completed:
            contribution = self._client.completed.pop(0)
            if work is None:
                continue
            spent = self._spent.get(contribution, Spent())
            self._session.send(
                contributed=pb.Contributed(
                    step=work.step,
                    contribution=contribution,
                    compute_s=spent.compute_s,
                    push_s=spent.push_s,
                    pull_s=spent.pull_s,
                    fence=to_proto(self._fence),
                    wait_s=spent.wait_s,
                )
            )

    # -- Work -----------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Nothing can be done before something comes."""
        work = self._work
        if work is None or self._client.is_torn:
            return True
        if not (work.contributions or work.evaluate or self._client.recompute):
            return True
        return self._client.model.version != work.step

    def _advance(self) -> None:
        work = self._work
        if work is None:
            return
        if self._client.recompute and self._client.model.version == work.step:
            for contribution in sorted(self._client.recompute):
                work.contributions.appendleft(contribution)
            self._client.recompute.clear()
        if not (work.contributions or work.evaluate):
            return
        if self._client.model.version != work.step:
            self._pull(work)
        elif work.evaluate:
            self._evaluate(work, work.evaluate.popleft())
        else:
            self._contribute(work, work.contributions.popleft())

    def _pull(self, work: Work) -> None:
        if self._pull_started is None:
            self._pull_started = time.monotonic()
        self._session.doing(f"step {work.step}: waiting for weights")
        self._client.pull(work.step, work.applied)

    def _note_arrival(self) -> None:
        """What comes before the first of the weights is waiting for the decision, not transfer."""
        if self._pull_started is not None and self._arrived_at is None and not self._client.is_waiting:
            self._arrived_at = time.monotonic()
            self._wait_s = self._arrived_at - self._pull_started

    def _note_pulled(self) -> None:
        if self._pull_started is not None:
            self._pull_s = time.monotonic() - self._pull_started
            worker_metrics.PULL_SECONDS.observe(self._pull_s)
            self._pull_started = self._arrived_at = None

    def _evaluate(self, work: Work, part: int) -> None:
        self._note_pulled()
        self._session.doing(f"step {work.step}: evaluating part {part}")
        loss_sum, tokens, num_bytes = self._contributor.evaluate(part)
        self._session.send(
            evaluated=pb.Evaluated(version=work.step, part=part, loss_sum=loss_sum, tokens=tokens, bytes=num_bytes)
        )

    def _contribute(self, work: Work, contribution: int) -> None:
        self._note_pulled()
        self._session.doing(f"step {work.step}: computing contribution {contribution}")
        self._client.forget_buffer()
        if not self._has_worked:
            self._has_worked = True
            self._on_work()
        if self._is_fresh:
            # Preparing the data, sending initial values: none of it comes again.
            self._is_fresh = False
            trim_heap()
        started = time.monotonic()
        computed = self._contributor.contribute(work.step, contribution, work.loss_scale)
        pushing = time.monotonic()
        self._client.push(Contribution(work.step, contribution, work.loss_scale, computed.loss_sum, computed.tokens))
        ended = time.monotonic()
        worker_metrics.COMPUTE_SECONDS.observe(pushing - started)
        worker_metrics.PUSH_SECONDS.observe(ended - pushing)
        self._spent[contribution] = Spent(pushing - started, ended - pushing, self._pull_s, self._wait_s)
        self._pull_s = self._wait_s = 0.0
        if not work.contributions:
            # The next version is asked for before it is decided, so that its first chunk comes at once.
            self._pull_started = time.monotonic()
            self._session.doing(f"step {work.step}: pushed, waiting for the decision")
            self._client.pull(work.step + 1, work.applied + 1)
