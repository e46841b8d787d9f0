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
from ps import failpoints
from ps.client.arrays import NamedArrays, copy_of, table_of
from ps.client.client import ParameterClient
from ps.client.duty import Duty
from ps.client.grpc_transport import GrpcTransport
from ps.client.links import Inbox, Lost, Said
from ps.config import RunConfig, from_json
from ps.errors import GradientError, PeerUnavailable, PsError, VersionGone, WaitTimeout
from ps.kernels.compile import warm_up_worker
from ps.sharding import make_plan
from ps.telemetry.courier import Courier
from ps.telemetry.trace import COMPUTE, OFF, Recorder
from ps.types import Fence, Role, slot_range
from ps.wire.messages import MAX_TOKENS
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


class Client:
    """A worker's connection to a cluster. Make it with `connect`; owned by one thread."""

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        client: ParameterClient,
        arrays: NamedArrays,
        config: RunConfig,
        trace: Recorder = OFF,
    ) -> None:
        self._session = session
        self._inbox = inbox
        self._client = client
        self._arrays = arrays
        self._config = config
        slots, wire = config.batch.micro_batches_per_step, config.precision.wire
        self._duty = Duty(session, inbox, client, slots, wire, eager=config.is_eager, trace=trace)
        self._trace = trace
        self._courier = Courier(session, trace)
        self._courier.start()
        #: When each contribution of the open step was handed out.
        self._handed_at: dict[int, float] = {}
        #: Why it is over: the coordinator's word, or this client's own.
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
        trace = Recorder(config.traced_steps)
        rank = int(session.member.rank)
        failpoints.enter(f"worker-{rank}")
        client = ParameterClient(GrpcTransport(security), inbox, rank, incarnation, table, arrays, trace=trace)
        session.start()
        return cls(session, inbox, client, arrays, config, trace)

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
        self._courier.close()
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
        self._duty.done()
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
            False: the work is of a step or fence that is over, or another worker has finished it; nothing was sent.
            Whatever is still wanted of it is dealt again, so there is nothing to do.

        Raises:
            GradientError: a name, a shape, a dtype, a layout or `tokens` is wrong; nothing was sent.
        """
        checked = self._arrays.check(gradients)
        if not 0 <= int(tokens) <= MAX_TOKENS:
            raise GradientError(f"tokens={tokens}: must be from 0 to 2^48")
        dealt = self._duty.dealt
        if self._end is not None or dealt is None or (work.fence, work.step) != (self._duty.fence, dealt.step):
            return False
        if not self._duty.wants(work.contribution):
            return False
        began = time.monotonic()
        self._duty.forget_gradient()
        self._arrays.fill(checked, work.loss_scale)
        handed_at = self._handed_at.get(work.contribution, began)
        self._trace.add(
            "compute",
            "compute",
            work.step,
            int(handed_at * 1e9),
            int(began * 1e9),
            contribution=work.contribution,
            track=COMPUTE,
        )
        report = (float(loss_sum), int(tokens))
        self._duty.push(self._duty.begin_push(work.contribution, lambda: report), began - handed_at)
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
        self._duty.done()
        if not self._is_closed:
            self._take(0.0)
        while self._end is None:
            dealt = self._duty.dealt
            if dealt is not None and (version is None or version <= dealt.step):
                if version is not None and version < dealt.step:
                    raise VersionGone(f"version {version} is no longer published; the newest is {dealt.step}")
                if self._client.pulled.use(dealt.step, early=False):
                    return self._arrays.weights
                self._duty.pull()
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
        ready, dealt = self._duty.ready(), self._duty.dealt
        if ready is None or self._duty.fence is None:
            if dealt is not None and dealt.step >= self._config.training.end:
                # The last version is pulled by everybody, so that `pull` has it when the run is over.
                self._client.pull(dealt.step, dealt.applied)
            return None
        # Nobody deals parts of held-out data to a worker that has announced none.
        contribution = ready.pending[0]
        self._duty.pulled()
        self._duty.doing(f"computing contribution {contribution}")
        self._handed_at[contribution] = time.monotonic()
        slots = slot_range(contribution, self._duty.contributions, self._config.batch.micro_batches_per_step)
        return Work(ready.step, contribution, slots, ready.loss_scale, self._arrays.weights, self._duty.fence)

    # -- Events ---------------------------------------------------------------------------------

    def _pause(self, deadline: float, timeout_s: float, what: str) -> None:
        """Take what comes next."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeout(f"waited {timeout_s:g} s for {what}")
        self._take(left)

    def _waiting_for(self) -> str:
        dealt, coordinator = self._duty.dealt, self._session.address
        if self._duty.fence is None:
            return f"the cluster of {coordinator} to serve: are all of its {self._config.cluster.shards} shards there?"
        if dealt is None:
            return f"work under {self._duty.fence} from {coordinator}"
        if dealt.pending:
            return f"step {dealt.step}: weights from the shards, to compute contributions {dealt.pending}"
        return f"step {dealt.step} to be decided by {coordinator}, and for work of the next one"

    def _take(self, timeout_s: float) -> None:
        self._duty.take(timeout_s)
        if self._end is None and self._duty.end is not None:
            self._end = self._duty.end
            self._take_last_weights()

    def _take_last_weights(self) -> None:
        """The run is over: the shards still have its last weights for a moment."""
        dealt = self._duty.dealt
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
