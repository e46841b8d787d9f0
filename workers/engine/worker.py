"""The worker's loop: one thread that takes events, and does the work that it was dealt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from protos.ps.v1 import coordinator_pb2 as pb
from ps.client.duty import Dealt, Duty, Interrupted
from ps.client.links import Arrived, Inbox, Said
from ps.client.pusher import Contribution
from ps.errors import PsError
from ps.pages import trim_heap
from ps.telemetry.trace import COMPUTE, OFF, Recorder
from ps.wire.session import Session
from workers.engine import metrics

log = logging.getLogger(__name__)

#: Waiting for the next event says so after this; the links ask to be looked after sooner.
_TAKE_S = 1.0
#: How long a worker that was asked to go works on an eager step, which others may not be there to complete.
LEAVE_S = 45.0


class Contributor(Protocol):
    """Who computes. Either may raise `Interrupted`."""

    def contribute(self, step: int, contribution: int, loss_scale: float) -> Contribution:
        """Compute a contribution; pushing it has begun.

        What was computed before is forgotten first (`Duty.forget_gradient`), when its memory is needed.
        """

    def evaluate(self, part: int) -> tuple[float, int, int]:
        """Evaluate one part of the held-out data: (loss sum in nats, tokens, bytes of text)."""


class Worker:
    """Computes contributions until the coordinator ends the run."""

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        duty: Duty,
        contributor: Contributor,
        on_work: Callable[[], None] = lambda: None,
        trace: Recorder = OFF,
    ) -> None:
        """Tie the parts together.

        Args:
            on_work: called before the first contribution: by then the coordinator has found model and data
                to be the run's.
        """
        self._session = session
        self._inbox = inbox
        self._duty = duty
        self._contributor = contributor
        self._on_work = on_work
        self._trace = trace
        self._has_worked = False
        #: The fence under which something was computed last, counted as `Duty.fences`.
        self._worked_under = 0
        self._leaving = False
        #: The step after which it leaves, and when at the latest, by the monotonic clock.
        self._last_step: int | None = None
        self._leave_by = 0.0

    def run(self) -> str:
        """Work until the end; returns why it ended.

        Raises:
            PsError: the coordinator ended the run with an error, or a shard refused what it was sent.
        """
        duty = self._duty
        while True:
            duty.take(0.0)
            if duty.end is not None:
                break
            if self._last_step is not None and not self._is_needed(self._last_step):
                self._go()
                continue
            dealt = None if self._leaving else duty.ready()
            if dealt is None:
                duty.take(_TAKE_S)
                continue
            try:
                self._work(dealt)
            except Interrupted as reason:
                log.info("left a contribution: %s", reason)
            finally:
                duty.done()
        if not duty.end.ok:
            raise PsError(duty.end.reason)
        return duty.end.reason

    def leave(self) -> None:
        """Go by own will: what is pushed stays, the rest is dealt again. Safe in a signal handler.

        Of an eager step chunks may be updated already, and it must be completed even if everybody is asked to go: so
        it is worked on to its end, unless this is called again.
        """
        dealt = self._duty.dealt
        if self._duty.eager and dealt is not None and self._last_step is None:
            self._last_step, self._leave_by = dealt.step, time.monotonic() + LEAVE_S
            self._inbox.put(Arrived())
        else:
            self._go()

    def _is_needed(self, step: int) -> bool:
        """Whether a step may be open that somebody has to complete."""
        dealt = self._duty.dealt
        is_open = dealt is None or dealt.step == step
        return is_open and self._session.connected and time.monotonic() < self._leave_by

    def _go(self) -> None:
        self._leaving = True
        self._session.send(leave=pb.Leave(reason="asked to stop"))
        self._inbox.put(Said(pb.SessionResponse(end=pb.End(ok=True, reason="asked to stop"))))

    def _work(self, dealt: Dealt) -> None:
        pull_s = self._duty.pulled()
        if dealt.evaluate:
            waited_s = self._evaluate(dealt, dealt.evaluate[0])
        else:
            waited_s = self._contribute(dealt, dealt.pending[0])
        if pull_s is not None:
            metrics.PULL_SECONDS.observe(pull_s + waited_s)

    def _evaluate(self, dealt: Dealt, part: int) -> float:
        """Returns the seconds in which weights were waited for."""
        self._duty.doing(f"evaluating part {part}")
        with self._trace.span("evaluate", "compute", dealt.step, track=COMPUTE):
            loss_sum, tokens, num_bytes = self._contributor.evaluate(part)
        dealt.evaluate.remove(part)
        self._session.send(
            evaluated=pb.Evaluated(version=dealt.step, part=part, loss_sum=loss_sum, tokens=tokens, bytes=num_bytes)
        )
        return self._duty.waited()

    def _contribute(self, dealt: Dealt, contribution: int) -> float:
        """Returns the seconds in which weights were waited for."""
        duty = self._duty
        duty.doing(f"computing contribution {contribution}")
        if not self._has_worked:
            self._has_worked = True
            self._on_work()
        if self._worked_under != duty.fences:
            # Preparing the data, sending initial values: none of it comes again.
            self._worked_under = duty.fences
            trim_heap()
        started = time.monotonic()
        with self._trace.span("compute", "compute", dealt.step, contribution=contribution, track=COMPUTE):
            begun = self._contributor.contribute(dealt.step, contribution, dealt.loss_scale)
        duty.done()
        waited_s = duty.waited()
        compute_s = time.monotonic() - started - waited_s - duty.settled()
        duty.push(begun, compute_s)
        metrics.COMPUTE_SECONDS.observe(compute_s)
        return waited_s
