"""`windlass audit`: was every contribution of every step counted once, and who came and went?"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from ps.coordinator.audit import Audit, Event, Step, audit
from ps.errors import ConfigError
from ps.storage.journal_files import read
from workers.cli.arguments import Run
from workers.launch.folder import RunFolder

#: So many steps are named; of more, how many there are.
_NAMED = 8


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
    found = audit_of(folder)
    if steps:
        for number, step in sorted(found.steps.items()):
            print(_step_line(number, step))
    print("\n".join(_summary(found)))
    for problem in found.problems:
        print(f"WRONG: {problem}")
    return 1 if found.problems else 0


def audit_of(folder: RunFolder) -> Audit:
    """Audit a run's journal.

    Raises:
        ConfigError: it has none.
        StorageError: it cannot be read.
    """
    if not folder.journal.is_dir():
        raise ConfigError(
            f"{folder.path} has no journal yet: its coordinator writes {folder.journal} when it starts "
            f"(windlass resume {folder.path}); the run folder on the coordinator's host has it"
        )
    return audit(read(folder.journal))


def accounting(found: Audit) -> list[str]:
    """That every contribution was counted once, as far as it is so, and of which steps nobody knows."""
    lines = []
    if not found.problems:
        lines.append(f"every contribution of {_count(found.accounted, 'step')} was counted once by every shard")
    if found.unaccounted:
        named, more = ", ".join(map(str, found.unaccounted[:_NAMED])), len(found.unaccounted) - _NAMED
        shown = f"{named} and {more} more" if more > 0 else named
        lines.append(f"not known who computed step {shown}: the journal does not have it any more")
    return lines


def _summary(found: Audit) -> list[str]:
    skipped = sum(step.decision.skip for step in found.steps.values())
    each = _count(found.contributions, "contribution")
    decided = f"{_count(len(found.steps), 'step')} decided, {skipped} of them skipped"
    lines = [f"run {found.run}: {decided}, with {each} each, by {_count(found.shards, 'shard')}"]
    lines += accounting(found)
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
