"""What raw TCP gets through a link: the line rate that everything else is measured against."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from benchmarks.support.hosts import Host
from benchmarks.support.processes import environment, running

DEADLINE_S = 60.0
_PIECE = 1 << 20


def line_rate(sender: Host, receiver: Host, num_bytes: int) -> float:
    """Send `num_bytes` over one connection; returns bytes of payload per second, slow start not counted."""
    command = [sys.executable, "-m", "benchmarks.support.line"]
    receive = receiver.command([*command, "receive", receiver.address, str(num_bytes)])
    with running(receive, environment(), stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        port = receiving.stdout.readline().strip()
        send = sender.command([*command, "send", f"{receiver.address}:{port}", str(num_bytes)])
        with running(send, environment()) as sending:
            sending.wait(DEADLINE_S)
            return float(receiving.communicate(timeout=DEADLINE_S)[0])


def _receive(address: str, num_bytes: int) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    room = bytearray(_PIECE)
    received, since, before = 0, 0.0, 0
    while count := connection.recv_into(room):
        received += count
        if not since and received > num_bytes // 5:
            since, before = time.perf_counter(), received
    print((received - before) / (time.perf_counter() - since))


def _send(address: str, num_bytes: int) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        for _ in range(-(-num_bytes // _PIECE)):
            connection.sendall(bytes(_PIECE))


if __name__ == "__main__":
    {"receive": _receive, "send": _send}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
