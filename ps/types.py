"""The values that the roles exchange: frozen, free of sockets, named as in docs/architecture.md."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum

import msgpack
import numpy as np

from ps.errors import MismatchError

#: A tensor starts at a multiple of this many elements; kernels never see an unaligned border.
ALIGNMENT = 64
#: The flat space is cut at multiples of this; one gradient statistic per segment.
SEGMENT = 65_536
#: The largest chunk, in elements (2 MiB in FP16).
MAX_CHUNK = 1 << 20
#: FP16 sums in float64 are exact up to this many micro-batches in a step.
MAX_SLOTS = 8192


class Role(StrEnum):
    COORDINATOR = "coordinator"
    SHARD = "shard"
    #: A shard's process that holds the same state and takes over when the shard dies.
    STANDBY = "standby"
    WORKER = "worker"


class WireDtype(StrEnum):
    """What gradients and published weights are on the wire."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        return 4 if self is WireDtype.FP32 else 2

    @property
    def numpy(self) -> np.dtype:
        """The dtype of a payload's elements; half formats travel as their bits."""
        return np.dtype("<f4") if self is WireDtype.FP32 else np.dtype("<u2")


@dataclass(frozen=True, order=True)
class Fence:
    """(term, epoch): one life of the coordinator, and one record of who serves."""

    term: int
    epoch: int

    def __str__(self) -> str:
        return f"(term {self.term}, epoch {self.epoch})"


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor: its name, shape and the index of its parameter group."""

    name: str
    shape: tuple[int, ...]
    group: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterTable:
    """The ordered list of trainable tensors, in registration order, tied ones once."""

    tensors: tuple[TensorSpec, ...]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def packed(self) -> bytes:
        """The canonical encoding that is journaled, sent and digested."""
        return bytes(msgpack.packb([[t.name, list(t.shape), t.group] for t in self.tensors]))

    @classmethod
    def unpack(cls, data: bytes) -> ParameterTable:
        """Read what `packed` made.

        Raises:
            MismatchError: it is something else.
        """
        try:
            rows = msgpack.unpackb(data)
            return cls(tuple(TensorSpec(str(name), tuple(map(int, shape)), int(group)) for name, shape, group in rows))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise MismatchError(f"{len(data)} bytes are not a parameter table: {error}") from None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.packed()).hexdigest()


@dataclass(frozen=True)
class ContributionReport:
    """What a shard knows of one contribution of a step, besides its gradients."""

    contribution: int
    #: Sum over its slots of the micro-batch's mean loss, unscaled.
    loss_sum: float
    tokens: int
    rank: int
    incarnation: int


@dataclass(frozen=True)
class Prepared:
    """A shard has reduced every chunk of a step."""

    fence: Fence
    step: int
    shard: int
    #: Sum of squares of the reduced, still scaled gradient of each of the shard's segments.
    square_sums: tuple[float, ...]
    contributions: tuple[ContributionReport, ...]
    #: Its journal has grown so long that it is time for a checkpoint.
    journal_full: bool = False
    #: The life of the standby that holds all of it too; 0: none does.
    standby: int = 0


@dataclass(frozen=True)
class Applied:
    """A shard has carried out a decision."""

    fence: Fence
    step: int
    shard: int
    #: 64-bit hash of the shard's weights and optimizer state.
    state_hash: int


@dataclass(frozen=True)
class GroupScalars:
    """The numbers of one parameter group's update, computed once, in float64, by the coordinator."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Decision:
    """What every shard does with a step: a pure function of its reports and of the state before it."""

    fence: Fence
    step: int
    skip: bool
    #: Committed steps after this one.
    applied: int
    #: Skipped steps after this one.
    skipped: int
    loss: float
    tokens: int
    #: Norm of the mean, unscaled gradient before clipping; not finite for an overflow.
    gradient_norm: float
    #: The loss scale that this step's gradients carry.
    loss_scale: float
    #: m is multiplied by this: clip coefficient / loss scale.
    gradient_multiplier: float
    groups: tuple[GroupScalars, ...]
    #: 1 - beta1^applied and 1 - beta2^applied; 1 for SGD.
    bias_correction1: float
    bias_correction2: float
    #: The dynamic loss scaler after this step.
    next_loss_scale: float
    next_hysteresis: int
    next_last_overflow: int
    #: Write the state exactly after this decision.
    snapshot: bool

    @property
    def version(self) -> int:
        """The version that this decision makes."""
        return self.step + 1

    def updates_as(self, other: Decision) -> bool:
        """Whether it does the same to weights and moments as another decision of its step."""
        return self._update == other._update

    @property
    def _update(self) -> tuple[object, ...]:
        corrections = (self.bias_correction1, self.bias_correction2)
        return (self.step, self.skip, self.applied, self.gradient_multiplier, self.groups, *corrections)


def slot_range(contribution: int, contributions: int, slots: int) -> range:
    """Return the slots of a contribution: consecutive, and K_c = G/C up to one.

    Args:
        contribution: c, 0..C-1.
        contributions: C.
        slots: G, the micro-batches of a step.
    """
    return range(contribution * slots // contributions, (contribution + 1) * slots // contributions)
