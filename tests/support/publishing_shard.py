"""A shard in a process of its own that does a step whenever it is told to, with no coordinator and no gradients.

    python -m tests.support.publishing_shard RUN_DIR

prints its port, and then, for every line that it reads, its resident bytes after one more step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ps.shard.service import ShardHost, ShardServicer
from ps.types import MAX_CHUNK, Role
from ps.wire.options import bind, make_server
from tests.support.plans import table_of
from tests.support.shards import Rig, make_config
from workers.launch.environment import enter

#: 16 MiB of weights on the wire, in FP16.
TABLE = table_of([MAX_CHUNK] * 8)
CONTRIBUTIONS = 1


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def step(rig: Rig) -> None:
    for chunk in rig.chunks:
        rig.engine.push(*rig.push(0, chunk, np.zeros(chunk.size, np.float16)))
    rig.tell(rig.decision(rig.told.next_prepared()))


def main(run_dir: str) -> None:
    enter(Role.SHARD)
    rig = Rig(make_config(Path(run_dir), slots=1), CONTRIBUTIONS, TABLE)
    host = ShardHost(0, 7, lambda _: None)
    host.seat = rig.seat
    server = make_server(16)
    server.add_generic_rpc_handlers((ShardServicer(host).handler(),))
    say(bind(server, "127.0.0.1:0"))
    server.start()
    for _ in sys.stdin:
        step(rig)
        say(resident_bytes())
    host.ending.set()
    server.stop(0).wait(10.0)
    rig.close()


if __name__ == "__main__":
    main(sys.argv[1])
