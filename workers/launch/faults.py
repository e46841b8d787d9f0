"""Faults for the processes of a run on this host: killed, stopped for a while, cut off from each other.

Needs Linux, and processes of the same user: a connection is cut by shutting down a duplicate of its socket.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ps.errors import ConfigError
from workers.launch.alive import Process

#: System calls that Python has no name for; the same numbers on every architecture of Linux.
_PIDFD_GETFD = 438
_ESTABLISHED = "01"
#: Sleeps so many seconds; it may raise, to end everything.
Pause = Callable[[float], object]
_SOCKET = re.compile(r"socket:\[(\d+)\]")


class Kind(StrEnum):
    """What is done to a process."""

    KILL = "kill"
    STOP = "stop"
    CUT = "cut"


@dataclass(frozen=True)
class Plan:
    """What is drawn for one fault: the same seed draws the same plans."""

    kind: Kind
    #: Of the role among those that are there, and of the process in it, in [0, 1).
    role: float
    member: float
    #: How long a stopped process stays so, in seconds.
    stop_s: float
    #: Seconds until the fault, after the one before.
    wait_s: float


def plans(seed: int, kinds: Sequence[Kind], every_s: float, longest_stop_s: float) -> Iterator[Plan]:
    """Draw faults without end.

    Args:
        seed: of the generator.
        kinds: of which each is as likely.
        every_s: between two faults, on average.
        longest_stop_s: half of the stops are shorter than a tenth of it.
    """
    draw = random.Random(seed)
    while True:
        stop_s = longest_stop_s * draw.choice((0.1 * draw.random(), draw.random()))
        yield Plan(draw.choice(list(kinds)), draw.random(), draw.random(), stop_s, draw.uniform(0.5, 1.5) * every_s)


def choose(plan: Plan, processes: Sequence[Process]) -> Process:
    """Whom a fault strikes: each role is as likely, and in it each process."""
    roles = sorted({process.role for process in processes})
    role = roles[int(plan.role * len(roles))]
    those = [process for process in processes if process.role == role]
    return those[int(plan.member * len(those))]


def strike(plan: Plan, process: Process, pause: Pause = time.sleep) -> bool:
    """Carry out a fault; False: the process was gone, or has no connection to cut.

    Args:
        plan, process: what is done, and to whom.
        pause: sleeps so many seconds; whatever it raises, nobody stays stopped.

    Raises:
        ConfigError: this user, or the kernel, may not do that to it.
    """
    try:
        if plan.kind is Kind.KILL:
            os.kill(process.pid, signal.SIGKILL)
            return True
        if plan.kind is Kind.STOP:
            return _stop(process.pid, plan.stop_s, pause)
        return cut(process.pid, plan.member)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ConfigError(
            f"{process} is another user's: strike a run as the user that started it, or as root"
        ) from None


def _stop(pid: int, seconds: float, pause: Pause) -> bool:
    os.kill(pid, signal.SIGSTOP)
    try:
        pause(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return True


def cut(pid: int, which: float) -> bool:
    """Cut one of a process's TCP connections, as a network that resets it would; False: it has none.

    Args:
        which: of them, in [0, 1).

    Raises:
        ConfigError: the kernel does not allow it.
    """
    connections = _connections(pid)
    if not connections:
        return False
    process = os.pidfd_open(pid)
    try:
        descriptor = _duplicate(process, connections[int(which * len(connections))])
    finally:
        os.close(process)
    if descriptor < 0:
        return False
    with socket.socket(fileno=descriptor) as connection, suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    return True


def _duplicate(process: int, descriptor: int) -> int:
    """A duplicate of another process's descriptor; -1: it is closed by now."""
    libc = ctypes.CDLL(None, use_errno=True)
    duplicate = int(libc.syscall(_PIDFD_GETFD, process, descriptor, 0))
    if duplicate >= 0:
        return duplicate
    number = ctypes.get_errno()
    if number in (errno.EBADF, errno.ESRCH):
        return -1
    raise ConfigError(
        f"connections cannot be cut here: pidfd_getfd says {os.strerror(number)}; it needs Linux 5.6 and leave to "
        "trace the run's processes (kernel.yama.ptrace_scope=0, or root). Leave them out: --kinds kill,stop"
    )


def _connections(pid: int) -> list[int]:
    """The descriptors of a process's established TCP connections."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _ESTABLISHED:
                    inodes.add(fields[9])
    found = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                match = _SOCKET.fullmatch(str(entry.readlink()))
                if match is not None and match[1] in inodes:
                    found.append(int(entry.name))
    return sorted(found)
