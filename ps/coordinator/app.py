"""The coordinator process: journal, loop, server; the way in and the way out."""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import coordinator_pb2_grpc as pb_grpc
from ps.config import RunConfig
from ps.coordinator.decision import TrainingState
from ps.coordinator.effects import Effects
from ps.coordinator.history import History
from ps.coordinator.loop import Loop
from ps.coordinator.loss_scaler import LossScaler
from ps.coordinator.machine import Machine
from ps.coordinator.members import MemberState
from ps.coordinator.monitoring import Monitor
from ps.coordinator.recorder import Recorder
from ps.coordinator.recovery import Candidate
from ps.coordinator.run import Phase
from ps.coordinator.service import SERVICE, CoordinatorServicer, Sessions
from ps.coordinator.standbys import REJOIN_S
from ps.coordinator.status import member_message
from ps.coordinator.summarizer import Summarizer
from ps.coordinator.timeline import Timeline
from ps.errors import PsError, StorageError
from ps.storage import layout
from ps.storage.journal import Journal
from ps.storage.manifest import Manifest, read_manifest
from ps.telemetry import logs
from ps.telemetry.exporter import identify, serve_metrics
from ps.types import Role
from ps.wire.health import Health, enable_reflection
from ps.wire.options import bind, make_server, reachable
from ps.wire.security import PLAIN, Security

log = logging.getLogger(__name__)

#: Threads of the server: two wait in each session.
MAX_SESSIONS = 512
#: How long members may take to hear that the run is over.
END_S = 5.0
WAIT_LOG_S = 10.0


class CoordinatorApp:
    """One coordinator process."""

    def __init__(
        self,
        config: RunConfig,
        job_json: str,
        listen: str,
        security: Security = PLAIN,
        metrics_listen: str | None = None,
        advertise: str | None = None,
        linger_s: float = 0.0,
    ) -> None:
        self._config = config
        self._linger_s = linger_s
        self._asked_to_stop = threading.Event()
        self._ended = threading.Event()
        self._outcome: tuple[bool, str] = (True, "")
        self._started_at = time.monotonic()
        #: Since when the run has been at which version.
        self._waited = (0.0, -1)
        self._server = make_server(MAX_SESSIONS)
        port = bind(self._server, listen, security)
        with _without_collector():
            self._journal = Journal.open(config.run_dir / "journal")
        try:
            with _without_collector():
                history = History("", config.contributions, self._journal.take_records())
            job_json = _with_contributions(job_json, config.contributions, history.contributions)
            candidates, rejected = _candidates(config.checkpoint_dir)
            term = self._journal.begin_term()
            self._name_run(history)
            self._there = frozenset(history.there)
            self._machine = Machine(config, history, candidates, rejected, term, time.monotonic())
        except BaseException:
            self._journal.close()
            raise
        self._sessions = Sessions()
        self._loop = Loop(self._carry_out, self._look, self._failed)
        self._recorder = Recorder(config.run_dir, config.run_name)
        self._recorder.keep(history.recorded, set(history.evaluations))
        identify(config.run_name, Role.COORDINATOR, 0)
        self._monitor = Monitor(config, history, candidates)
        if metrics_listen is None and config.telemetry.metrics:
            metrics_listen = f"{config.telemetry.metrics_host}:0"
        self._self = MemberState(
            Role.COORDINATOR,
            0,
            0,
            os.getpid(),
            socket.gethostname(),
            f"{reachable(listen, advertise)}:{port}",
            f"{reachable(metrics_listen, advertise)}:{serve_metrics(metrics_listen)}" if metrics_listen else "",
        )
        self._timeline = Timeline(config.run_dir, history.run, config.traced_steps, self._self)
        self._effects = Effects(
            self._machine,
            self._loop,
            self._sessions,
            self._journal,
            self._recorder,
            self._self,
            job_json,
            self._end,
            security,
        )
        self._summarizer = Summarizer(self._journal)
        self._health = Health(self._server, SERVICE)
        self._serve(history.run, job_json)

    def _serve(self, run: str, job_json: str) -> None:
        """Answer members and tools, once the server is started."""
        myself = member_message(self._self)
        servicer = CoordinatorServicer(self._loop, self._machine, self._sessions, run, job_json, myself, self._timeline)
        pb_grpc.add_CoordinatorServicer_to_server(servicer, self._server)
        enable_reflection(self._server, [pb.DESCRIPTOR.services_by_name["Coordinator"].full_name])

    def _name_run(self, history: History) -> None:
        """The run's name and C are drawn once, and journaled."""
        if not history.run:
            history.run = secrets.token_hex(8)
            record = {"type": "run", "run": history.run, "contributions": history.contributions}
            self._journal.append(record, sync=True)

    def run(self) -> int:
        """Coordinate until the end of the run; returns the exit code.

        Raises:
            PsError: why the run could not go on.
        """
        try:
            self._effects.members_changed()
            self._loop.start()
            self._summarizer.start()
            self._server.start()
            self._health.serving()
            log.info("listening on %s, term %d", self._self.address, self._machine.fence.term)
            self._ended.wait()
            self._say_goodbye()
        finally:
            self._health.not_serving()
            self._loop.stop()
            self._server.stop(grace=0.5).wait(5.0)
            self._effects.close()
            self._summarizer.stop()
            self._journal.close()
        ok, reason = self._outcome
        if not ok:
            raise PsError(reason)
        log.info("%s", reason)
        return 0

    def stop(self, reason: str) -> None:
        """Have the state saved and the run end."""
        self._asked_to_stop.set()
        self._loop.post(lambda _: self._machine.stop(reason))

    def _say_goodbye(self) -> None:
        ok, reason = self._outcome
        self._sessions.end_all(ok, reason)
        self._wait_for_returning()
        self._wait_for_sessions()
        self._timeline.write()
        if ok and self._linger_s:
            log.info("%s; staying for %g s, for who comes late", reason, self._linger_s)
            self._asked_to_stop.wait(self._linger_s)
            self._wait_for_sessions()

    def _wait_for_returning(self) -> None:
        """Who was there when this coordinator's former life ended may not be back yet, and waits for it."""
        while time.monotonic() - self._started_at < REJOIN_S and not self._sessions.have_met(self._there):
            time.sleep(0.02)

    def _wait_for_sessions(self) -> None:
        deadline = time.monotonic() + END_S
        while len(self._sessions) and time.monotonic() < deadline:
            time.sleep(0.02)

    # -- On the loop's thread -------------------------------------------------------------------

    def _carry_out(self, began: float | None = None) -> None:
        """Do what has been asked for, before anything else can happen.

        Args:
            began: since when what led to it has taken; None: it is done at once.
        """
        began = time.monotonic() if began is None else began
        self._effects.carry_out(actions := self._machine.drain())
        self._timeline.note(actions, began)

    def _look(self, now: float, away_s: float) -> None:
        began = time.monotonic()
        self._machine.was_away(away_s, now)
        self._machine.advance(now)
        self._carry_out(began)
        self._effects.catch_up()
        self._monitor.look(self._machine)
        self._say_waiting(now)

    def _say_waiting(self, now: float) -> None:
        machine = self._machine
        since, version = self._waited[0], machine.state.version
        if version != self._waited[1] or machine.phase is Phase.ENDED:
            self._waited = (now, version)
            logs.bind(step=version)
        elif now - since > WAIT_LOG_S:
            self._waited = (now, version)
            waiting = machine.waiting_for(now)
            if waiting:
                log.info("%s", waiting)

    def _end(self, ok: bool, reason: str) -> None:
        if self._ended.is_set():
            return
        self._outcome = (ok, reason)
        self._ended.set()

    def _failed(self, error: BaseException) -> None:
        self._end(False, error.message if isinstance(error, PsError) else f"the coordinator failed: {error}")


