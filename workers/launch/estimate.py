"""What a job will take, from its configuration alone: memory, bytes on each link, disk, arithmetic. Pure.

The bytes per parameter are those of docs/architecture.md, "Memory"; what an idle process takes and what
comes on top of plain tensors was measured, and `benchmarks/bench_memory.py` holds the estimates against
running clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.sharding import Plan, make_plan
from ps.storage.gradient_log import usual_limit
from ps.types import WireDtype, slot_range
from workers.config import JobConfig
from workers.models.shapes import flops_per_token, parameter_table, saved_elements

MB = 1_000_000
#: Resident memory of an idle process of each role: Python, numba, gRPC; torch 2.13 for the CPU in a worker.
IDLE_COORDINATOR = 82 * MB
IDLE_SHARD = 200 * MB
IDLE_WORKER = 410 * MB
#: A shard's messages on their way, above what it holds, per parameter.
SHARD_TRANSIT = 0.8
#: Contributions that a shard keeps as received; more are folded into a float64 sum, so many at a time.
KEPT_CONTRIBUTIONS = 4
#: Snapshot copies that wait for the disk, at most (ps.shard.snapshot.MAX_COPY_BYTES).
MAX_COPY_BYTES = 256 << 20
#: What activations take of the heap, for each byte that backward needs: the heap has holes.
HEAP_HOLES = 1.3
#: What a forward and a backward take of a CPU whatever their size.
COMPUTE_WORKSPACE = 35 * MB


@dataclass(frozen=True)
class Part:
    """A share of a process's memory."""

    name: str
    num_bytes: int
    #: It is another process's as well, and counts there where both are on one host.
    borrowed: bool = False


@dataclass(frozen=True)
class RoleMemory:
    """The resident memory of one process while the run trains."""

    role: str
    parts: tuple[Part, ...]
    #: On top, while a checkpoint is being written.
    snapshot_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True)
class Estimate:
    """Everything that `windlass validate` says of a job."""

    num_parameters: int
    num_tensors: int
    decayed: int
    not_decayed: int
    num_chunks: int
    #: By shard, padding included.
    shard_elements: tuple[int, ...]
    coordinator: RoleMemory
    shards: tuple[RoleMemory, ...]
    worker: RoleMemory
    #: None: the worker computes in its host's memory, or nobody knows yet.
    device: RoleMemory | None
    #: By shard: its weights on the wire. A link carries this much down, and up for each contribution;
    #: headers (under 0.2%) left out.
    wire_bytes: tuple[int, ...]
    #: By worker: the contributions that it computes in a step when they are dealt evenly.
    contributions: tuple[int, ...]
    #: Processes of a shard besides the one that serves, each with as much memory.
    standbys: int
    #: What each shard sends to its standby in a step, FP32; and writes into its journal, if it has one.
    reduced_bytes: tuple[int, ...]
    #: By shard: what its journal takes at most, while the checkpoint is written with which it begins anew. 0: none.
    journal_bytes: tuple[int, ...]
    checkpoint_bytes: int
    kept_checkpoints: int
    tokens_per_step: int
    flops_per_token: int

    def push_bytes(self, worker: int, shard: int) -> int:
        """What a worker sends to a shard in a step."""
        return self.contributions[worker] * self.wire_bytes[shard]

    def pull_bytes(self, shard: int) -> int:
        """What each worker receives from a shard in a step."""
        return self.wire_bytes[shard]

    @property
    def push_total(self) -> int:
        """What all links carry up in a step."""
        return sum(self.contributions) * sum(self.wire_bytes)

    @property
    def pull_total(self) -> int:
        """What all links carry down in a step."""
        return len(self.contributions) * sum(self.wire_bytes)

    @property
    def host_bytes(self) -> int:
        """Memory of all processes, if they run on one host."""
        roles = (self.coordinator, *self.shards * (1 + self.standbys), *[self.worker] * len(self.contributions))
        return sum(part.num_bytes for role in roles for part in role.parts if not part.borrowed)


def estimate(job: JobConfig) -> Estimate:
    """Estimate a job whose tokenizer has all of `data.vocab_size` entries.

    Raises:
        ConfigError: the model cannot be laid out on so many shards.
    """
    vocab_size = job.data.vocab_size
    table = parameter_table(job.model, vocab_size, job.optimizer.decay_all)
    plan = make_plan(table, job.cluster.shards)
    sizes = tuple(sum(chunk.size for chunk in plan.chunks_of(shard)) for shard in range(plan.num_shards))
    decayed = sum(tensor.size for tensor in table.tensors if tensor.group == 0)
    arrays = 1 + len(job.optimizer.moment_names)
    batch = job.batch
    return Estimate(
        num_parameters=table.num_parameters,
        num_tensors=len(table.tensors),
        decayed=decayed,
        not_decayed=table.num_parameters - decayed,
        num_chunks=len(plan.chunks),
        shard_elements=sizes,
        coordinator=RoleMemory("coordinator", (Part("process", IDLE_COORDINATOR),)),
        shards=tuple(_shard(job, shard, size) for shard, size in enumerate(sizes)),
        worker=_worker(job, plan),
        device=_device(job, plan),
        wire_bytes=tuple(job.precision.wire.itemsize * size for size in sizes),
        contributions=_dealt(job),
        standbys=job.cluster.standbys,
        reduced_bytes=tuple(4 * size for size in sizes),
        journal_bytes=tuple(_journal(job, size) for size in sizes),
        checkpoint_bytes=4 * arrays * plan.size,
        kept_checkpoints=job.checkpoint.keep,
        tokens_per_step=batch.micro_batches_per_step * batch.micro_batch_size * job.data.sequence_length,
        flops_per_token=flops_per_token(job.model, vocab_size, job.data.sequence_length),
    )


