from protos.ps.v1 import common_pb2 as _common_pb2
from protos.ps.v1 import frame_pb2 as _frame_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConfigureRequest(_message.Message):
    __slots__ = ("action", "fence", "run", "shard", "num_shards", "table", "job", "contributions", "checkpoint", "manifest_sha256", "step", "applied", "loss_scale", "nonce_file", "nonce", "shards_on_machine", "lineage", "keep")
    class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        INSPECT: _ClassVar[ConfigureRequest.Action]
        LOAD: _ClassVar[ConfigureRequest.Action]
        SERVE: _ClassVar[ConfigureRequest.Action]
        FOLLOW: _ClassVar[ConfigureRequest.Action]
    INSPECT: ConfigureRequest.Action
    LOAD: ConfigureRequest.Action
    SERVE: ConfigureRequest.Action
    FOLLOW: ConfigureRequest.Action
    ACTION_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FILE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_ON_MACHINE_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    action: ConfigureRequest.Action
    fence: _common_pb2.Fence
    run: str
    shard: int
    num_shards: int
    table: bytes
    job: str
    contributions: int
    checkpoint: str
    manifest_sha256: str
    step: int
    applied: int
    loss_scale: float
    nonce_file: str
    nonce: str
    shards_on_machine: int
    lineage: int
    keep: bool
    def __init__(self, action: _Optional[_Union[ConfigureRequest.Action, str]] = ..., fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., run: _Optional[str] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., table: _Optional[bytes] = ..., job: _Optional[str] = ..., contributions: _Optional[int] = ..., checkpoint: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., step: _Optional[int] = ..., applied: _Optional[int] = ..., loss_scale: _Optional[float] = ..., nonce_file: _Optional[str] = ..., nonce: _Optional[str] = ..., shards_on_machine: _Optional[int] = ..., lineage: _Optional[int] = ..., keep: bool = ...) -> None: ...

class ConfigureResponse(_message.Message):
    __slots__ = ("plan_digest", "incarnation", "has_state", "version", "applied", "last_decision", "updated_by", "reduced", "state_hash")
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HAS_STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    LAST_DECISION_FIELD_NUMBER: _ClassVar[int]
    UPDATED_BY_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    plan_digest: str
    incarnation: int
    has_state: bool
    version: int
    applied: int
    last_decision: _common_pb2.Decision
    updated_by: _common_pb2.Decision
    reduced: bool
    state_hash: int
    def __init__(self, plan_digest: _Optional[str] = ..., incarnation: _Optional[int] = ..., has_state: bool = ..., version: _Optional[int] = ..., applied: _Optional[int] = ..., last_decision: _Optional[_Union[_common_pb2.Decision, _Mapping]] = ..., updated_by: _Optional[_Union[_common_pb2.Decision, _Mapping]] = ..., reduced: bool = ..., state_hash: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class ShardStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardStatusResponse(_message.Message):
    __slots__ = ("run", "fence", "shard", "phase", "version", "applied", "state_hash", "chunks", "chunks_reduced", "missing", "streams")
    RUN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_REDUCED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    run: str
    fence: _common_pb2.Fence
    shard: int
    phase: str
    version: int
    applied: int
    state_hash: int
    chunks: int
    chunks_reduced: int
    missing: _containers.RepeatedScalarFieldContainer[int]
    streams: int
    def __init__(self, run: _Optional[str] = ..., fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., shard: _Optional[int] = ..., phase: _Optional[str] = ..., version: _Optional[int] = ..., applied: _Optional[int] = ..., state_hash: _Optional[int] = ..., chunks: _Optional[int] = ..., chunks_reduced: _Optional[int] = ..., missing: _Optional[_Iterable[int]] = ..., streams: _Optional[int] = ...) -> None: ...
