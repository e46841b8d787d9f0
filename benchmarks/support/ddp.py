"""Runs the peer: PyTorch DDP over gloo, one worker on each host."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.support.hosts import INTERFACE, Host
from benchmarks.support.processes import environment, running

DEADLINE_S = 240.0
#: In a network of its own nobody else has taken a port.
_PORT = 29_500


def run_ddp(hosts: Sequence[Host], parameters: int, steps: int, compress: bool) -> list[float]:
    """Run DDP with a worker on each host; returns the seconds of each step that counts.

    Raises:
        SystemExit: a worker failed.
    """
    master = f"{hosts[0].address}:{_PORT if hosts[0].namespace else _free_port()}"
    command = [sys.executable, "-m", "benchmarks.support.ddp_worker", master]
    command += ["--world-size", str(len(hosts)), "--parameters", str(parameters), "--steps", str(steps)]
    command += ["--compress"] if compress else []
    with ExitStack() as stack:
        workers = []
        for rank, host in enumerate(hosts):
            one = host.command([*command, "--rank", str(rank)])
            # Gloo would look the machine's name up, which is not this host's, and say that it has no name.
            there = {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_CPP_LOG_LEVEL": "ERROR"} if host.namespace else {}
            workers.append(stack.enter_context(running(one, environment(**there), stdout=subprocess.PIPE, text=True)))
        outputs = [worker.communicate(timeout=DEADLINE_S)[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise SystemExit(f"DDP failed: exit codes {[worker.returncode for worker in workers]}")
    return [float(value) for value in outputs[0].split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
