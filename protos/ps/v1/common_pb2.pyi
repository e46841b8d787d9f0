from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Fence(_message.Message):
    __slots__ = ("term", "epoch")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("role", "rank", "incarnation", "pid", "host", "address", "metrics_address", "machine")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    role: str
    rank: int
    incarnation: int
    pid: int
    host: str
    address: str
    metrics_address: str
    machine: str
    def __init__(self, role: _Optional[str] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., machine: _Optional[str] = ...) -> None: ...

class GroupScalars(_message.Message):
    __slots__ = ("lr", "weight_decay")
    LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    lr: float
    weight_decay: float
    def __init__(self, lr: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("fence", "step", "skip", "applied", "skipped", "loss", "tokens", "gradient_norm", "loss_scale", "gradient_multiplier", "groups", "bias_correction1", "bias_correction2", "next_loss_scale", "next_hysteresis", "next_last_overflow", "snapshot")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BIAS_CORRECTION1_FIELD_NUMBER: _ClassVar[int]
    BIAS_CORRECTION2_FIELD_NUMBER: _ClassVar[int]
    NEXT_LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    NEXT_HYSTERESIS_FIELD_NUMBER: _ClassVar[int]
    NEXT_LAST_OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    step: int
    skip: bool
    applied: int
    skipped: int
    loss: float
    tokens: int
    gradient_norm: float
    loss_scale: float
    gradient_multiplier: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupScalars]
    bias_correction1: float
    bias_correction2: float
    next_loss_scale: float
    next_hysteresis: int
    next_last_overflow: int
    snapshot: bool
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., step: _Optional[int] = ..., skip: bool = ..., applied: _Optional[int] = ..., skipped: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., gradient_norm: _Optional[float] = ..., loss_scale: _Optional[float] = ..., gradient_multiplier: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupScalars, _Mapping]]] = ..., bias_correction1: _Optional[float] = ..., bias_correction2: _Optional[float] = ..., next_loss_scale: _Optional[float] = ..., next_hysteresis: _Optional[int] = ..., next_last_overflow: _Optional[int] = ..., snapshot: bool = ...) -> None: ...

class ContributionReport(_message.Message):
    __slots__ = ("contribution", "loss_sum", "tokens", "rank", "incarnation")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    contribution: int
    loss_sum: float
    tokens: int
    rank: int
    incarnation: int
    def __init__(self, contribution: _Optional[int] = ..., loss_sum: _Optional[float] = ..., tokens: _Optional[int] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("fence", "step", "shard", "square_sums", "contributions", "journal_full", "standby")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SQUARE_SUMS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FULL_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    step: int
    shard: int
    square_sums: _containers.RepeatedScalarFieldContainer[float]
    contributions: _containers.RepeatedCompositeFieldContainer[ContributionReport]
    journal_full: bool
    standby: int
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., step: _Optional[int] = ..., shard: _Optional[int] = ..., square_sums: _Optional[_Iterable[float]] = ..., contributions: _Optional[_Iterable[_Union[ContributionReport, _Mapping]]] = ..., journal_full: bool = ..., standby: _Optional[int] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("fence", "step", "shard", "state_hash")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    step: int
    shard: int
    state_hash: int
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., step: _Optional[int] = ..., shard: _Optional[int] = ..., state_hash: _Optional[int] = ...) -> None: ...