def _shard(job: JobConfig, shard: int, size: int) -> RoleMemory:
    wire = job.precision.wire.itemsize
    moments = len(job.optimizer.moment_names)
    return RoleMemory(
        f"shard {shard}",
        (
            Part("process", IDLE_SHARD),
            Part("weights", 4 * size),
            Part("optimizer state", 4 * moments * size),
            Part("reduced gradient", 4 * size),
            Part("published weights", wire * size),
            *_arriving(job, size),
        ),
        snapshot_bytes=min(MAX_COPY_BYTES, 4 * (1 + moments) * size),
    )


def _journal(job: JobConfig, size: int) -> int:
    """Two files: one is full when a checkpoint is asked for, and the next one grows until that is complete.

    More, without bound, where checkpoints fail: then nothing makes it shorter.
    """
    return 2 * (job.journal.max_bytes or usual_limit(size)) if job.durability == "journal" else 0


def _arriving(job: JobConfig, size: int) -> tuple[Part, ...]:
    """A shard's memory for what workers send: places that it shares with them, or messages."""
    wire = job.precision.wire.itemsize
    if job.launch.transport != "grpc":
        folded = 8 if job.contributions > KEPT_CONTRIBUTIONS else 0
        return (Part("shared with workers", (wire * job.contributions + folded) * size),)
    waiting = Part("contributions that wait for others", _waiting(job.contributions, wire) * size)
    return (waiting, Part("messages", int(SHARD_TRANSIT * size)))


def _waiting(contributions: int, wire: int) -> int:
    """Bytes per parameter of a step's contributions when all but the last have come."""
    if contributions <= KEPT_CONTRIBUTIONS:
        return wire * (contributions - 1)
    return 8 + wire * (KEPT_CONTRIBUTIONS - 1)


def _worker(job: JobConfig, plan: Plan) -> RoleMemory:
    if _on_accelerator(job):
        # Chunks pass through two buffers of the host in each direction.
        staging = 4 * job.precision.wire.itemsize * max(chunk.size for chunk in plan.chunks)
        return RoleMemory("worker", (Part("process", IDLE_WORKER), Part("staging", staging), *_shared(job, plan)))
    weights, gradients = _compute_bytes(job, WireDtype.FP32)
    return RoleMemory(
        "worker",
        (
            Part("process", IDLE_WORKER),
            Part("weights", weights * plan.size),
            Part("gradients", gradients * plan.size),
            *_shared(job, plan),
            Part("activations", COMPUTE_WORKSPACE + int(HEAP_HOLES * _saved(job, weights)) + _transient(job)),
        ),
    )


def _shared(job: JobConfig, plan: Plan) -> tuple[Part, ...]:
    """Resident memory of a worker that is its shards' as well: contributions on their way, published weights."""
    if job.launch.transport == "grpc":
        return ()
    return (Part("shared with shards", job.precision.wire.itemsize * (max(_dealt(job)) + 1) * plan.size, True),)


def _device(job: JobConfig, plan: Plan) -> RoleMemory | None:
    if not _on_accelerator(job):
        return None
    weights, gradients = _compute_bytes(job, job.precision.wire)
    return RoleMemory(
        f"worker, on {job.worker.device}",
        (
            Part("weights", weights * plan.size),
            Part("gradients", gradients * plan.size),
            Part("activations", _saved(job, weights) + _transient(job)),
        ),
    )


def _on_accelerator(job: JobConfig) -> bool:
    """`auto` counts as a CPU: what a worker's host has is not known before it runs."""
    return job.worker.device not in ("auto", "cpu")


def _compute_bytes(job: JobConfig, auto: WireDtype) -> tuple[int, int]:
    """Bytes per parameter of a worker's weights and of its gradients.

    Args:
        auto: what `precision.compute=auto` is where the worker computes.
    """
    compute = auto if job.precision.compute == "auto" else WireDtype(job.precision.compute)
    return compute.itemsize, compute.itemsize if job.precision.accumulate == "fp16" else 4


def _saved(job: JobConfig, itemsize: int) -> int:
    """Bytes that forward keeps for backward; the logits' probabilities are FP32 whatever the rest is."""
    tokens = job.batch.micro_batch_size * job.data.sequence_length
    return itemsize * saved_elements(job.model, tokens) + 4 * tokens * job.data.vocab_size


def _transient(job: JobConfig) -> int:
    """What the last layer takes for a moment: two gradients of the logits, two of the tied embedding."""
    tokens = job.batch.micro_batch_size * job.data.sequence_length
    return 8 * job.data.vocab_size * (tokens + job.model.hidden_size)


def _dealt(job: JobConfig) -> tuple[int, ...]:
    workers = job.cluster.workers
    return tuple(len(slot_range(worker, workers, job.contributions)) for worker in range(workers))
