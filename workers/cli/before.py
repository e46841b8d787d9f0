"""`windlass init` and `windlass validate`: a job before it runs. Nothing is started and nothing trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ps.config import load_mapping, nest, parse_override
from ps.errors import ConfigError
from ps.machine import available_cores
from ps.shard.threads import kernel_threads
from ps.storage.files import write_atomic
from ps.storage.layout import checkpoints
from workers.cli import report
from workers.cli.arguments import Job
from workers.config import JobConfig
from workers.launch import job_file, jobs
from workers.launch.estimate import Estimate, RoleMemory, estimate
from workers.launch.folder import RunFolder
from workers.launch.launcher import refuse_run

#: More workers or shards than this are told as a range.
_MAX_LINES = 8


def init(
    path: Annotated[Path, typer.Argument(metavar="[job.yaml]", help="The file to write.")] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
) -> int:
    """Write a job file with every key, its default and what it means."""
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; replace it with --force, or name another file")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, such as {path / 'job.yaml'}")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {parent}; make it first, or name another file")
    write_atomic(path, job_file.commented(JobConfig).encode())
    print(f"{path}: every key at its default; what it will take: windlass validate {path}")
    return 0


def validate(
    job: Job = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with bytes and every number exact.")] = False,
) -> int:
    """Resolve a job, and say what it will take.

    Memory of each role, bytes on each link, checkpoints and arithmetic. Starts nothing, reads no text and needs
    no network; what `train` would refuse is refused.
    """
    file, overrides = jobs.split_arguments(job or ())
    resolved = jobs.resolve(file, overrides)
    refuse_run(RunFolder(resolved.run_dir))

    from workers.data.source import collect

    collect(resolved.data.paths)
    checkpoints(resolved.checkpoint_dir)
    report.print_doubts(resolved)
    expected = estimate(resolved)
    origins = _origins(file, overrides, resolved)
    values = resolved.model_dump(mode="json")
    if as_json:
        found = _as_json(expected) | {"kernel_threads": _kernel_threads(expected, resolved)}
        print(json.dumps({"job": values, "origins": origins, "estimate": found}, indent=2))
        return 0
    for line in job_file.with_origins(values, origins):
        print(line)
    print()
    for name, text in _lines(expected, resolved):
        print(f"{name:<13}{text}")
    return 0


def _origins(file: Path | None, overrides: list[str], resolved: JobConfig) -> dict[str, str]:
    """Where each value that is not the default comes from, by dotted key."""
    given: dict[str, str] = {}
    if file is not None:
        given |= dict.fromkeys(_dotted(load_mapping(file)), str(file))
    given |= dict.fromkeys(_dotted(nest([parse_override(text) for text in overrides])), "command line")
    origins = {}
    for difference in jobs.differences(JobConfig(), resolved):
        computed = "made absolute" if difference.key == "data.cache_dir" else "computed"
        origins[difference.key] = given.get(difference.key, computed)
    return origins


def _dotted(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _as_json(expected: Estimate) -> dict[str, Any]:
    found = asdict(expected)
    roles = (expected.coordinator, *expected.shards, expected.worker)
    for name, role in zip(("coordinator", *["shards"] * len(expected.shards), "worker"), roles, strict=True):
        holder = found[name][expected.shards.index(role)] if name == "shards" else found[name]
        holder["num_bytes"] = role.num_bytes
    if expected.device is not None:
        found["device"]["num_bytes"] = expected.device.num_bytes
    return found | {
        "push_bytes_per_step": expected.push_total,
        "pull_bytes_per_step": expected.pull_total,
        "host_bytes": expected.host_bytes,
    }


def _lines(expected: Estimate, job: JobConfig) -> Iterator[tuple[str, str]]:
    yield (
        "parameters",
        (
            f"{expected.num_parameters:,} in {expected.num_tensors} tensors: {expected.decayed:,} with weight decay, "
            f"{expected.not_decayed:,} without (vocabulary of {job.data.vocab_size:,}, if the text gives so many)"
        ),
    )
    yield "plan", f"{expected.num_chunks} chunks on {len(expected.shards)} shards"
    threads, cores = _kernel_threads(expected, job), available_cores()
    yield (
        "threads",
        f"{threads} for the kernels of each shard"
        + ("" if job.cluster.threads_per_shard else f", where all shards share {cores} cores as on this host"),
    )
    yield (
        "steps",
        "eager: chunks are updated as they are reduced" if job.is_eager else "decided: updated once all is reduced",
    )
    yield "memory", _memory(expected.coordinator)
    for shard in _few(expected.shards):
        yield "", _memory(shard)
    if expected.standbys:
        yield "", f"a standby of each shard (cluster.standbys={expected.standbys}): as much as its shard"
    yield "", _memory(expected.worker, f"worker, each of {job.cluster.workers}")
    if expected.device is not None:
        yield "", _memory(expected.device)
    elif job.worker.device == "auto":
        yield "", "(a worker computes on a CPU in this estimate; for a GPU: worker.device=cuda)"
    yield "", f"all on one host: {_size(expected.host_bytes)}"
    yield "network", f"each step, in all: push {_size(expected.push_total)}, pull {_size(expected.pull_total)}"
    yield from (("", line) for line in _links(expected))
    if expected.standbys:
        yield "", f"to standbys: {_size(sum(expected.reduced_bytes))} each step"
    if any(expected.journal_bytes):
        each, most = sum(expected.reduced_bytes), sum(expected.journal_bytes)
        yield (
            "journals",
            f"{_size(each)} each step, of all shards; {_size(most)} while checkpoints complete (journal.max_bytes)",
        )
    kept = expected.kept_checkpoints
    yield (
        "checkpoint",
        (
            f"{_size(expected.checkpoint_bytes)} on disk; {kept} are kept while the next is written: "
            f"{_size((kept + 1) * expected.checkpoint_bytes)}"
        ),
    )
    yield (
        "work",
        (
            f"{expected.tokens_per_step:,} tokens a step, {expected.flops_per_token / 1e6:,.1f} MFLOP a token, "
            f"{expected.flops_per_token * expected.tokens_per_step / 1e12:,.3g} TFLOP a step"
        ),
    )


def _kernel_threads(expected: Estimate, job: JobConfig) -> int:
    shards = len(expected.shards)
    return kernel_threads(job.cluster.threads_per_shard, available_cores(), shards, -(-expected.num_chunks // shards))


def _few(shards: tuple[RoleMemory, ...]) -> tuple[RoleMemory, ...]:
    if len(shards) <= _MAX_LINES:
        return shards
    sizes = [shard.num_bytes for shard in shards]
    return (shards[sizes.index(min(sizes))], shards[sizes.index(max(sizes))])


def _memory(role: RoleMemory, name: str = "") -> str:
    parts = ", ".join(f"{part.name} {_size(part.num_bytes)}" for part in role.parts)
    snapshot = f"; up to {_size(role.snapshot_bytes)} more while a checkpoint is written" if role.snapshot_bytes else ""
    return f"{name or role.role}: {_size(role.num_bytes)} ({parts}{snapshot})"


def _links(expected: Estimate) -> Iterator[str]:
    """A line for each link; of many, the least and the most."""
    workers, shards = range(len(expected.contributions)), range(len(expected.wire_bytes))
    if len(workers) * len(shards) <= _MAX_LINES:
        for worker in workers:
            for shard in shards:
                push, pull = expected.push_bytes(worker, shard), expected.pull_bytes(shard)
                yield f"worker {worker} - shard {shard}: push {_size(push)}, pull {_size(pull)}"
        return
    least, most = min(expected.wire_bytes), max(expected.wire_bytes)
    few, many = min(expected.contributions), max(expected.contributions)
    yield (
        f"each of {len(workers) * len(shards)} links: push {_size(few * least)} to {_size(many * most)}, "
        f"pull {_size(least)} to {_size(most)}"
    )


def _size(num_bytes: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes / 1e6:,.1f} MB"
