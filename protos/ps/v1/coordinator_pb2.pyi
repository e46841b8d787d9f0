from protos.ps.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("member", "run")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    member: _common_pb2.Member
    run: str
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., run: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("run", "job", "rank", "lease_s")
    RUN_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    run: str
    job: str
    rank: int
    lease_s: float
    def __init__(self, run: _Optional[str] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "heartbeat", "model", "prepared", "applied", "initialized", "snapshot_written", "evaluated", "contributed", "leave")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    model: Model
    prepared: _common_pb2.Prepared
    applied: _common_pb2.Applied
    initialized: Initialized
    snapshot_written: SnapshotWritten
    evaluated: Evaluated
    contributed: Contributed
    leave: Leave
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., prepared: _Optional[_Union[_common_pb2.Prepared, _Mapping]] = ..., applied: _Optional[_Union[_common_pb2.Applied, _Mapping]] = ..., initialized: _Optional[_Union[Initialized, _Mapping]] = ..., snapshot_written: _Optional[_Union[SnapshotWritten, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., contributed: _Optional[_Union[Contributed, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("member", "run", "starting")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    member: _common_pb2.Member
    run: str
    starting: bool
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., run: _Optional[str] = ..., starting: bool = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("doing", "starting", "transport")
    DOING_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    doing: str
    starting: bool
    transport: str
    def __init__(self, doing: _Optional[str] = ..., starting: bool = ..., transport: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("table", "data_digest", "evaluation_parts")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    DATA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_PARTS_FIELD_NUMBER: _ClassVar[int]
    table: bytes
    data_digest: str
    evaluation_parts: int
    def __init__(self, table: _Optional[bytes] = ..., data_digest: _Optional[str] = ..., evaluation_parts: _Optional[int] = ...) -> None: ...

class Initialized(_message.Message):
    __slots__ = ("fence", "shard")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    shard: int
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., shard: _Optional[int] = ...) -> None: ...

class SnapshotWritten(_message.Message):
    __slots__ = ("fence", "version", "shard", "file", "sha256", "size", "error")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    version: int
    shard: int
    file: str
    sha256: str
    size: int
    error: str
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., version: _Optional[int] = ..., shard: _Optional[int] = ..., file: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("version", "part", "loss_sum", "tokens", "bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    part: int
    loss_sum: float
    tokens: int
    bytes: int
    def __init__(self, version: _Optional[int] = ..., part: _Optional[int] = ..., loss_sum: _Optional[float] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Contributed(_message.Message):
    __slots__ = ("step", "contribution", "compute_s", "push_s", "pull_s", "fence", "wait_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PUSH_S_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    contribution: int
    compute_s: float
    push_s: float
    pull_s: float
    fence: _common_pb2.Fence
    wait_s: float
    def __init__(self, step: _Optional[int] = ..., contribution: _Optional[int] = ..., compute_s: _Optional[float] = ..., push_s: _Optional[float] = ..., pull_s: _Optional[float] = ..., fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("cluster", "decision", "deal", "write_snapshot", "end", "foregone", "replicate")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    DEAL_FIELD_NUMBER: _ClassVar[int]
    WRITE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FOREGONE_FIELD_NUMBER: _ClassVar[int]
    REPLICATE_FIELD_NUMBER: _ClassVar[int]
    cluster: Cluster
    decision: _common_pb2.Decision
    deal: Deal
    write_snapshot: WriteSnapshot
    end: End
    foregone: _common_pb2.Decision
    replicate: Replicate
    def __init__(self, cluster: _Optional[_Union[Cluster, _Mapping]] = ..., decision: _Optional[_Union[_common_pb2.Decision, _Mapping]] = ..., deal: _Optional[_Union[Deal, _Mapping]] = ..., write_snapshot: _Optional[_Union[WriteSnapshot, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., foregone: _Optional[_Union[_common_pb2.Decision, _Mapping]] = ..., replicate: _Optional[_Union[Replicate, _Mapping]] = ...) -> None: ...

class Replicate(_message.Message):
    __slots__ = ("fence", "address", "incarnation")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    address: str
    incarnation: int
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("fence", "plan_digest", "shards", "contributions", "step", "applied", "loss_scale")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    plan_digest: str
    shards: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    contributions: int
    step: int
    applied: int
    loss_scale: float
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., plan_digest: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ..., contributions: _Optional[int] = ..., step: _Optional[int] = ..., applied: _Optional[int] = ..., loss_scale: _Optional[float] = ...) -> None: ...

class Deal(_message.Message):
    __slots__ = ("fence", "step", "applied", "loss_scale", "contributions", "evaluate", "initialize", "done")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    INITIALIZE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    step: int
    applied: int
    loss_scale: float
    contributions: _containers.RepeatedScalarFieldContainer[int]
    evaluate: _containers.RepeatedScalarFieldContainer[int]
    initialize: bool
    done: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., step: _Optional[int] = ..., applied: _Optional[int] = ..., loss_scale: _Optional[float] = ..., contributions: _Optional[_Iterable[int]] = ..., evaluate: _Optional[_Iterable[int]] = ..., initialize: bool = ..., done: _Optional[_Iterable[int]] = ...) -> None: ...

class WriteSnapshot(_message.Message):
    __slots__ = ("fence", "version")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    fence: _common_pb2.Fence
    version: int
    def __init__(self, fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("ok", "reason")
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    reason: str
    def __init__(self, ok: bool = ..., reason: _Optional[str] = ...) -> None: ...

class ClockRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClockResponse(_message.Message):
    __slots__ = ("name", "now_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NOW_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    now_ns: int
    def __init__(self, name: _Optional[str] = ..., now_ns: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("member", "run", "offset_ns", "uncertainty_ns", "dropped", "spans")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_NS_FIELD_NUMBER: _ClassVar[int]
    UNCERTAINTY_NS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    member: _common_pb2.Member
    run: str
    offset_ns: int
    uncertainty_ns: int
    dropped: int
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., run: _Optional[str] = ..., offset_ns: _Optional[int] = ..., uncertainty_ns: _Optional[int] = ..., dropped: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "category", "track", "start_ns", "duration_ns", "step", "chunk", "contribution")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    TRACK_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    category: str
    track: str
    start_ns: int
    duration_ns: int
    step: int
    chunk: int
    contribution: int
    def __init__(self, name: _Optional[str] = ..., category: _Optional[str] = ..., track: _Optional[str] = ..., start_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., step: _Optional[int] = ..., chunk: _Optional[int] = ..., contribution: _Optional[int] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("run", "fence", "phase", "version", "applied", "steps", "loss", "evaluation_loss", "loss_scale", "learning_rate", "gradient_norm", "members", "waiting_for", "checkpoint", "waits", "tokens_per_s", "step_s", "compute_s", "push_s", "pull_s", "left_s", "skipped", "contributions", "slots", "checkpoint_age_s", "evaluation_version", "up_s", "coordinator", "run_dir", "wait_s")
    RUN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PUSH_S_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_VERSION_FIELD_NUMBER: _ClassVar[int]
    UP_S_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    run: str
    fence: _common_pb2.Fence
    phase: str
    version: int
    applied: int
    steps: int
    loss: float
    evaluation_loss: float
    loss_scale: float
    learning_rate: float
    gradient_norm: float
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    waiting_for: str
    checkpoint: int
    waits: _containers.RepeatedCompositeFieldContainer[Wait]
    tokens_per_s: float
    step_s: float
    compute_s: float
    push_s: float
    pull_s: float
    left_s: float
    skipped: int
    contributions: int
    slots: int
    checkpoint_age_s: float
    evaluation_version: int
    up_s: float
    coordinator: _common_pb2.Member
    run_dir: str
    wait_s: float
    def __init__(self, run: _Optional[str] = ..., fence: _Optional[_Union[_common_pb2.Fence, _Mapping]] = ..., phase: _Optional[str] = ..., version: _Optional[int] = ..., applied: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., evaluation_loss: _Optional[float] = ..., loss_scale: _Optional[float] = ..., learning_rate: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., waiting_for: _Optional[str] = ..., checkpoint: _Optional[int] = ..., waits: _Optional[_Iterable[_Union[Wait, _Mapping]]] = ..., tokens_per_s: _Optional[float] = ..., step_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., push_s: _Optional[float] = ..., pull_s: _Optional[float] = ..., left_s: _Optional[float] = ..., skipped: _Optional[int] = ..., contributions: _Optional[int] = ..., slots: _Optional[int] = ..., checkpoint_age_s: _Optional[float] = ..., evaluation_version: _Optional[int] = ..., up_s: _Optional[float] = ..., coordinator: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., run_dir: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("role", "rank", "what", "since_s", "last_seen_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    rank: int
    what: str
    since_s: float
    last_seen_s: float
    def __init__(self, role: _Optional[str] = ..., rank: _Optional[int] = ..., what: _Optional[str] = ..., since_s: _Optional[float] = ..., last_seen_s: _Optional[float] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("member", "live", "last_seen_s", "doing", "since_s", "restarts", "last", "state", "transport", "in_sync")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    member: _common_pb2.Member
    live: bool
    last_seen_s: float
    doing: str
    since_s: float
    restarts: int
    last: Contributed
    state: str
    transport: str
    in_sync: bool
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., live: bool = ..., last_seen_s: _Optional[float] = ..., doing: _Optional[str] = ..., since_s: _Optional[float] = ..., restarts: _Optional[int] = ..., last: _Optional[_Union[Contributed, _Mapping]] = ..., state: _Optional[str] = ..., transport: _Optional[str] = ..., in_sync: bool = ...) -> None: ...
