"""`windlass chaos RUN`: faults for a run that is under way, and whether it came through them unchanged."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ps.coordinator.audit import audit
from ps.errors import ConfigError
from ps.storage.digest import digest as digest_of
from ps.storage.journal import read
from workers.launch import faults
from workers.launch.chaos import LOOK_S, strike_all
from workers.launch.faults import Kind
from workers.launch.folder import RunFolder, find_checkpoint


def chaos(
    run: Annotated[Path, typer.Argument(help="The folder of a run that is under way on this host.")],
    seed: Annotated[int, typer.Option(help="The same seed draws the same faults.")] = 0,
    count: Annotated[int, typer.Option("--faults", min=1, help="How many.")] = 50,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two faults, on average.")] = 5.0,
    kinds: Annotated[str, typer.Option(help="What is done, separated by commas.")] = "kill,stop,cut",
    longest_stop: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds that a process is stopped, at most. Default: 1.5 leases.")
    ] = None,
    same_as: Annotated[
        Path | None, typer.Option(help="A run of the same job that nothing happened to: the digests must be equal.")
    ] = None,
) -> int:
    """Kill, stop and cut off processes of a running job, of every role; then wait for its end, and judge it.

    Give the run room for it: launch.restart_limit=1000, or a role that dies often ends it.
    """
    folder = RunFolder(run)
    job = folder.read_job()
    if longest_stop is None:
        longest_stop = 1.5 * job.membership.lease_s
    drawn = faults.plans(seed, _kinds(kinds), every, longest_stop)
    began = time.monotonic()
    struck: Counter[str] = Counter()
    for done, fault in enumerate(strike_all(folder, drawn, count), 1):
        plan, process = fault.plan, fault.process
        struck[f"{plan.kind} {process.role}"] += 1
        stop = f" for {plan.stop_s:.1f} s" if plan.kind is Kind.STOP else ""
        print(f"{fault.at - began:8.1f} s  {done:4}  {plan.kind:<4} {process}{stop}", flush=True)
    if struck.total() < count:
        print(f"the run is over after {struck.total()} of {count} faults", flush=True)
    print(", ".join(f"{kind}: {times}" for kind, times in sorted(struck.items())), flush=True)
    _await_end(folder)
    return _verdict(run, same_as)


def _kinds(text: str) -> Sequence[Kind]:
    try:
        return [Kind(kind.strip()) for kind in text.split(",")]
    except ValueError:
        raise ConfigError(f"--kinds {text}: there are {', '.join(Kind)}") from None


def _await_end(folder: RunFolder) -> None:
    while folder.is_held():
        time.sleep(LOOK_S)


def _verdict(run: Path, same_as: Path | None) -> int:
    """Say whether every contribution was counted once, and whether the digest is that of a run without faults."""
    found = audit(read(RunFolder(run).journal))
    for problem in found.problems:
        print(f"WRONG: {problem}")
    if not found.problems:
        print(f"every contribution of {len(found.steps)} steps was counted once by every shard")
    checkpoint = find_checkpoint(run)
    digest = digest_of(checkpoint)
    print(f"digest {digest} of {checkpoint.name}")
    if same_as is None:
        return 1 if found.problems else 0
    expected = digest_of(find_checkpoint(same_as))
    same = digest == expected
    print("the same as without faults" if same else f"NOT the same: without faults it is {expected}")
    return 0 if same and not found.problems else 1
