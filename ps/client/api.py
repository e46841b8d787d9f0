"""`windlass.Client`: push and pull for a worker that computes its gradients with anything.

    with windlass.Client.connect("HOST:PORT", {"w": w0, "b": b0}) as client:
        for work in client:
            gradients, loss_sum = compute(work.weights, work.step, work.slots)
            client.push(work, gradients, loss_sum)

The coordinator deals the work. A contribution must be a pure function of (weights, step, slots): it
may be dealt again, to this client or to another one, after anything has died.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.arrays import NamedArrays, copy_of, table_of
from ps.client.client import Contribution, ParameterClient
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Lost, Said
from ps.config import RunConfig, from_json
from ps.errors import PeerUnavailable, PsError, VersionGone, WaitTimeout
from ps.kernels.compile import warm_up_worker
from ps.sharding import make_plan
from ps.types import Fence, Role, slot_range
from ps.wire.proto import from_proto, to_proto
from ps.wire.security import load_security
from ps.wire.session import Session

#: After the end of the run the last weights may still be on their way for so long.
LAST_WEIGHTS_S = 5.0


@dataclass(frozen=True)
class Work:
    """One contribution that this client is asked for."""

    step: int
    contribution: int
    #: The numbers, in 0..G-1, of the micro-batches whose gradients are wanted.
    slots: range
    #: What `push` multiplies the gradients by, for those who scale something themselves.
    loss_scale: float
    #: Read-only float32 views by name, until the next `wait`, `pull` or `close`: copy what is to be kept.
    weights: Mapping[str, np.ndarray] = field(repr=False)
    fence: Fence = field(repr=False)


@dataclass
class _Dealt:
    """What the coordinator has dealt of the open step."""

    step: int
    applied: int
    loss_scale: float
    #: Contributions to compute, in this order.
    pending: list[int] = field(default_factory=list)
    #: All that were dealt, done or not; the same one may be dealt again after a reconnect.
    known: set[int] = field(default_factory=set)


@dataclass
class _Spent:
    """When a contribution was handed out, and the seconds that it took."""

    handed_at: float
    #: Waiting for the weights before it, since they were asked for.
    pull_s: float
    compute_s: float = 0.0
    push_s: float = 0.0


class Client:
    """A worker's connection to a cluster. Make it with `connect`; owned by one thread."""

    def __init__(
        self, session: Session, inbox: Inbox, client: ParameterClient, arrays: NamedArrays, config: RunConfig
    ) -> None:
        self._session = session
        self._inbox = inbox
        self._client = client
        self._arrays = arrays
        self._config = config
        self._contributions = config.contributions
        self._fence: Fence | None = None
        self._dealt: _Dealt | None = None
        self._spent: dict[int, _Spent] = {}
        #: When the weights that are waited for were asked for.
        self._asked_at: float | None = None
        self._end: pb.End | None = None
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        coordinator: str,
        parameters: Mapping[str, Any],
        *,
        decay: Collection[str] | None = None,
        rank: int | None = None,
        certificates: Path | str | None = None,
        timeout_s: float = 60.0,
    ) -> Self:
        """Join a run as a worker.

        Args:
            coordinator: HOST:PORT.
            parameters: float32 arrays by name, in an order that is the same for every client of the run. Their
                values are copied, and are the run's initial values if this client is asked for them.
            decay: names to which `optimizer.weight_decay` applies. None: arrays of two and more dimensions, or
                all of them with `optimizer.decay_all`.
            rank: this worker's number, for logs and metrics. None: the coordinator gives one.
            certificates: a worker's certificate, or a folder of `windlass certs init`. None: the cluster has none.
            timeout_s: how long to wait for a coordinator to be there.

        Raises:
            StartupError: the certificates cannot be used.
            HandshakeFailed, AccessDenied: they are not this cluster's, or not a worker's.
            ConfigError: the parameters cannot be used, or make fewer chunks than the run has shards.
            WaitTimeout: there was no coordinator in time.
            MismatchError: the coordinator does not take this worker.
        """
        values = copy_of(parameters)
        security = load_security(Path(certificates) if certificates else None, insecure=False, role=Role.WORKER)
        inbox = Inbox()
        incarnation = random.SystemRandom().getrandbits(62) + 1
        member = Member(
            role="worker",
            rank=-1 if rank is None else rank,
            incarnation=incarnation,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        message = pb.Model(data_digest="", evaluation_parts=0)

        def on_connect() -> None:
            session.send(model=message)

        session = Session(coordinator, member, lambda said: inbox.put(Said(said)), on_connect, security)
        try:
            config = from_json(RunConfig, session.register(timeout_s).job)
            table = table_of(values, list(values) if decay is None and config.optimizer.decay_all else decay)
            message.table = table.packed()
            wire = config.precision.wire
            arrays = NamedArrays(values, make_plan(table, config.cluster.shards), wire)
            warm_up_worker(wire)
        except BaseException:
            session.close()
            raise
        client = ParameterClient(GrpcTransport(security), inbox, int(session.member.rank), incarnation, table, arrays)
        session.start()
        return cls(session, inbox, client, arrays, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Work]:
        """Yield work until the run ends; each is waited for as `wait` does by default."""
        while (work := self.wait()) is not None:
            yield work

    @property
    def rank(self) -> int:
        """This worker's number."""
        return int(self._session.member.rank)

    @property
    def reason(self) -> str:
        """Why the run ended, or this client; empty: it did not."""
        return self._end.reason if self._end is not None else ""

    def close(self) -> None:
        """Leave. What the shards have received stays, the rest is dealt to others. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._end is None:
            self._session.send(leave=pb.Leave(reason="the client was closed"))
            self._end = pb.End(ok=True, reason="the client was closed")
        self._client.close()
        self._session.close()

    # -- Work -----------------------------------------------------------------------------------

    def wait(self, timeout_s: float = 600.0) -> Work | None:
        """Return the next contribution to compute, with the weights to compute it with; None: the run is over.

        One that was returned and not pushed is returned again.

        Args:
            timeout_s: how long to wait. The others' contributions and a shard that is started again take their
                time; between two steps nothing is dealt.

        Raises:
            WaitTimeout: nothing was dealt in time; says what is waited for.
            PsError: the coordinator ended the run, or this client for having other parameters than the run, or a
                shard refused what was pushed.
        """
        deadline = time.monotonic() + timeout_s
        self._take(0.0)
        while self._end is None:
            work = self._next()
            if work is not None:
                return work
            self._pause(deadline, timeout_s, self._waiting_for())
        self._require_ok()
        return None

    def push(self, work: Work, gradients: Mapping[str, Any], loss_sum: float, tokens: int = 0) -> bool:
        """Push a contribution. Pushing it again, with the same gradients, changes nothing.

        Args:
            work: as `wait` returned it.
            gradients: float32, C-contiguous, by name: the sum over `work.slots` of the gradients of each
                micro-batch's mean loss; neither divided by the number of slots nor multiplied by the loss scale. A
                parameter that is left out has no gradient, and is not updated if no contribution has one.
            loss_sum: the sum over `work.slots` of each micro-batch's mean loss, for the run's metrics.
            tokens: how many tokens, or samples, these were, for the same.

        Returns:
            False: the work is of a step or fence that is over, and nothing was sent. Whatever is still wanted of it
            is dealt again, so there is nothing to do.

        Raises:
            GradientError: a name, a shape, a dtype or a layout is wrong; nothing was sent.
        """
        checked = self._arrays.check(gradients)
        dealt = self._dealt
        if self._end is not None or dealt is None or (work.fence, work.step) != (self._fence, dealt.step):
            return False
        began = time.monotonic()
        self._client.forget_buffer()
        self._arrays.fill(checked, work.loss_scale)
        self._client.push(Contribution(work.step, work.contribution, work.loss_scale, float(loss_sum), int(tokens)))
        spent = self._spent.setdefault(work.contribution, _Spent(began, 0.0))
        spent.compute_s, spent.push_s = began - spent.handed_at, time.monotonic() - began
        if work.contribution in dealt.pending:
            dealt.pending.remove(work.contribution)
        if not dealt.pending:
            self._session.doing(f"step {work.step}: pushed, waiting for the decision")
            # Asked for before it is decided, so that its first chunk comes at once.
            self._asked_at = time.monotonic()
            self._client.pull(dealt.step + 1, dealt.applied + 1)
        return True

    def pull(self, version: int | None = None, timeout_s: float = 600.0) -> Mapping[str, np.ndarray]:
        """Return the weights of a version.

        Args:
            version: steps decided so far in these weights. None: the newest; after the end of the run the last.
            timeout_s: how long to wait for it.

        Returns:
            Read-only float32 views by name, until the next `wait` or `pull`: copy what is to be kept.

        Raises:
            VersionGone: the version is older than the newest, which alone can be pulled.
            WaitTimeout: it did not come in time. A version that needs a contribution of this client's never does.
            PeerUnavailable: the run ended before these weights had come; its checkpoint holds them.
            PsError: the coordinator ended the run with an error.
        """
        deadline = time.monotonic() + timeout_s
        if not self._is_closed:
            self._take(0.0)
        while self._end is None:
            dealt = self._dealt
            if dealt is not None and (version is None or version <= dealt.step):
                if version is not None and version < dealt.step:
                    raise VersionGone(f"version {version} is no longer published; the newest is {dealt.step}")
                if self._client.model.version == dealt.step:
                    return self._arrays.weights
                self._client.pull(dealt.step, dealt.applied)
            wanted = "the newest version" if version is None else f"version {version}"
            self._pause(deadline, timeout_s, f"the weights of {wanted}; {self._waiting_for()}")
        self._require_ok()
        held = self._client.model.version
        if held < 0 or (version is not None and version != held):
            wanted = "the last version" if version is None else f"version {version}"
            raise PeerUnavailable(
                f"{wanted} is not held and cannot be pulled any more ({self.reason}); read it from the newest "
                f"checkpoint in {self._config.checkpoint_dir}"
            )
        return self._arrays.weights

    def _next(self) -> Work | None:
        """The contribution to compute next, if its weights are there; asks for them if they are not."""
        dealt = self._dealt
        if dealt is None or self._fence is None:
            return None
        if self._client.model.version != dealt.step:
            # The last version is pulled by everybody, so that `pull` has it when the run is over.
            if dealt.pending or dealt.step >= self._config.training.end:
                self._session.doing(f"step {dealt.step}: waiting for weights")
                self._asked_at = self._asked_at or time.monotonic()
                self._client.pull(dealt.step, dealt.applied)
            return None
        dealt.pending[:0] = sorted(self._client.recompute.difference(dealt.pending))
        self._client.recompute.clear()
        if not dealt.pending:
            return None
        contribution = dealt.pending[0]
        self._session.doing(f"step {dealt.step}: computing contribution {contribution}")
        now = time.monotonic()
        self._spent[contribution] = _Spent(now, now - self._asked_at if self._asked_at is not None else 0.0)
        self._asked_at = None
        slots = slot_range(contribution, self._contributions, self._config.batch.micro_batches_per_step)
        return Work(dealt.step, contribution, slots, dealt.loss_scale, self._arrays.weights, self._fence)

    # -- Events ---------------------------------------------------------------------------------

    def _pause(self, deadline: float, timeout_s: float, what: str) -> None:
        """Take what comes next."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeout(f"waited {timeout_s:g} s for {what}")
        self._take(min(left, self._client.links.tick()))

    def _waiting_for(self) -> str:
        dealt, coordinator = self._dealt, self._session.address
        if self._fence is None:
            return f"the cluster of {coordinator} to serve: are all of its {self._config.cluster.shards} shards there?"
        if dealt is None:
            return f"work under {self._fence} from {coordinator}"
        if dealt.pending:
            return f"step {dealt.step}: weights from the shards, to compute contributions {dealt.pending}"
        return f"step {dealt.step} to be decided by {coordinator}, and for work of the next one"

    def _take(self, timeout_s: float) -> None:
        """Take every event that is there, waiting for the first one at most `timeout_s`."""
        event = self._inbox.get(timeout_s)
        while event is not None:
            if isinstance(event, Said):
                self._said(event.message)
            else:
                self._client.handle(event)
            event = self._inbox.get(0.0)
        self._client.links.tick()
        self._report_completed()

    def _said(self, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("event")
        if kind == "cluster":
            self._serve(message.cluster)
        elif kind == "deal":
            self._deal(message.deal)
        elif kind == "end" and self._end is None:
            self._end = message.end
            self._take_last_weights()

    def _serve(self, cluster: pb.Cluster) -> None:
        """A fence: what belongs to another one is dropped and, where it is still wanted, dealt again."""
        self._fence = from_proto(Fence, cluster.fence)
        self._contributions = int(cluster.contributions)
        self._dealt = None
        self._spent.clear()
        self._asked_at = None
        self._client.open(
            self._session.run,
            self._fence,
            cluster.plan_digest,
            [member.address for member in cluster.shards],
            self._config.batch.micro_batches_per_step,
            self._contributions,
            self._config.precision.wire,
        )

    def _deal(self, deal: pb.Deal) -> None:
        if from_proto(Fence, deal.fence) != self._fence:
            return
        dealt = self._dealt
        if dealt is None or dealt.step != deal.step:
            dealt = self._dealt = _Dealt(int(deal.step), int(deal.applied), deal.loss_scale)
            self._spent.clear()
            self._client.begin_step(dealt.step)
        fresh = [contribution for contribution in deal.contributions if contribution not in dealt.known]
        dealt.known.update(fresh)
        dealt.pending.extend(fresh)
        if deal.initialize:
            self._session.doing("sending initial values")
            self._client.initialize()

    def _report_completed(self) -> None:
        while self._client.completed:
            contribution = self._client.completed.pop(0)
            spent = self._spent.get(contribution)
            if self._dealt is not None and self._fence is not None and spent is not None:
                self._session.send(
                    contributed=pb.Contributed(
                        step=self._dealt.step,
                        contribution=contribution,
                        compute_s=spent.compute_s,
                        push_s=spent.push_s,
                        pull_s=spent.pull_s,
                        fence=to_proto(self._fence),
                    )
                )

    def _take_last_weights(self) -> None:
        """The run is over: the shards still have its last weights for a moment."""
        dealt = self._dealt
        if self._end is None or not self._end.ok or dealt is None:
            return
        deadline = time.monotonic() + LAST_WEIGHTS_S
        while self._client.model.version != dealt.step and time.monotonic() < deadline:
            self._client.pull(dealt.step, dealt.applied)
            event = self._inbox.get(self._client.links.tick())
            if isinstance(event, Lost):
                return
            if event is not None and not isinstance(event, Said):
                self._client.handle(event)

    def _require_ok(self) -> None:
        if self._session.failure is not None:
            raise self._session.failure
        if self._end is not None and not self._end.ok:
            raise PsError(self._end.reason)
