"""`windlass status`: what is going on in a cluster, from anywhere that reaches its coordinator."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ps.errors import AccessDenied, ConfigError, HandshakeFailed, PeerUnavailable, PsError, StorageError
from ps.storage import layout
from ps.wire.security import CLIENT, Security, load_security
from workers.cli import report
from workers.cli.arguments import Certificates
from workers.launch.alive import alive
from workers.launch.folder import RunFolder
from workers.launch.metrics import Progress, Tail, last_evaluation
from workers.launch.signals import Signals
from workers.launch.snapshot import Snapshot, from_message
from workers.launch.watch import Watcher, quiet_grpc

#: Where `windlass train` puts runs unless it is told otherwise.
RUNS = Path("runs")
ANSWER_S = 5.0
#: Where nobody listens, that is known at once.
REFUSED_S = 0.1
#: A coordinator that is started again is back within this.
BACK_S = 15.0
#: Who writes into a pipe has no width; then nothing is left out.
WIDE = 200
_TICK_S = 0.1


def status(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|HOST:PORT]",
            help="A run folder, or where a coordinator is. Default: $WINDLASS_COORDINATOR, or the newest run in runs/.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (docs/status.md); with --watch one per line.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the run ends, or Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch: how often.")] = 1.0,
    certificates: Certificates = None,
) -> int:
    """Show what a running cluster does.

    Its exit code is 1 when nothing runs there; of a run folder it then says what it holds, or that it is complete.
    """
    place = find_place(target)
    security = load_security(certificates or place.certificates, insecure=False, role=CLIENT)
    try:
        if watch:
            return _watch(place, security, as_json, every)
        _print(ask(place, security), as_json)
    except PeerUnavailable as error:
        if as_json:
            print(json.dumps({"running": False, "error": error.message, **place.last_known()}))
            return 1
        complete = place.completion()
        if complete is None:
            raise
        print(complete)
        return 1
    return 0


class Place:
    """Where to ask: an address, or the run folder that knows it."""

    def __init__(self, address: str | None, folder: RunFolder | None) -> None:
        self._address = address
        self._folder = folder

    def coordinator(self) -> tuple[str, int | None]:
        """Its address, and its process id where that is known: another run's may have taken its port.

        Raises:
            PeerUnavailable: the run folder names none.
        """
        if self._folder is None:
            return self._address or "", None
        for member in self._folder.members():
            if member.get("role") == "coordinator" and member.get("address"):
                return str(member["address"]), member.get("pid")
        raise self.not_running()

    @property
    def certificates(self) -> Path | None:
        """Those of the run, where its folder is known."""
        return self._folder.read_job().security.certificates if self._folder is not None else None

    def not_running(self, cause: PsError | None = None, silent_s: float = 0.0) -> PeerUnavailable:
        """Nobody answers: say so, and what is known instead.

        Args:
            cause: what asking has come to.
            silent_s: for so long the coordinator has been asked without an answer.
        """
        if self._folder is None:
            if cause is not None and "Socket closed" in cause.message:
                return PeerUnavailable(
                    f"{self._address} closed the connection: it wants certificates (--certificates), or others than "
                    "these, or is no coordinator"
                )
            return PeerUnavailable(f"nothing answers at {self._address}; is a coordinator running there?")
        complete = self.completion()
        if complete is not None:
            return PeerUnavailable(complete)
        known = self.last_known()
        reached = f"step {known['version']} of {known['steps']}, {_checkpoints(self._folder)}"
        there = [process.pid for process in alive(self._folder) if process.role == "coordinator"]
        if there and silent_s > REFUSED_S and self._folder.is_held():
            return PeerUnavailable(
                f"{self._folder.path}: its coordinator (process {there[0]}) has not answered for {silent_s:.1f} s: it "
                f"is stopped or overloaded: {reached}"
            )
        if self._folder.is_held():
            return PeerUnavailable(
                f"{self._folder.path}: its coordinator is being started, or has just ended: {reached}"
            )
        return PeerUnavailable(
            f"{self._folder.path} is not running: {reached}; to go on: windlass resume {self._folder.path}"
        )

    def last_known(self) -> dict[str, Any]:
        """What the run folder holds; empty for an address."""
        if self._folder is None:
            return {}
        job = self._folder.read_job().model_copy(update={"run_dir": self._folder.path})
        progress = Progress(job.training.end)
        progress.restart(Tail(self._folder.metrics).poll()[1])
        saved: list[str] | None = None
        with suppress(StorageError):
            saved = [folder.name for folder in layout.checkpoints(job.checkpoint_dir)]
        return {
            "run_dir": str(self._folder.path),
            "version": progress.version,
            "steps": progress.steps,
            "checkpoints": saved,
        }

    def completion(self) -> str | None:
        """That the run has nothing left to do, in the words of `windlass resume`; None: it has, or nobody knows."""
        if self._folder is None:
            return None
        job = self._folder.read_job().model_copy(update={"run_dir": self._folder.path})
        with suppress(StorageError):
            return report.completion(self._folder, job)
        return None

    def last_words(self, latest: Snapshot) -> str | None:
        """How a run that was watched has ended; None: it goes on, or may."""
        known = self.last_known() or {"version": latest.version, "steps": latest.steps}
        complete = self.completion() is not None or known["version"] >= known["steps"]
        if latest.phase != "ended" and not (latest.phase == "unreachable" and complete):
            return None
        evaluation = last_evaluation(self._folder.metrics) if self._folder is not None else None
        loss = evaluation["loss"] if evaluation is not None else latest.evaluation_loss
        held_out = f", held-out {loss:.4f}" if loss is not None else ""
        return f"{'finished' if complete else 'ended'}: {known['version']} of {known['steps']} steps{held_out}"


def _checkpoints(folder: RunFolder) -> str:
    """Which there are, or why nobody can tell."""
    job = folder.read_job().model_copy(update={"run_dir": folder.path})
    try:
        saved = [checkpoint.name for checkpoint in layout.checkpoints(job.checkpoint_dir)]
    except StorageError as error:
        return error.message
    if not saved:
        return "no checkpoint"
    return f"one checkpoint, {saved[0]}" if len(saved) == 1 else f"{len(saved)} checkpoints, the newest {saved[-1]}"


def find_place(target: str | None) -> Place:
    """Find out what the command line means.

    Raises:
        ConfigError: it is neither a run folder nor an address, or there is nothing to choose from.
    """
    if target is None:
        target = os.environ.get("WINDLASS_COORDINATOR") or str(_newest_run())
    folder = RunFolder(Path(target))
    if folder.holds_run():
        return Place(None, folder)
    host, _, port = target.rpartition(":")
    if host and port.isascii() and port.isdigit() and 0 < int(port) <= 65_535:
        return Place(target, None)
    raise ConfigError(f"{target} is neither a run folder (there is no {folder.config}) nor HOST:PORT")


def _newest_run() -> Path:
    found = [config for config in RUNS.glob("*/config.json") if config.is_file()]
    if not found:
        raise ConfigError(
            f"there is no run in {RUNS}/: name a run folder, or a coordinator as HOST:PORT or in $WINDLASS_COORDINATOR"
        )
    return max(found, key=lambda config: config.stat().st_mtime).parent


def ask(place: Place, security: Security) -> Snapshot:
    """Ask a coordinator what is going on.

    Raises:
        PeerUnavailable: it does not answer; says what is known instead.
        HandshakeFailed, AccessDenied: somebody is there, and does not answer just anybody.
    """
    address, pid = place.coordinator()
    quiet_grpc()
    # Here, because it takes long and only this command needs it.
    from ps.client.status import StatusClient

    with StatusClient(address, security) as client:
        asked_at = time.monotonic()
        try:
            message = client.ask(ANSWER_S)
        except (HandshakeFailed, AccessDenied):
            # Somebody is there.
            raise
        except PsError as error:
            raise place.not_running(error, time.monotonic() - asked_at) from None
    if pid is not None and message.coordinator.pid != pid:
        # Another run has its port now.
        raise place.not_running()
    return from_message(message)


def _print(snapshot: Snapshot, as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot.as_json(), allow_nan=False), flush=True)
        return
    from workers.launch.view import render

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    console.print(render(snapshot, console.width))


def _watch(place: Place, security: Security, as_json: bool, every_s: float) -> int:
    from workers.launch.live import Screen
    from workers.launch.view import plain_line, render

    screen = Screen(sys.stdout) if sys.stdout.isatty() and not as_json else None
    ask(place, security)
    watcher = Watcher(place.coordinator()[0], security, min(every_s, 0.5))
    if screen is not None:
        screen.open()
    printed_at = float("-inf")
    try:
        # A KeyboardInterrupt is lost when it comes in a callback of the collector or of grpc.
        with Signals() as signals:
            while watcher.silent_s < BACK_S:
                if asked := signals.wait(_TICK_S):
                    return 128 + asked[0]
                latest, now = watcher.latest(), time.monotonic()
                if latest is None or now - printed_at < every_s:
                    continue
                printed_at = now
                words = place.last_words(latest)
                if words is not None:
                    latest = replace(latest, phase="ended", waits=(), waiting_for="")
                if screen is not None:
                    screen.draw(lambda width, height, latest=latest: render(latest, width, height))  # type: ignore[misc]
                elif as_json:
                    print(json.dumps(latest.as_json()), flush=True)
                elif words is None:
                    print(plain_line(latest), flush=True)
                if words is not None:
                    break
            else:
                raise place.not_running(silent_s=watcher.silent_s)
    finally:
        if screen is not None:
            screen.close()
        watcher.close()
    if not as_json:
        print(words)
    return 0
