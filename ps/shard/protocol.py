"""The step protocol of one shard: fences, keys and versions. No sockets, no threads, no kernels.

The caller serializes the calls, carries out the jobs that they return and reports them done. Every
refusal is raised before anything is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ps.errors import (
    ConflictingContribution,
    DecisionRejected,
    FenceNotKnown,
    NotServing,
    StaleFence,
    StepNotOpen,
    UnknownChunk,
    UnknownContribution,
    WrongLossScale,
)
from ps.shard.payloads import check_gradient, check_initial
from ps.shard.records import Reduced
from ps.shard.reduction import ChunkReduction, Held, Progress, ReductionJob
from ps.sharding import Chunk, Plan
from ps.types import ContributionReport, Decision, Fence, Prepared, WireDtype, slot_range
from ps.wire.messages import Fenced, Initialize, Push


@dataclass(frozen=True)
class StepShape:
    """What a run fixes for every step."""

    run: str
    #: G and C.
    slots: int
    contributions: int
    dtype: WireDtype
    strict: bool = False


@dataclass(frozen=True)
class Accepted:
    """A frame's key is held now; `job` is what it made possible."""

    duplicate: bool
    #: All of the shard's chunks of this contribution are held.
    whole: bool
    job: ReductionJob | None = None
    #: The same key came with another payload: the first stands, and this is counted.
    conflicting: bool = False