@contextmanager
def _without_collector() -> Iterator[None]:
    """Of the hundreds of thousands of records of a journal none is garbage: looking for it takes as long as reading."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _with_contributions(job_json: str, asked: int, journaled: int) -> str:
    """Hand out the job with the run's own C: a worker that cuts steps otherwise would push wrong gradients."""
    if asked == journaled:
        return job_json
    log.warning("batch.contributions_per_step=%d: this run keeps the %d that it began with", asked, journaled)
    job = json.loads(job_json)
    job["batch"] = {**job.get("batch", {}), "contributions_per_step": journaled}
    return json.dumps(job)


def _candidates(checkpoint_dir: Path) -> tuple[list[Candidate], list[str]]:
    """The complete checkpoints, and the names of those whose manifest is damaged."""
    found, rejected = [], []
    for folder in layout.checkpoints(checkpoint_dir):
        try:
            manifest, digest = read_manifest(folder)
        except StorageError as error:
            log.error("%s", error.message)
            rejected.append(folder.name)
            continue
        found.append(Candidate(folder.name, digest, state_of(manifest), _created_at(manifest)))
    return found, rejected


def _created_at(manifest: Manifest) -> float | None:
    try:
        return datetime.fromisoformat(manifest.created).timestamp()
    except ValueError:
        return None


def state_of(manifest: Manifest) -> TrainingState:
    """The training state that a checkpoint holds."""
    scaler = LossScaler(manifest.scaler.scale, manifest.scaler.hysteresis, manifest.scaler.last_overflow)
    return TrainingState(manifest.version, manifest.applied, manifest.skipped, scaler)


def run(
    config: RunConfig,
    job_json: str,
    listen: str,
    security: Security = PLAIN,
    metrics_listen: str | None = None,
    advertise: str | None = None,
    linger_s: float = 0.0,
) -> int:
    """Run the coordinator until the end of the run; returns the exit code.

    Args:
        config: what the coordinator acts on of the job.
        job_json: the whole resolved job, which it hands to the other roles.
        listen: host:port; port 0 takes any.
        security: its certificates, if any.
        metrics_listen: host:port of the Prometheus exporter; None: as the job says.
        advertise: the host that others are told; None: that of `listen`, or this host's name.
        linger_s: how long to stay after the end, so that a member that starts late hears of it.

    Raises:
        PsError: why it could not start, or why the run could not go on; one line.
    """
    app = CoordinatorApp(config, job_json, listen, security, metrics_listen, advertise, linger_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        signal.signal(number, lambda *_, name=name: app.stop(f"asked to stop ({name})"))
    return app.run()
