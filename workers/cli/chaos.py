"""`windlass chaos RUN`: faults for a run that is under way, and whether it came through them unchanged."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import ConfigError
from ps.storage.digest import digest as digest_of
from ps.storage.layout import version_of
from workers.cli import report
from workers.cli.audit import accounting, audit_of
from workers.launch import faults
from workers.launch.chaos import HANGS_S, await_end, strike_all
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

    Give the run room for it: launch.restart_limit=1000, or a role that dies often ends it. Exit code 1: there were
    fewer faults than were asked for, the run did not reach its end, or its result is another one.
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
    print(", ".join(f"{kind}: {times}" for kind, times in sorted(struck.items())) or "no fault", flush=True)
    if folder.is_held():
        print(f"waiting for the end, step {job.training.end}; {HANGS_S:.0f} s without a new one: it hangs", flush=True)
        await_end(folder)
    wrong = _judge(folder, same_as)
    if struck.total() < count:
        wrong.append(f"the run was over after {struck.total()} of {count} faults")
    for what in wrong:
        print(f"WRONG: {what}")
    return 1 if wrong else 0


def _kinds(text: str) -> Sequence[Kind]:
    try:
        return [Kind(kind.strip()) for kind in text.split(",")]
    except ValueError:
        raise ConfigError(f"--kinds {text}: there are {', '.join(Kind)}") from None


def _judge(folder: RunFolder, same_as: Path | None) -> list[str]:
    """What is wrong with how a run has ended; says what it finds."""
    found = audit_of(folder)
    print("\n".join(accounting(found)))
    wrong = list(found.problems)
    checkpoint = find_checkpoint(folder.path)
    digest = digest_of(checkpoint)
    print(f"digest {digest} of {checkpoint.name}")
    job = folder.read_job().model_copy(update={"run_dir": folder.path})
    saved = version_of(checkpoint)
    if report.completion(folder, job) is None and saved != job.training.end:
        wrong.append(f"the run ended at step {saved} of {job.training.end}: the logs in {folder.logs} say why")
    if same_as is not None:
        expected = digest_of(find_checkpoint(same_as))
        if digest == expected:
            print("the same as without faults")
        else:
            wrong.append(f"without faults the digest is {expected}")
    return wrong
