"""`windlass chaos RUN`: faults for a run that is under way, and whether it came through them unchanged."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ps.config import validate
from ps.errors import AccessDenied, ConfigError, HandshakeFailed, PsError
from ps.storage.digest import digest as digest_of
from ps.storage.layout import is_complete, newest, version_of
from ps.storage.manifest import read_manifest
from ps.wire.security import CLIENT, load_security
from workers.cli import report
from workers.cli.audit import accounting, audit_of
from workers.cli.status import Place, ask
from workers.config import JobConfig
from workers.launch import faults, jobs
from workers.launch.chaos import HANGS_S, Struck, await_end, most_deaths, strike_all
from workers.launch.faults import Kind, Pause, Plan
from workers.launch.folder import RunFolder, find_checkpoint
from workers.launch.signals import AskedToStop, Signals
from workers.launch.supervisor import LIMIT_WINDOW_S

#: Keys of which each value makes another result, whatever else is so.
_CERTAIN = ("seed", "model.")


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
    fewer faults than were asked for, the run did not reach its end, or its result is another one. 2: there is nobody
    to strike, or nothing to compare with.
    """
    folder = RunFolder(run)
    job = folder.read_job().model_copy(update={"run_dir": run})
    _refuse_idle(folder)
    if same_as is not None:
        _refuse_other_job(job, same_as)
    if longest_stop is None:
        longest_stop = 1.5 * job.membership.lease_s
    wanted = _kinds(kinds)
    _warn_of_limit(job, faults.plans(seed, wanted, every, longest_stop), count)
    struck: Counter[str] = Counter()
    with Signals() as signals:
        try:
            _strike(folder, faults.plans(seed, wanted, every, longest_stop), count, struck, signals.pause)
        except AskedToStop as asked:
            # After a hangup there is no terminal to say it on.
            with suppress(OSError):
                print(f"{asked}: ended after {struck.total()} of {count} faults; nobody is left stopped", flush=True)
            return 128 + asked.signum
    wrong = _judge(folder, same_as)
    if struck.total() < count:
        wrong.append(f"the run was over after {struck.total()} of {count} faults")
    for what in wrong:
        print(f"WRONG: {what}")
    return 1 if wrong else 0


def _strike(folder: RunFolder, drawn: Iterator[Plan], count: int, struck: Counter[str], pause: Pause) -> None:
    """Carry out the faults, say so of each and count it, and wait for the end of the run."""
    began = time.monotonic()

    def say(fault: Struck) -> None:
        plan = fault.plan
        stop = f" for {plan.stop_s:.1f} s" if plan.kind is Kind.STOP else ""
        number = struck.total() + 1
        print(f"{fault.at - began:8.1f} s  {number:4}  {plan.kind:<4} {fault.process}{stop}", flush=True)

    for fault in strike_all(folder, drawn, count, pause, before_stop=say):
        if fault.plan.kind is not Kind.STOP:
            say(fault)
        struck[f"{fault.plan.kind} {fault.process.role}"] += 1
    print(", ".join(f"{kind}: {times}" for kind, times in sorted(struck.items())) or "no fault", flush=True)
    if folder.is_held():
        end = folder.read_job().training.end
        print(f"waiting for the end, step {end}; {HANGS_S:.0f} s without a new one: it hangs", flush=True)
        await_end(folder, pause=pause)


def _refuse_idle(folder: RunFolder) -> None:
    """See that there is somebody to strike, or will be.

    Raises:
        ConfigError: `windlass train` runs nothing there; says what is known of the run instead.
    """
    if folder.is_held():
        return
    place = Place(None, folder)
    by_hand = f"the coordinator of {folder.path} answers, but was started by hand, or on another host"
    try:
        given = place.certificates or os.environ.get("WINDLASS_CERTIFICATES")
        ask(place, load_security(Path(given) if given else None, insecure=False, role=CLIENT))
        why = by_hand
    except (HandshakeFailed, AccessDenied):
        why = by_hand
    except PsError as error:
        why = error.message
    raise ConfigError(f"nothing that `windlass train` has started runs here: {why}")


def _refuse_other_job(job: JobConfig, other: Path) -> None:
    """See that a run may end as another one does, before anybody is struck; warn where that is not likely.

    Raises:
        ConfigError: it certainly cannot.
    """
    own = f"--same-as {other} is the run that is struck; name one of the same job that nothing happens to"
    if is_complete(other):
        if other.resolve().parent == job.checkpoint_dir.resolve():
            raise ConfigError(own)
        manifest, _ = read_manifest(other)
        try:
            theirs = validate(JobConfig, manifest.job)
        except ConfigError:
            # Another version's keys say nothing of the result.
            return
    else:
        theirs = RunFolder(other).read_job().model_copy(update={"run_dir": other})
        if other.resolve() == job.run_dir.resolve():
            raise ConfigError(own)
    doubts = []
    for found in jobs.differences(theirs, job):
        if found.key.startswith(jobs.MAY_CHANGE) or _only_written_differently(found.key, theirs, job):
            continue
        what = f"--same-as {other}: {found.key} is {found.old} there, and {found.new} in {job.run_dir}"
        if found.key.startswith(_CERTAIN):
            raise ConfigError(f"{what}: the results cannot be equal")
        doubts.append(f"{what}: the results may differ for that")
    if not is_complete(other) and newest(theirs.checkpoint_dir) is None:
        doubts.append(f"--same-as {other} has no checkpoint yet; it needs one when {job.run_dir} has ended")
    for doubt in doubts:
        _warn(doubt)


def _only_written_differently(key: str, theirs: JobConfig, job: JobConfig) -> bool:
    return key == "model.intermediate_size" and theirs.model.feed_forward_size == job.model.feed_forward_size


def _warn_of_limit(job: JobConfig, drawn: Iterator[Plan], count: int) -> None:
    process, times = most_deaths(drawn, count, job)
    limit = job.launch.restart_limit
    if times > limit:
        _warn(
            f"{process.role} {process.rank} may be killed {times} times within {LIMIT_WINDOW_S:.0f} s, and more than "
            f"launch.restart_limit={limit} ends the run: start it with launch.restart_limit=1000, or strike less often "
            "(--every)"
        )


def _warn(what: str) -> None:
    print(f"windlass: warning: {what}", file=sys.stderr)


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
        try:
            expected = digest_of(find_checkpoint(same_as))
        except PsError as error:
            return [*wrong, f"there is nothing to compare with: {error.message}"]
        if digest == expected:
            print("the same as without faults")
        else:
            wrong.append(f"without faults the digest is {expected}")
    return wrong
