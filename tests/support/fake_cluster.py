"""A launcher of roles that do nothing, as a process of its own.

python -m tests.support.fake_cluster RUN [prepare=MODE] [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ps.types import Role
from workers.launch import jobs
from workers.launch.folder import RunFolder
from workers.launch.launcher import Launcher
from workers.launch.progress import LineDisplay
from workers.launch.supervisor import COORDINATOR, Member


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a module of tests.support."""
    return [sys.executable, "-m", f"tests.support.{module}", *arguments]


def members(shards: int, workers: int) -> list[str]:
    """The names of a whole cluster."""
    others = [Member(Role.SHARD, index) for index in range(shards)]
    others += [Member(Role.WORKER, rank) for rank in range(workers)]
    return [str(member) for member in (COORDINATOR, *others)]


def launch(run: Path, arguments: Sequence[str]) -> int:
    """Run a launcher of fake roles."""
    prepare = [argument for argument in arguments if argument.startswith("prepare=")]
    overrides = [argument for argument in arguments if argument not in prepare]
    launcher = Launcher(
        jobs.resolve(None, [f"run_dir={run}", *overrides]),
        RunFolder(run),
        lambda member, address: command("fake_role", str(run), str(member), address or "127.0.0.1:0"),
        command("fake_role", "prepare", prepare[0].removeprefix("prepare=")) if prepare else None,
        LineDisplay(sys.stdout, 1),
    )
    end = launcher.run(fresh=True)
    sys.stdout.write(f"end: {end}\n")
    return end.exit_code


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), sys.argv[2:]))
