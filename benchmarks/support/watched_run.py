"""A small run on this host that a benchmark strikes: its steps as they are recorded, and its processes."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ps.client.status import StatusClient
from ps.wire.security import PLAIN
from workers.launch.alive import Process, alive
from workers.launch.folder import RunFolder
from workers.launch.metrics import Tail

#: A run that has not gone on after this has not come through.
DEADLINE_S = 120.0
_LOOK_S = 0.002
LEASE_S = 2.0
SMALL = [
    "data.vocab_size=300",
    "data.sequence_length=32",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=2",
    "batch.micro_batches_per_step=4",
]
#: On top of that: 10M parameters.
LARGE = [
    "data.vocab_size=300",
    "data.sequence_length=32",
    "model.num_layers=5",
    "model.hidden_size=416",
    "model.num_heads=8",
    "batch.micro_batches_per_step=2",
]
COMMON = [
    "training.steps=1000000",
    "evaluation.every_steps=0",
    "batch.contributions_per_step=2",
    "telemetry.metrics=false",
    "launch.restart_limit=1000",
    "launch.progress_every_steps=1000",
    f"membership.lease_s={LEASE_S}",
]


def job(folder: Path, *overrides: str) -> list[str]:
    """Overrides of a job that never ends: a GPT of 126,016 parameters, on a text of made-up words in the folder."""
    text = folder / "text.txt"
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(5)) for _ in range(300)]
    text.write_text("\n".join(" ".join(draw.choice(words) for _ in range(12)) for _ in range(3000)))
    return [f"data.paths=['{text}']", f"data.cache_dir={folder / 'cache'}", *SMALL, *COMMON, *overrides]


def await_that(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {DEADLINE_S:.0f} s for {what}")
        time.sleep(0.05)


class WatchedRun:
    """What a run records, and who is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        await_that(self.folder.metrics.exists, "the first step")
        self._metrics = Tail(self.folder.metrics)
        self.step = -1
        self._compute_s: deque[float] = deque(maxlen=1000)
        self.went_back = 0

    def look(self) -> int:
        """Read what has been recorded; returns the newest step."""
        rewritten, lines = self._metrics.poll()
        before = self.step
        for line in lines:
            if line["kind"] == "step":
                self.step = line["step"]
                self._compute_s.append(line["compute_seconds"] or 0.0)
        if rewritten:
            # A rollback: the file is read from its beginning.
            self.went_back += max(0, before - self.step)
        return self.step

    def await_step(self, step: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.look() < step:
            if time.monotonic() > deadline:
                raise SystemExit(f"step {step} has not come in {DEADLINE_S:.0f} s:\n{self._log()[-4000:]}")
            time.sleep(_LOOK_S)

    def members(self) -> list[tuple[str, int, int, str]]:
        """(role, rank, pid, state) of every member."""
        address = next(m["address"] for m in self.folder.members() if m["role"] == "coordinator")
        with StatusClient(address, PLAIN) as client:
            answer = client.ask(5.0)
        return [(m.member.role, m.member.rank, m.member.pid, m.state) for m in answer.members]

    def pid_of(self, role: str, rank: int) -> int:
        if role == "coordinator":
            return next(process.pid for process in self.processes() if process.role == role)
        return next(pid for found, number, pid, _ in self.members() if (found, number) == (role, rank))

    def everybody(self, role: str, count: int) -> bool:
        """Whether so many of a role are live; one that was killed is for a moment, in the coordinator's eyes."""
        alive = {process.pid for process in self.processes()}
        members = self.members()
        return sum(found == role and state == "live" and pid in alive for found, _, pid, state in members) >= count

    @property
    def compute_s(self) -> float:
        """Seconds that a step's computing usually takes."""
        return statistics.median(self._compute_s)

    def standbys_in_sync(self) -> int:
        """Standbys that may take over, as the coordinator's log has it."""
        log = self._log()
        came, went = log.count(" holds the same as shard "), log.count(": until there is another one, shard ")
        return came - went - log.count(" takes over as shard ")

    def processes(self) -> list[Process]:
        """Who is alive."""
        return alive(self.folder)

    def _log(self) -> str:
        return (self.folder.logs / "coordinator-0.log").read_text()
