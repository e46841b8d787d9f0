"""What a worker does not read costs the shard no memory, however much is published meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ps.client.grpc_transport import GrpcTransport
from ps.sharding import make_plan
from ps.wire.messages import Hello, Pull
from tests.support.publishing_shard import TABLE
from tests.support.shards import FENCE, RUN, encode_frame

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

TIMEOUT_S = 30.0
#: Until the heap holds what the steps need.
WARM_UP = 4
#: Each publishes 16 MiB.
STEPS = 20
#: What may be under way to a worker: gRPC's window, the sockets' buffers, and the frame that is being sent.
MOST_BYTES = 32 << 20


@dataclass
class PublishingShard:
    process: subprocess.Popen[str]
    port: int

    def step(self) -> int:
        """One more version; returns the process's resident bytes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def publishing_shard(run_dir: Path) -> Iterator[PublishingShard]:
    command = [sys.executable, "-m", "tests.support.publishing_shard", str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield PublishingShard(process, int(process.stdout.readline()))
            process.stdin.close()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def test_a_worker_that_stops_reading_costs_a_shard_a_bounded_amount(tmp_path: Path) -> None:
    """It goes on asking: every version is pulled, and none is read."""
    who = {"run": RUN, "term": FENCE.term, "epoch": FENCE.epoch, "rank": 0, "incarnation": 77}
    got, goes_on, closed = threading.Event(), threading.Event(), threading.Event()

    def on_frame(_data: bytes) -> None:
        got.set()
        goes_on.wait()

    with publishing_shard(tmp_path) as shard:
        connection = GrpcTransport().connect(f"127.0.0.1:{shard.port}", on_frame, lambda _reason: closed.set())
        assert connection.send(encode_frame(Hello(**who, plan=make_plan(TABLE, 1).digest)), TIMEOUT_S)
        assert got.wait(TIMEOUT_S)
        resident = []
        for version in range(WARM_UP + STEPS):
            assert connection.send(encode_frame(Pull(**who, version=version, applied=-1)), TIMEOUT_S)
            resident.append(shard.step())
        assert max(resident[WARM_UP:]) - resident[WARM_UP - 1] <= MOST_BYTES
        assert not closed.is_set()
        goes_on.set()
        connection.close()
        assert closed.wait(TIMEOUT_S)
