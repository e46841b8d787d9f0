"""The machine that a process runs on: its name, and the cores that it lets the process use."""

from __future__ import annotations

import os
import socket
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Of control groups, version 2: what a container may use, as it sees it.
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def machine_name() -> str:
    """Name the machine since its last boot: containers of one host have one name, virtual machines each have theirs."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def available_cores() -> int:
    """Return how many cores this process may keep busy, at least 1: its affinity, and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return min(cores, cores_of_quota(CPU_MAX.read_text(encoding="ascii")) or cores)
    except OSError:
        return cores


def cores_of_quota(text: str) -> int | None:
    """Return the cores of a `cpu.max`, such as "150000 100000" (us of each so many): 2; None: there is no limit."""
    quota, period = text.split()
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))
