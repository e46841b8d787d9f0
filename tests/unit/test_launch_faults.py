"""What a fault does that cannot be done: whom it would strike is gone, or somebody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ps.errors import ConfigError
from workers.launch import faults
from workers.launch.alive import Process
from workers.launch.chaos import most_deaths
from workers.launch.faults import Kind, Plan
from workers.launch.jobs import resolve
from workers.launch.signals import AskedToStop, Signals


def struck(kind: Kind, pid: int) -> bool:
    return faults.strike(Plan(kind, 0.0, 0.0, 0.0, 0.0), Process("shard", 0, pid))


def test_who_has_just_gone_is_not_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    # It was still there when its connections were looked up.
    monkeypatch.setattr(faults, "_connections", lambda _pid: [3])
    assert [struck(kind, gone.pid) for kind in Kind] == [False, False, False]


def test_whatever_ends_a_stop_the_process_goes_on() -> None:
    stopped = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    states = []

    def pause(seconds: float) -> None:
        os.waitpid(stopped.pid, os.WUNTRACED)
        states.append((seconds, state(stopped.pid)))
        raise AskedToStop(signal.SIGTERM)

    try:
        with pytest.raises(AskedToStop, match="SIGTERM"):
            faults.strike(Plan(Kind.STOP, 0.0, 0.0, 7.0, 0.0), Process("shard", 0, stopped.pid), pause)
        assert states == [(7.0, "T")]
        assert state(stopped.pid) != "T"
    finally:
        stopped.kill()
        stopped.communicate()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_pause_ends_when_a_signal_asks_for_it() -> None:
    # Under nohup it is ignored, and stays so.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        _ask_during_a_pause()
    finally:
        signal.signal(signal.SIGHUP, before)


def _ask_during_a_pause() -> None:
    with Signals() as signals:
        signals.pause(0.0)
        # No reason to stop.
        os.kill(os.getpid(), signal.SIGCHLD)
        signals.pause(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(AskedToStop) as asked:
            signals.pause(60.0)
    assert asked.value.signum is signal.SIGHUP


def test_deaths_are_counted_for_each_process_and_within_a_minute() -> None:
    job = resolve(None, ["run_dir=runs/a", "cluster.standbys=1"])
    # Of the roles: coordinator, shard, standby, worker.
    drawn = [Plan(kind, role, 0.9, 30.0, 10.0) for kind in (Kind.KILL, Kind.STOP) for role in (0.0, 0.99, 0.99)]
    assert most_deaths(iter(drawn), 6, job) == (Process("worker", 1, 0), 2)
    assert most_deaths(iter(drawn), 1, job) == (Process("coordinator", 0, 0), 1)
    assert most_deaths(iter(drawn[3:]), 3, job)[1] == 0
    # Two stops and its own wait lie between the first and the last: 70 s.
    apart = [drawn[0], drawn[3], drawn[3], drawn[0]]
    assert most_deaths(iter(apart), 4, job)[1] == 1


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.STOP])
def test_another_users_process_is_named(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ConfigError, match=r"^shard 0 \(pid 12\) is another user's"):
        struck(kind, 12)
