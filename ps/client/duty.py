"""What a worker owes to a run: under which fence, which contributions, with which weights.

It hears the coordinator and the shards and knows what can be done next; whoever owns it computes.
What is dealt is only a plan: nothing is waited for in particular, whatever comes next is taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from protos.ps.v1 import coordinator_pb2 as pb
from ps import failpoints
from ps.client.client import ParameterClient
from ps.client.links import Inbox, Said
from ps.client.pusher import Contribution
from ps.sharding import Chunk
from ps.telemetry import logs, metrics
from ps.telemetry.trace import COMPUTE, OFF, Recorder
from ps.types import Fence, WireDtype
from ps.wire.proto import from_proto, to_proto
from ps.wire.session import Session

log = logging.getLogger(__name__)

#: How often whoever waits for weights looks whether they are still wanted.
AWAIT_POLL_S = 0.02


class Interrupted(Exception):
    """What is being computed is not wanted any more; `Duty` knows what is."""


@dataclass
class Dealt:
    """What the coordinator has dealt of the open step."""

    step: int
    applied: int
    loss_scale: float
    #: Contributions to compute, and parts of the held-out data to evaluate before them, in this order.
    pending: list[int] = field(default_factory=list)
    evaluate: list[int] = field(default_factory=list)
    #: All that were dealt, done or not; the same one may be dealt again after a reconnect.
    known: set[int] = field(default_factory=set)
    known_parts: set[int] = field(default_factory=set)
    #: Contributions that were dealt and that somebody else has finished.
    finished: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Spent:
    """Seconds of one contribution."""

    compute_s: float = 0.0
    #: From asking for the weights before it until they were there, where nothing was computed meanwhile.
    pull_s: float = 0.0
    #: The part of `pull_s` before the first of them came: waiting for the decision, not transfer.
    wait_s: float = 0.0
    #: When it was computed, by the monotonic clock.
    computed_at: float = 0.0


class Duty:
    """A worker's side of a run, between its session, its shards and whoever computes. Owned by one thread."""

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        client: ParameterClient,
        slots: int,
        wire: WireDtype,
        *,
        layerwise: bool = False,
        eager: bool = False,
        on_pushed: Callable[[float], None] = lambda _: None,
        trace: Recorder = OFF,
    ) -> None:
        """
        Args:
            slots: G, micro-batches in a step.
            layerwise: whoever computes waits for the weights of each layer, by `await_weights`.
            eager: weights of the next version may come before the open step is decided.
            on_pushed: called with the seconds that pushing a contribution took beyond computing it.
        """
        self._on_pushed = on_pushed
        self._session = session
        self._inbox = inbox
        self._client = client
        self._slots = slots
        self._wire = wire
        self._layerwise = layerwise
        self.eager = eager
        self._trace = trace
        self.fence: Fence | None = None
        self.contributions = 0
        self.dealt: Dealt | None = None
        self.end: pb.End | None = None
        #: How often a fence was heard of: what was computed before the last one is void.
        self.fences = 0
        self._spent: dict[int, Spent] = {}
        #: What is computed, under which fence: (step's work, fences, contribution; None: a part of an evaluation).
        self._at: tuple[Dealt, int, int | None] | None = None
        self._asked_at: float | None = None
        self._arrived_at: float | None = None
        self._pull_s = self._wait_s = 0.0
        self._waited_s = self._settled_s = 0.0

    # -- Events ---------------------------------------------------------------------------------

    def take(self, timeout_s: float) -> None:
        """Take every event that is there, waiting for the first one at most `timeout_s`, and less if something is due.

        Raises:
            PsError: a shard refused what it was sent.
        """
        due_s = self._client.links.tick()
        with self._idle() if timeout_s > 0 else nullcontext():
            event = self._inbox.get(min(timeout_s, due_s))
        while event is not None:
            if isinstance(event, Said):
                self._said(event.message)
            else:
                self._client.handle(event)
                self._note_arrival()
            # What comes after the end is not the coordinator's any more.
            event = self._inbox.get(0.0) if self.end is None else None
        self._client.links.tick()
        self._report_completed()

    def _idle(self) -> AbstractContextManager[None]:
        """The wait of somebody who has nothing to compute, in a timeline."""
        dealt = self.dealt
        if dealt is None:
            return nullcontext()
        missing = dealt.pending or dealt.evaluate
        return self._wait("wait for weights" if missing else "wait for the decision", dealt.step)

    def _wait(self, what: str, step: int) -> AbstractContextManager[None]:
        return self._trace.span(what, "wait", step, track=COMPUTE)

    def _said(self, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("event")
        if kind == "cluster":
            self._serve(message.cluster)
        elif kind == "deal":
            self._deal(message.deal)
        elif kind == "end" and self.end is None:
            self.end = message.end

    def _serve(self, cluster: pb.Cluster) -> None:
        """A fence: what belongs to another one is dropped and, where it is still wanted, dealt again."""
        self.fence = from_proto(Fence, cluster.fence)
        self.contributions = int(cluster.contributions)
        self.fences += 1
        self.dealt = None
        self._spent.clear()
        self._asked_at = self._arrived_at = None
        addresses = [member.address for member in cluster.shards]
        self._client.open(
            self._session.run,
            self.fence,
            cluster.plan_digest,
            addresses,
            self._slots,
            self.contributions,
            self._wire,
            eager=self.eager,
        )
        log.info("serving under %s: step %d, %d shards", self.fence, cluster.step, len(addresses))

    def _deal(self, deal: pb.Deal) -> None:
        if from_proto(Fence, deal.fence) != self.fence:
            return
        dealt = self.dealt
        if dealt is None or dealt.step != deal.step:
            dealt = self.dealt = Dealt(int(deal.step), int(deal.applied), deal.loss_scale)
            self._spent.clear()
            self._client.begin_step(dealt.step)
            metrics.STEP.set(dealt.step)
            logs.bind(step=dealt.step)
        for contribution in deal.done:
            self._client.drop(contribution)
        dealt.finished.update(deal.done)
        dealt.known.difference_update(deal.done)
        dealt.pending[:] = [c for c in dealt.pending if c not in dealt.finished]
        dealt.finished.difference_update(deal.contributions)
        dealt.pending.extend(c for c in deal.contributions if c not in dealt.known)
        dealt.known.update(deal.contributions)
        dealt.evaluate.extend(part for part in deal.evaluate if part not in dealt.known_parts)
        dealt.known_parts.update(deal.evaluate)
        if not dealt.known and not dealt.known_parts:
            self.doing("spare: others compute it")
        if deal.initialize:
            self._say("sending initial values")
            self._client.initialize()

    def _report_completed(self) -> None:
        completed, self._client.completed = self._client.completed, []
        if self.dealt is None or self.fence is None:
            return
        for contribution in completed:
            spent = self._spent.get(contribution, Spent())
            sent_at = self._client.sent_at(contribution)
            push_s = max(0.0, sent_at - spent.computed_at) if sent_at and spent.computed_at else 0.0
            self._on_pushed(push_s)
            failpoints.hit("contributed.before")
            self._session.send(
                contributed=pb.Contributed(
                    step=self.dealt.step,
                    contribution=contribution,
                    compute_s=spent.compute_s,
                    push_s=push_s,
                    pull_s=spent.pull_s,
                    fence=to_proto(self.fence),
                    wait_s=spent.wait_s,
                )
            )
            failpoints.hit("contributed.after")

    # -- Work -----------------------------------------------------------------------------------

    def ready(self) -> Dealt | None:
        """What can be done now; its weights stay as they are until `done`. Asks for them if only they are missing.

        Where layers are waited for one by one (`await_weights`) the first weights are enough.
        """
        dealt = self.dealt
        if dealt is None:
            return None
        dealt.pending[:0] = sorted(self._client.recompute.difference(dealt.pending))
        self._client.recompute.clear()
        if not dealt.pending and not dealt.evaluate:
            return None
        if self._client.pulled.use(dealt.step, early=self._layerwise):
            # Of something that was left.
            self._waited_s = self._settled_s = 0.0
            self._at = (dealt, self.fences, None if dealt.evaluate else dealt.pending[0])
            return dealt
        # Torn by the next version means that this one is decided; but where steps are eager it may still be needed.
        if self.eager or not self._client.pulled.is_torn:
            self.pull()
        return None

    def done(self) -> None:
        """Nothing is computed with the weights any more: the next ones may come."""
        self._client.pulled.done()

    def await_weights(self, chunks: Sequence[Chunk] | None) -> None:
        """Wait until weights of the open step are there, taking events meanwhile.

        Args:
            chunks: those that are needed; None: all.

        Raises:
            Interrupted: they do not come, or nobody wants what would be computed with them.
            PsError: a shard refused what it was sent.
        """
        self.check_wanted()
        dealt = self.dealt
        assert dealt is not None, "there is an open step"
        needed = None if chunks is None else [(chunk.shard, chunk.index) for chunk in chunks]
        pulled = self._client.pulled
        if pulled.has(dealt.step, needed):
            return
        began = time.monotonic()
        with self._wait("wait for weights", dealt.step):
            while not pulled.has(dealt.step, needed, AWAIT_POLL_S):
                # Also what is due by the clock: streams that are to be opened again.
                self.take(0.0)
                self.check_wanted()
                if not pulled.comes(dealt.step):
                    raise Interrupted(f"step {dealt.step}: its weights do not come any more")
        waited_s = time.monotonic() - began
        self._pull_s += waited_s
        self._waited_s += waited_s

    def check_wanted(self) -> None:
        """Take events while something is computed, if there are any.

        Raises:
            Interrupted: nobody wants it any more.
            PsError: a shard refused what it was sent.
        """
        if not self._inbox.is_empty:
            self.take(0.0)
        assert self._at is not None, "`ready` comes first"
        dealt, fences, contribution = self._at
        if self.end is not None or self.fences != fences or self.dealt is not dealt:
            raise Interrupted(f"step {dealt.step} is not computed any more")
        if contribution in dealt.finished:
            raise Interrupted(f"step {dealt.step}: somebody else has finished contribution {contribution}")

    def wants(self, contribution: int) -> bool:
        """Whether a contribution of the open step is still to be pushed, as far as is known."""
        return self.dealt is not None and contribution not in self.dealt.finished

    def waited(self) -> float:
        """The seconds that `await_weights` took since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def pull(self) -> None:
        """Ask for the weights of the open step."""
        assert self.dealt is not None, "there is an open step"
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        self.doing("waiting for weights")
        self._client.pull(self.dealt.step, self.dealt.applied)

    def pulled(self) -> float | None:
        """The seconds that the weights took, if they have come since the last call."""
        if self._asked_at is None:
            return None
        self._pull_s = time.monotonic() - self._asked_at
        self._asked_at = self._arrived_at = None
        return self._pull_s

    def _note_arrival(self) -> None:
        if self._asked_at is not None and self._arrived_at is None and not self._client.pulled.is_waiting:
            self._arrived_at = time.monotonic()
            self._wait_s = self._arrived_at - self._asked_at

    def doing(self, what: str) -> None:
        """Say what the worker does at the open step."""
        assert self.dealt is not None, "there is an open step"
        self._say(f"step {self.dealt.step}: {what}")

    def _say(self, what: str) -> None:
        self._session.doing(what, self._client.transport)

    def forget_gradient(self) -> None:
        """The gradient's memory is about to be overwritten: what was pushed before is waited for.

        Raises:
            WaitTimeout: it could not be sent.
        """
        began = time.monotonic()
        self._client.forget_gradient()
        self._settled_s += time.monotonic() - began

    def settled(self) -> float:
        """The seconds that `forget_gradient` took since the last call."""
        settled_s, self._settled_s = self._settled_s, 0.0
        return settled_s

    def begin_push(self, contribution: int, report: Callable[[], tuple[float, int]]) -> Contribution:
        """Chunks of a contribution of the open step are about to be ready.

        Args:
            report: as in `Contribution`.
        """
        dealt = self.dealt
        assert dealt is not None, "there is an open step"
        begun = Contribution(dealt.step, contribution, dealt.loss_scale, report)
        self._client.begin_push(begun)
        return begun

    def push_chunk(self, contribution: Contribution, chunk: Chunk) -> None:
        """A chunk is ready: nothing of its gradient changes any more."""
        self._client.push_chunk(contribution, chunk)

    def push(self, begun: Contribution, compute_s: float) -> None:
        """Push what is left of a contribution, whose gradient the client's source holds now."""
        dealt, contribution = self.dealt, begun.index
        assert dealt is not None, "there is an open step"
        self._client.push(begun)
        before = self._spent.get(contribution, Spent(pull_s=self._pull_s, wait_s=self._wait_s))
        self._spent[contribution] = Spent(compute_s, before.pull_s, before.wait_s, time.monotonic())
        self._pull_s = self._wait_s = 0.0
        if contribution in dealt.pending:
            dealt.pending.remove(contribution)
        if not dealt.pending:
            # The next version is asked for before it is decided, so that its first chunk comes at once.
            self._asked_at = time.monotonic()
            self.doing("pushed, waiting for the decision")
            self._client.pull(dealt.step + 1, dealt.applied + 1)
