"""`windlass audit`: was every contribution of every step counted once, and who came and went?"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from ps.coordinator.audit import Audit, Event, Step, audit
from ps.storage.journal import read
from workers.cli.arguments import Run
from workers.launch.folder import RunFolder


def audit_run(
    run: Run,
    steps: Annotated[
        bool, typer.Option("--steps", help="List each step: its fence, who computed it, and each shard's state hash.")
    ] = False,
) -> int:
    """Check from the journal that every contribution of every step was counted once.

    Prints who computed how much, and who came and went. The run may be under way. Exit code 1: something is wrong,
    and named.
    """
    folder = RunFolder(run)
    folder.read_job()
    found = audit(read(folder.journal))
    if steps:
        for number, step in sorted(found.steps.items()):
            print(_step_line(number, step))
    print("\n".join(_summary(found)))
    for problem in found.problems:
        print(f"WRONG: {problem}")
    return 1 if found.problems else 0


def _summary(found: Audit) -> list[str]:
    skipped = sum(step.decision.skip for step in found.steps.values())
    each = _count(found.contributions, "contribution")
    decided = f"{_count(len(found.steps), 'step')} decided, {skipped} of them skipped"
    lines = [f"run {found.run}: {decided}, with {each} each, by {_count(found.shards, 'shard')}"]
    if not found.problems:
        accounted = len(found.steps) - len(set(found.unaccounted) & set(found.steps))
        lines.append(f"every contribution of {_count(accounted, 'step')} was counted once by every shard")
    if found.unaccounted:
        named = ", ".join(map(str, found.unaccounted[:8]))
        lines.append(f"not known who computed step {named}: the journal had lost it, and a shard gave it back")
    if found.repeated:
        lines.append(f"{_count(found.repeated, 'step')} decided again after a rollback")
    lines += [
        f"worker {rank} computed {_count(number, 'contribution')}" for rank, number in sorted(found.by_worker().items())
    ]
    return [*lines, "membership:", *map(_event_line, found.events)]


def _event_line(event: Event) -> str:
    at = datetime.fromtimestamp(event.at).astimezone().strftime("%Y-%m-%d %H:%M:%S") if event.at is not None else "-"
    return f"  step {event.step:>6}  {at:<19}  {event.what}"


def _step_line(number: int, step: Step) -> str:
    by = " ".join(f"{c}:{'+'.join(map(str, ranks))}" for c, ranks in step.computed_by().items()) or "not known"
    hashes = " ".join("-" if found is None else f"{found:016x}" for found in step.hashes) or "-"
    outcome = "skipped" if step.decision.skip else "committed"
    return f"step {number:>6}  {step.decision.fence}  {outcome}  workers {by}  states {hashes}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
