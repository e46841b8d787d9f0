"""Processes of a benchmark: their environment, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
#: After SIGTERM a process may take so long before it is killed.
GRACE_S = 10.0


def environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread per library, and `more`."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**os.environ, **one, "PYTHONPATH": str(ROOT), **more}


def unwind_when_asked_to_go() -> None:
    """Leave by way of every `with` block on SIGTERM as well: what was stopped with SIGSTOP would stay."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to go"))


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive the block: asked to go, then killed."""
    process = subprocess.Popen(command, env=env, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
