"""Bytes between two processes of one host: push, pull, and both at once, against memcpy and raw TCP.

The gRPC frames take the real way: `GrpcTransport` in the worker, a server with a shard's options and stream threads
in the peer, frames that were made before, received ones used through a view. Shared memory: a `Segment` each way;
every chunk is written by one side, announced by a frame on the gRPC stream, and copied out by the other. Raw TCP:
sendall and recv_into of 1 MiB. Both processes run as `windlass worker` and `windlass shard` do (malloc, scheduling).

GB is 1e9 bytes, and both directions at once count both; CPU is user and system time of both processes. The
variants alternate within a round, and the bounds are held against the median of the rounds' ratios.

    python benchmarks/bench_transport.py [--rounds 9] [--mib 256] [--chunk-mib 2] [--short] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.support.report import Check, Report
from benchmarks.support.transport_peer import (
    BYTES,
    PULL,
    PUSH,
    chunks,
    header,
    new_segment,
    notices,
    payload,
    prepared,
    receive_all,
    send_all,
)
from ps.client.grpc_transport import GrpcTransport
from ps.types import Role
from ps.wire import frame
from ps.wire.security import PLAIN, Security, load_security
from ps.wire.shared_memory import Segment
from workers.cli import certs
from workers.launch.environment import enter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIONS = {"push": PUSH, "pull": PULL, "push_pull": PUSH | PULL}
TIMEOUT_S = 60.0
#: Frames without payload, for what one message costs.
SMALL = 2000
GRPC_OF_TCP, GRPC_CPU, SHM_OF_MEMCPY = 0.50, 1.2, 0.45


class Link(Protocol):
    def run(self, directions: int) -> None:
        """Move the payload to the peer, from it, or both at once; returns when all of it is there."""


def cpu_seconds(*pids: int) -> float:
    """User and system time of processes, to the nanosecond: their CPU clocks (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


@contextmanager
def peer(*arguments: str) -> Iterator[tuple[int, int]]:
    """A peer process: its pid and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.support.transport_peer", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Memcpy:
    """One thread copies the payload once; for both directions two threads do, each its own."""

    def __init__(self, source: np.ndarray) -> None:
        self._source = source
        self._rooms = [np.zeros_like(source) for _ in range(2)]

    def run(self, directions: int) -> None:
        second = threading.Thread(target=np.copyto, args=(self._rooms[1], self._source))
        if directions == PUSH | PULL:
            second.start()
        np.copyto(self._rooms[0], self._source)
        if directions == PUSH | PULL:
            second.join()


class Tcp:
    def __init__(self, port: int, source: np.ndarray) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._source = source

    def run(self, directions: int) -> None:
        self._connection.sendall(bytes([directions]))
        sender = threading.Thread(target=send_all, args=(self._connection, self._source))
        if directions & PUSH:
            sender.start()
        if directions & PULL:
            receive_all(self._connection, len(self._source))
        if directions & PUSH:
            sender.join()
        receive_all(self._connection, 1)

    def close(self) -> None:
        self._connection.close()


class Grpc:
    """A worker's end of a stream: frames, or with `share` their places in shared memory."""

    def __init__(self, port: int, source: np.ndarray, chunk: int, security: Security = PLAIN) -> None:
        self._source = source
        self._places = chunks(len(source), chunk)
        self._frames = prepared("push", source, self._places)
        self._pushed: tuple[Segment, np.ndarray] | None = None
        self._published = self._room = np.zeros(0, BYTES)
        self._closing = False
        self._came = {kind: threading.Event() for kind in ("held", "weights", "shared")}
        self._connection = GrpcTransport(security).connect(f"127.0.0.1:{port}", self._on_frame, self._on_close)

    def share(self) -> None:
        self._frames = []
        self._room = np.zeros_like(self._source)
        self._pushed = new_segment(len(self._source))
        self._send({"kind": "share", "name": self._pushed[0].name})
        self._wait("shared")

    def run(self, directions: int) -> None:
        if directions & PULL:
            self._send({"kind": "pull"})
        if directions & PUSH:
            shared = self._pushed and notices("push", self._source, self._pushed[1], self._places)
            for data in shared or self._frames:
                self._send_frame(data)
            self._wait("held")
        if directions & PULL:
            self._wait("weights")

    def notify(self, count: int) -> None:
        """Send frames without payload; the last one is answered."""
        for index in range(count):
            self._send(header("push", last=index == count - 1))
        self._wait("held")

    def close(self) -> None:
        self._closing = True
        self._connection.close()

    def _send(self, fields: dict[str, Any]) -> None:
        self._send_frame(frame.encode(fields))

    def _send_frame(self, data: bytes) -> None:
        if not self._connection.send(data, TIMEOUT_S):
            raise SystemExit("the peer takes no frame")

    def _wait(self, kind: str) -> None:
        if not self._came[kind].wait(TIMEOUT_S):
            raise SystemExit(f"no answer of kind {kind!r} in {TIMEOUT_S:.0f} s")
        self._came[kind].clear()

    def _on_frame(self, data: bytes) -> None:
        fields, view = frame.decode(data)
        kind = fields["kind"]
        if kind == "shared":
            total = len(self._source)
            self._published = Segment.attach(fields["name"], total).array(BYTES, 0, total)
        elif kind == "weights" and fields["place"] >= 0:
            place = self._places[fields["chunk"]]
            np.copyto(self._room[place], self._published[place])
        elif kind == "weights":
            np.frombuffer(view, np.uint16)
        if kind != "weights" or fields["last"]:
            self._came[kind].set()

    def _on_close(self, reason: str) -> None:
        if not self._closing:
            print(f"the stream has ended: {reason}", file=sys.stderr)


@dataclass
class Measured:
    """What a variant took in one direction, round by round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


Found = dict[tuple[str, str], Measured]


def measure(links: dict[str, tuple[Link, list[int]]], rounds: int) -> Found:
    """Let all variants alternate; the first round only warms up.

    Args:
        links: by name; with the processes whose CPU time counts.
        rounds: that count.
    """
    found = {(name, direction): Measured() for name in links for direction in DIRECTIONS}
    for number in range(rounds + 1):
        for direction, bits in DIRECTIONS.items():
            for name, (link, pids) in links.items():
                cpu, started = cpu_seconds(*pids), time.perf_counter()
                link.run(bits)
                seconds, cpu = time.perf_counter() - started, cpu_seconds(*pids) - cpu
                if number:
                    found[name, direction].seconds.append(seconds)
                    found[name, direction].cpu_seconds.append(cpu)
    return found


def cost_of_a_message(link: Grpc, pids: list[int], rounds: int) -> tuple[float, float]:
    """Microseconds, and CPU-microseconds, that a frame without payload takes in a stream of them."""
    took = []
    for _ in range(rounds):
        cpu, started = cpu_seconds(*pids), time.perf_counter()
        link.notify(SMALL)
        took.append((time.perf_counter() - started, cpu_seconds(*pids) - cpu))
    wall, cpus = zip(*took, strict=True)
    return statistics.median(wall) / SMALL * 1e6, statistics.median(cpus) / SMALL * 1e6


def write_report(found: Found, total: int, message: tuple[float, float], path: Path) -> None:
    report = Report("transport", ["transport", "direction", "median GB/s", "min", "max", "CPU-s per GB"])
    size = {direction: (2 if direction == "push_pull" else 1) * total / 1e9 for direction in DIRECTIONS}
    cpu = {key: statistics.median(measured.cpu_seconds) / size[key[1]] for key, measured in found.items()}
    for (name, direction), measured in found.items():
        speeds = [size[direction] / seconds for seconds in measured.seconds]
        report.row(name, direction, statistics.median(speeds), min(speeds), max(speeds), cpu[name, direction])

    def speed_of(name: str, other: str, direction: str) -> float:
        """Both directions at once, over the other's speed in a direction."""
        pairs = zip(found[name, "push_pull"].seconds, found[other, direction].seconds, strict=True)
        return size["push_pull"] / size[direction] * statistics.median(theirs / ours for ours, theirs in pairs)

    ratio = speed_of("gRPC frames", "raw TCP", "push_pull")
    report.check(Check("gRPC frames / raw TCP, push_pull", ratio, GRPC_OF_TCP, ratio >= GRPC_OF_TCP))
    spent = cpu["gRPC frames", "push_pull"]
    report.check(Check("gRPC frames, push_pull: CPU-s per GB", spent, GRPC_CPU, spent <= GRPC_CPU))
    ratio = speed_of("shared memory", "memcpy", "push")
    report.check(Check("shared memory, push_pull / memcpy", ratio, SHM_OF_MEMCPY, ratio >= SHM_OF_MEMCPY))
    report.note("a frame without payload, one after the other: us", message[0])
    report.note("a frame without payload, one after the other: CPU-us of both processes", message[1])
    report.finish(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="MiB in each direction")
    parser.add_argument("--chunk-mib", type=float, default=2.0, help="MiB of a frame's payload")
    parser.add_argument("--short", action="store_true", help="64 MiB, 5 rounds")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/transport.json"))
    arguments = parser.parse_args()
    enter(Role.WORKER)
    total, rounds = (64 << 20, 5) if arguments.short else (arguments.mib << 20, arguments.rounds)
    chunk = int(arguments.chunk_mib * (1 << 20))
    source = payload(total)
    with ExitStack() as stack:
        certificates = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "certs"
        with redirect_stdout(io.StringIO()):
            certs.init(certificates)

        def start(mode: str, *more: str) -> tuple[list[int], int]:
            pid, port = stack.enter_context(peer(mode, str(total), str(chunk), *more))
            return [os.getpid(), pid], port

        tcp_pids, port = start("tcp")
        tcp = Tcp(port, source)
        grpc_pids, port = start("grpc")
        plain = Grpc(port, source, chunk)
        tls_pids, port = start("grpc", str(certificates / Role.SHARD))
        tls = Grpc(port, source, chunk, load_security(certificates / Role.WORKER, False, Role.WORKER))
        shared_pids, port = start("grpc")
        shared = Grpc(port, source, chunk)
        for link in (tcp, plain, tls, shared):
            stack.callback(link.close)
        shared.share()
        links: dict[str, tuple[Link, list[int]]] = {
            "memcpy": (Memcpy(source), [os.getpid()]),
            "raw TCP": (tcp, tcp_pids),
            "gRPC frames": (plain, grpc_pids),
            "gRPC frames, mutual TLS": (tls, tls_pids),
            "shared memory": (shared, shared_pids),
        }
        found = measure(links, rounds)
        message = cost_of_a_message(shared, shared_pids, rounds)
    write_report(found, total, message, arguments.json)


if __name__ == "__main__":
    main()
