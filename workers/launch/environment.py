"""What a role runs in: how memory is taken and copied, how many threads libraries start, who preempts whom."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress

from ps.types import Role

#: Received messages are big and short-lived; with glibc's defaults each one faults its pages in again. Copies of at
#: least 1.5 MiB (a chunk) go past the caches: by default only what is larger than most of the last one does, and for
#: less every cache line is fetched before it is written over.
MALLOC_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4294967296:glibc.malloc.mmap_threshold=33554432:"
    "glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1:glibc.cpu.x86_non_temporal_threshold=1572864"
)
#: Roles that move tensors: a thread of theirs that wakes up waits for its turn.
_BATCH = (Role.SHARD, Role.WORKER)
#: The server's own threads do its work; a library's pool would only compete with them.
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
#: Flags of one role, which must not reach the roles of a launcher through its environment.
ROLE_FLAGS = (
    "WINDLASS_COORDINATOR",
    "WINDLASS_LISTEN",
    "WINDLASS_METRICS_LISTEN",
    "WINDLASS_ADVERTISE",
    "WINDLASS_LINGER",
    "WINDLASS_GPU_LOCKS",
    "WINDLASS_JOB",
    "WINDLASS_OVERRIDES",
    "WINDLASS_INDEX",
    "WINDLASS_RANK",
    "WINDLASS_RESUME",
)
_REEXECUTED = "WINDLASS_REEXECUTED"


def role_environment(base: Mapping[str, str], role: Role, glibc: bool) -> dict[str, str]:
    """Complete an environment for a role; what the user has set stays.

    Args:
        base: the environment so far.
        role: which role it is for.
        glibc: whether the process runs on glibc.
    """
    environment = dict(base)
    if glibc:
        environment.setdefault("GLIBC_TUNABLES", MALLOC_TUNABLES)
    if role is not Role.WORKER:
        for name in ONE_THREAD:
            environment.setdefault(name, "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    # What goes wrong comes as an exception and is said in one line; grpc's own lines would stand beside it.
    environment.setdefault("GRPC_VERBOSITY", "NONE")
    return environment


def on_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def enter(role: Role) -> None:
    """Give this process a role's environment; malloc reads its part at exec, so that needs another exec.

    The process keeps its pid, its arguments and its descriptors, and does this once at most.
    """
    if role in _BATCH:
        _schedule_as_batch()
    reexecuted = os.environ.pop(_REEXECUTED, None) is not None
    environment = role_environment(os.environ, role, on_glibc())
    if reexecuted or environment.get("GLIBC_TUNABLES") == os.environ.get("GLIBC_TUNABLES"):
        os.environ.update(environment)
        return
    environment[_REEXECUTED] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _schedule_as_batch() -> None:
    """Let threads that wake up wait for their turn, where the system knows the policy and the user has set none.

    A message wakes several threads of its receiver one after the other. When each of them preempts a thread that
    works, both cores change threads twice as often as the work needs. Inherited by threads, and through exec.
    """
    with suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