class StepProtocol:
    """One shard's view of the open step."""

    def __init__(self, plan: Plan, shard: int, shape: StepShape) -> None:
        self.plan = plan
        self.shard = shard
        self.shape = shape
        self.fence = Fence(0, 0)
        self.serving = False
        self.step = 0
        self.applied = 0
        self.loss_scale = 1.0
        self.deciding: Decision | None = None
        self.last_decision: Decision | None = None
        #: What the decision of a step will do, where it is known before it; told anew under each fence.
        self.foregone: Decision | None = None
        #: By what chunks of the open step were updated, or are about to be, without its decision.
        self.updated_by: Decision | None = None
        self._chunks = {chunk.index: chunk for chunk in plan.chunks_of(shard)}
        self._slots = [len(slot_range(c, shape.contributions, shape.slots)) for c in range(shape.contributions)]
        self._reports: dict[int, ContributionReport] = {}
        #: Chunks held, by contribution.
        self._chunks_held: list[int] = []
        self._initial: set[int] | None = None
        #: Chunks of the open step that are not updated, and those that are or are about to be.
        self._unpublished: set[int] = set()
        self._updating: set[int] = set()
        self._progress = Progress()
        self._reductions: dict[int, ChunkReduction] = {}
        self._reset()

    # -- Control: what the coordinator does -----------------------------------------------------

    def adopt(self, fence: Fence) -> None:
        """Learn a fence; an older one is refused."""
        if fence < self.fence:
            raise StaleFence(f"the fence {fence} is older than this shard's {self.fence}")
        if fence > self.fence:
            # Whoever asks now whether chunks are updated may rely on the answer.
            self.foregone = None
        self.fence = fence

    def close(self) -> None:
        """Stop serving and forget the open step, before state is loaded."""
        self.serving = False
        self.deciding = self.last_decision = self.foregone = None
        self._initial = None
        self._reset()

    def await_initial_values(self) -> None:
        """Start empty: every chunk's initial values will come."""
        self._initial = set()
        self.step = self.applied = 0
        self._reset()

    def serve(self, step: int, applied: int, loss_scale: float) -> None:
        """Open for workers. What is held of the same step with the same loss scale stays.

        A shard that is one decision behind keeps its open step: the decision will be told again.
        """
        if (step, applied) != (self.step, self.applied) and step != self.step + 1:
            raise DecisionRejected(
                f"shard {self.shard} holds version {self.step} ({self.applied} applied) and cannot open "
                f"step {step} ({applied} applied)"
            )
        if step > self.step and self.deciding is None and not self.all_reduced:
            raise DecisionRejected(
                f"shard {self.shard} holds version {self.step} of another past: it has {self.chunks_reduced} of "
                f"{len(self._chunks)} chunks of the gradient that step {self.step} was decided from"
            )
        if step == self.step and loss_scale != self.loss_scale:
            self.reopen(loss_scale)
        self.serving = True

    def reopen(self, loss_scale: float) -> None:
        """Begin the open step again, whose gradients carry another loss scale from now on."""
        self.loss_scale = loss_scale
        self._reset()

    # -- Frames: what workers send --------------------------------------------------------------

    def check(self, header: Fenced) -> None:
        """Refuse a frame of another run or fence, or while there is no state to serve."""
        if header.run != self.shape.run:
            raise StaleFence(f"run {header.run!r} is not this shard's run {self.shape.run!r}")
        if header.fence < self.fence:
            raise StaleFence(f"the fence {header.fence} is older than this shard's {self.fence}: register again")
        if header.fence > self.fence:
            raise FenceNotKnown(f"the fence {header.fence} is newer than this shard's {self.fence}: try again")
        if not self.serving:
            raise NotServing(f"shard {self.shard} is loading its state: try again")

    def push(self, header: Push, payload: memoryview, payload_hash: bytes) -> Accepted:
        """Take one chunk of a contribution, or refuse it by name without touching anything.

        Args:
            payload_hash: `hash_payload` of the payload as it arrived.
        """
        self.check(header)
        if self._initial is not None:
            raise NotServing(f"shard {self.shard} is waiting for initial values: try again")
        if header.step != self.step:
            raise StepNotOpen(f"step {header.step} is not open; step {self.step} is")
        if header.loss_scale != self.loss_scale:
            raise WrongLossScale(f"loss scale {header.loss_scale} where step {self.step} has {self.loss_scale}")
        chunk = self.owned(header.chunk)
        self._check_contribution(header)
        check_gradient(header, chunk, self.shape.dtype, payload, payload_hash)
        reduction = self._reductions[chunk.index]
        first = reduction.hashes.get(header.contribution)
        if first is not None:
            return self._again(header, first)
        gradient = np.frombuffer(payload, self.shape.dtype.numpy)
        if not gradient.flags.aligned:
            # Not from our codec, which aligns; a kernel cannot read it where it is.
            gradient = gradient.copy()
        job = reduction.add(Held(header.contribution, header.slots, gradient), header.hash, header.present)
        self._reports.setdefault(
            header.contribution,
            ContributionReport(header.contribution, header.loss_sum, header.tokens, header.rank, header.incarnation),
        )
        self._chunks_held[header.contribution] += 1
        return Accepted(duplicate=False, whole=self._is_whole(header.contribution), job=job)

    def initialize(self, header: Initialize, payload: memoryview, payload_hash: bytes) -> tuple[Chunk, bool]:
        """Take the FP32 initial values of a chunk; returns the chunk and whether it is new."""
        self.check(header)
        chunk = self.owned(header.chunk)
        check_initial(header, chunk, payload, payload_hash)
        if self._initial is None or chunk.index in self._initial:
            return chunk, False
        return chunk, True

    def initialized(self, chunk: Chunk) -> bool:
        """Note that a chunk's initial values are stored; True when they were the last."""
        if self._initial is None:
            return False
        self._initial.add(chunk.index)
        if len(self._initial) < len(self._chunks):
            return False
        self._initial = None
        return True

    @property
    def awaiting_initial_values(self) -> bool:
        return self._initial is not None

    def held(self) -> list[tuple[int, list[int]]]:
        """(contribution, chunks held) of the open step."""
        held: dict[int, list[int]] = {}
        for reduction in self._reductions.values():
            for contribution in reduction.hashes:
                held.setdefault(contribution, []).append(reduction.chunk.index)
        return sorted(held.items())

    def missing(self) -> list[int]:
        """Contributions of the open step of which at least one chunk has not come."""
        return [c for c, count in enumerate(self._chunks_held) if count < len(self._chunks)]

    @property
    def chunks_reduced(self) -> int:
        return self._progress.chunks_reduced

    # -- Reduction ------------------------------------------------------------------------------

    def reduction(self, chunk: int) -> ChunkReduction:
        return self._reductions[chunk]

    def is_current(self, job: ReductionJob, reduction: ChunkReduction) -> bool:
        """Whether a job still belongs to the open step (a rollback forgets it)."""
        return self._reductions.get(job.chunk.index) is reduction

    @property
    def all_reduced(self) -> bool:
        return not self.awaiting_initial_values and self.chunks_reduced == len(self._chunks)

    def prepared(self, square_sums: tuple[float, ...]) -> Prepared:
        """The report that the coordinator decides from."""
        reports = tuple(self._reports[c] for c in range(self.shape.contributions))
        return Prepared(self.fence, self.step, self.shard, square_sums, reports)

    def record(self, chunk: Chunk, square_sums: tuple[float, ...]) -> Reduced:
        """What is written down of a chunk that is reduced."""
        reduction = self._reductions[chunk.index]
        present = reduction.present.to_bytes(chunk.presence_bytes, "little")
        contributions = range(self.shape.contributions)
        return Reduced(
            self.step,
            chunk.index,
            self.loss_scale,
            present,
            square_sums,
            tuple(self._reports[c] for c in contributions),
            tuple(reduction.hashes[c] for c in contributions),
        )

    def restore(self, record: Reduced, *, finite: bool) -> bool:
        """Hold a chunk as it was reduced when that was written down; False: it is not of the step that is open."""
        reduction = self._reductions[self.owned(record.chunk).index]
        if (record.step, record.loss_scale) != (self.step, self.loss_scale) or reduction.reduced:
            return False
        reduction.restore(dict(enumerate(record.hashes)), int.from_bytes(record.present, "little"), finite=finite)
        for report in record.contributions:
            self._reports.setdefault(report.contribution, report)
            self._chunks_held[report.contribution] += 1
        return True

    # -- Decision -------------------------------------------------------------------------------

    def decide(self, decision: Decision) -> list[Chunk]:
        """Hear a decision; returns the chunks to update, in forward order (none for a skip).

        Hearing it again is harmless.
        """
        if decision.fence != self.fence:
            raise StaleFence(f"a decision under {decision.fence}, where this shard is at {self.fence}")
        if decision.step < self.step or self.deciding is not None:
            return []
        if decision.step > self.step or not self.all_reduced:
            raise DecisionRejected(
                f"decision {decision.step} came while step {self.step} has {self.chunks_reduced} of "
                f"{len(self._chunks)} chunks reduced"
            )
        self._check_foregone(decision)
        self.deciding = decision
        if decision.skip or not self._unpublished:
            self._open_next()
            return []
        return [chunk for chunk in self._chunks.values() if chunk.index not in self._updating]

    def foresee(self, decision: Decision) -> list[Chunk]:
        """Hear what the decision of the open step, or of the next one, will do; returns the chunks to update now."""
        if decision.fence != self.fence:
            raise StaleFence(f"what is foregone under {decision.fence}, where this shard is at {self.fence}")
        if decision.step < self.step:
            return []
        if decision.step == self.step:
            self._check_foregone(decision)
        self.foregone = decision
        return [chunk for chunk in self._chunks.values() if self.may_foresee(chunk)]

    def may_foresee(self, chunk: Chunk) -> bool:
        """Whether a chunk can be updated before the decision."""
        reduction = self._reductions[chunk.index]
        known = self.foregone is not None and self.foregone.step == self.step and self.deciding is None
        return known and self.serving and reduction.finite and chunk.index not in self._updating

    def begin_update(self, chunk: Chunk, decision: Decision) -> bool:
        """A chunk is about to be updated; False: not by this decision, or it is already."""
        foreseen = decision is self.foregone and self.may_foresee(chunk)
        if not foreseen and (decision is not self.deciding or chunk.index in self._updating):
            return False
        if foreseen:
            self.updated_by = decision
        self._updating.add(chunk.index)
        return True

    def is_early(self, header: Push) -> bool:
        """Whether a push is of the next step, and only the decision of the open one is missing."""
        return self.is_ahead and not self._unpublished and header.step == self.step + 1 and header.fence == self.fence

    @property
    def is_ahead(self) -> bool:
        """Chunks of the open step are updated, or about to be, without its decision."""
        return self.updated_by is not None and self.deciding is None

    @property
    def is_between(self) -> bool:
        """The state is between two versions: some chunks may be updated and some not."""
        return self.deciding is not None or self.is_ahead

    def present(self, chunk: Chunk) -> np.ndarray:
        """Which runs of a chunk had a gradient in any contribution, as booleans."""
        bits = self._reductions[chunk.index].present.to_bytes(chunk.presence_bytes, "little")
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: len(chunk.runs)].astype(bool)

    def published(self, chunk: Chunk) -> bool:
        """Note that a chunk is updated; True when it was the last and the next step is open."""
        self._unpublished.discard(chunk.index)
        if self._unpublished or self.deciding is None:
            return False
        self._open_next()
        return True

    # -- Inside ---------------------------------------------------------------------------------

    def _open_next(self) -> None:
        decision = self.deciding
        assert decision is not None
        self.step = decision.version
        self.applied = decision.applied
        self.loss_scale = decision.next_loss_scale
        self.last_decision = decision
        self.deciding = None
        self._reset()

    def _reset(self) -> None:
        exact = self.shape.dtype is WireDtype.FP16
        self._reports = {}
        self._chunks_held = [0] * self.shape.contributions
        self._unpublished = set(self._chunks)
        self._updating = set()
        self.updated_by = None
        # Anew, so that a job of the step before that ends late counts for that one.
        progress = self._progress = Progress()
        self._reductions = {
            index: ChunkReduction(chunk, self.shape.contributions, exact, progress)
            for index, chunk in self._chunks.items()
        }

    def _check_foregone(self, decision: Decision) -> None:
        """Refuse what would do something else to the open step's other chunks than was done to some."""
        if self.updated_by is not None and not decision.updates_as(self.updated_by):
            raise DecisionRejected(
                f"decision {decision.step} is another one than was foregone, by which chunks are updated already"
            )

    def went_on(self, decision: Decision) -> None:
        """A decision was carried out, by a standby that does not hold everything."""
        self.deciding = decision
        self._open_next()

    def restored(self, step: int, applied: int, loss_scale: float) -> None:
        """Take over the counters of a checkpoint that has been loaded."""
        self.step, self.applied, self.loss_scale = step, applied, loss_scale
        self._reset()

    def owned(self, index: int) -> Chunk:
        """A chunk of this shard.

        Raises:
            UnknownChunk: it is not one.
        """
        chunk = self._chunks.get(index)
        if chunk is None:
            raise UnknownChunk(f"chunk {index} is not one of shard {self.shard}'s {len(self._chunks)} chunks")
        return chunk

    def _check_contribution(self, header: Push) -> None:
        if not 0 <= header.contribution < self.shape.contributions:
            raise UnknownContribution(f"contribution {header.contribution} is not in 0..{self.shape.contributions - 1}")
        slots = self._slots[header.contribution]
        if header.slots != slots:
            raise UnknownContribution(f"contribution {header.contribution} has {slots} slots, not {header.slots}")

    def _again(self, header: Push, first: bytes) -> Accepted:
        conflicting = first != header.hash
        if conflicting and self.shape.strict:
            raise ConflictingContribution(
                f"step {header.step}, contribution {header.contribution}, chunk {header.chunk} came before with "
                f"another payload; determinism=strict makes that an error"
            )
        return Accepted(duplicate=True, whole=self._is_whole(header.contribution), conflicting=conflicting)

    def _is_whole(self, contribution: int) -> bool:
        return self._chunks_held[contribution] == len(self._chunks)
