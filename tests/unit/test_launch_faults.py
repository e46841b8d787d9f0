"""What a fault does that cannot be done: whom it would strike is gone, or somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ps.errors import ConfigError
from workers.launch import faults
from workers.launch.alive import Process
from workers.launch.faults import Kind, Plan


def struck(kind: Kind, pid: int) -> bool:
    return faults.strike(Plan(kind, 0.0, 0.0, 0.0, 0.0), Process("shard", 0, pid))


def test_who_has_just_gone_is_not_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    # It was still there when its connections were looked up.
    monkeypatch.setattr(faults, "_connections", lambda _pid: [3])
    assert [struck(kind, gone.pid) for kind in Kind] == [False, False, False]


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.STOP])
def test_another_users_process_is_named(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ConfigError, match=r"^shard 0 \(pid 12\) is another user's"):
        struck(kind, 12)
