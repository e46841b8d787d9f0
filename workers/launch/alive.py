"""Which processes of a run are alive on this host."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ps.types import Role
from workers.launch.folder import RunFolder

#: What `python -m` runs in every role that a launcher starts.
_MODULE = "workers.cli.main"


@dataclass(frozen=True)
class Process:
    """A role of a run that is alive here."""

    role: str
    rank: int
    pid: int

    def __str__(self) -> str:
        return f"{self.role} {self.rank} (pid {self.pid})"


def alive(folder: RunFolder) -> list[Process]:
    """The members in a run's cluster.json that `windlass train` has started on this host, in its order.

    A number alone may be another process's: a member's of another host or container, or of whoever got the number of
    one that died. What counts is the command line, which names the role and the run.
    """
    members = folder.members()
    coordinator = next((str(m.get("address", "")) for m in members if m.get("role") == Role.COORDINATOR), "")
    found = []
    for member in members:
        process = Process(str(member.get("role", "")), int(member.get("rank") or 0), int(member.get("pid") or 0))
        if process.pid > 0 and member.get("host") == socket.gethostname() and _is_it(process, folder, coordinator):
            found.append(process)
    return found


def _is_it(process: Process, folder: RunFolder, coordinator: str) -> bool:
    """Whether this process has the command line that the launcher gives to this role of this run."""
    proc = Path("/proc", str(process.pid))
    try:
        words = [os.fsdecode(word) for word in (proc / "cmdline").read_bytes().split(b"\0")]
        state = (proc / "stat").read_text().rpartition(")")[2].split()[0]
        place = (proc / "cwd").readlink()
    except OSError:
        return False
    if state in "ZX" or _MODULE not in words:
        return False
    role, *arguments = words[words.index(_MODULE) + 1 :]
    if process.role == Role.COORDINATOR:
        return role == process.role and (place / arguments[0]).resolve() == folder.config.resolve()
    # The second process of a shard has the same command line as the first.
    kind, number = (Role.WORKER, "--rank") if process.role == Role.WORKER else (Role.SHARD, "--index")
    told = dict(pairwise(arguments))
    return role == kind and told.get("--coordinator") == coordinator and told.get(number) == str(process.rank)
